"""Videos in which something is seen and heard at the same moments, at random times: synchronization can be learnt.

A video shows a texture that falls. At random times a light goes on, and a hiss is heard as long as it is on. Both times
are drawn anew for every event, so that two windows of a video differ in how much, and when, there is light; which of
two sounds belongs to a picture is told by nothing else. Times do not lie on the grid of the frames: sounds that begin
on it would have one phase in every window in sync and any in the others, and sound alone would give the answer.

The label is the slant of the fall, to the left or to the right. Clips turned by quarters fall in eight directions, no
two of them alike, so that features that know which way up a clip is tell its label.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.draw import Purpose, generator
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter
from pipeline.synthetic.parts import Progress, Ticks, ensure, moved, numbers_of, pcm, texture

ON_S, OFF_S = (0.08, 0.7), (0.08, 0.9)  # how long a light is on, and off
SLANTS = ("left", "right")
SLANT_DEGREES = 20.0


@dataclass(frozen=True)
class EventSpec:
    """Size of a data set of events.

    Args:
        train_videos: Videos of the training split, with a sound each; an even number.
        val_videos: The same for validation.
        num_frames: Frames of a video.
        fps: Their rate.
        size_px: Side of the picture, a multiple of 16.
        together: Whether light and sound come at the same times; False: at times of their own, the control, in
            which synchronization is a coin.
        codec: "vp9", "h264" or "mjpeg".
        gop: Frames of a fragment.
        seed: Seed of everything.
    """

    train_videos: int = 320
    val_videos: int = 160
    num_frames: int = 96
    fps: int = 30
    size_px: int = 32
    together: bool = True
    codec: str = "h264"
    gop: int = 12
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder name that changes with every setting."""
        return (
            f"synthetic-events-v1-{self.codec}-{self.size_px}px-{self.train_videos}x{self.val_videos}"
            f"-{self.num_frames}f-{self.fps}fps-g{self.gop}{'' if self.together else '-apart'}-s{self.seed}"
        )

    @property
    def duration_s(self) -> float:
        """Length of a video."""
        return self.num_frames / self.fps


def ensure_event_store(root: Path, spec: EventSpec, progress: Progress | None = None) -> Path:
    """Make the store under `root` unless it is there already, with its splits `train` and `val`.

    Args:
        root: Folder of data sets.
        spec: What to make.
        progress: Called with videos done and videos in all.

    Returns:
        The store's folder.

    Raises:
        ValueError: a number of videos that breaks its rule.
    """
    for videos in (spec.train_videos, spec.val_videos):
        if videos < 1 or videos % len(SLANTS):
            raise ValueError(f"videos ({videos}) must be a positive multiple of the {len(SLANTS)} labels; correct it")
    path = root / spec.name
    return ensure(path, lambda: _make(path, spec, progress))


def _make(path: Path, spec: EventSpec, progress: Progress | None) -> None:
    splits = {"train": spec.train_videos, "val": spec.val_videos}
    ticks = Ticks(sum(splits.values()), progress)
    with (
        StoreWriter(
            path,
            video_codec=spec.codec,
            gop=spec.gop,
            short_side_px=spec.size_px,
            dataset="synthetic-events",
            classes={"action": list(SLANTS)},
        ) as writer,
        ThreadPoolExecutor() as pool,
    ):
        for split, numbers in numbers_of(splits):
            rows = []
            for video, encoded in zip(numbers, pool.map(lambda n: _encoded(spec, n), numbers), strict=True):
                sound = writer.add_audio(event_sound(spec, video))
                name = f"{split}-{video - numbers.start:04d}"
                media = writer.add_media(name, writer.add_video(encoded), sound, source=name)
                rows.append(SampleRow(name, media, 0.0, spec.duration_s, {"action": (video % len(SLANTS),)}))
                ticks.tick()
            writer.add_samples(split, rows)


def _encoded(spec: EventSpec, video: int) -> FragmentedVideo:
    return encode_fragments(
        list(event_pictures(spec, video)),
        fps=Fraction(spec.fps),
        width=spec.size_px,
        height=spec.size_px,
        codec=spec.codec,
        gop=spec.gop,
        quality=28,
    )


def events(spec: EventSpec, video: int, heard: bool = False) -> NDArray[np.float64]:
    """Return (E, 2) when the light of a video goes on and off, seconds, rising; the first may begin before 0.

    Args:
        spec: Of the data set.
        video: Number; its slant is `video % 2`.
        heard: Of the sound, which differs from the light in the control.
    """
    rng = generator(spec.seed, Purpose.CLIP, video, 3 if spec.together or not heard else 4)
    most = 2 + int(spec.duration_s / (ON_S[0] + OFF_S[0]))
    lengths = np.stack([rng.uniform(*ON_S, most), rng.uniform(*OFF_S, most)], 1)
    ends = np.cumsum(lengths.reshape(-1)) - rng.uniform(0, sum(lengths[0]))
    starts = ends - lengths.reshape(-1)
    spans = np.stack([starts[0::2], ends[0::2]], 1)
    return spans[spans[:, 0] < spec.duration_s]


def event_pictures(spec: EventSpec, video: int) -> NDArray[np.uint8]:
    """Return (frames, H, W, 3) uint8: a texture of random colours that falls at a random speed, in a light at times."""
    rng = generator(spec.seed, Purpose.CLIP, video, 5)
    size, frame = spec.size_px, np.arange(spec.num_frames)
    dark, range_ = rng.uniform(20, 30, 3), rng.uniform(90, 120, 3)
    angle = np.radians((-SLANT_DEGREES, SLANT_DEGREES)[video % len(SLANTS)])
    path_px = frame * rng.uniform(0.9, 1.5) * size / 64
    falling = moved(texture(rng, size, 4), path_px * np.cos(angle), path_px * np.sin(angle))
    colours = dark + falling[..., None] * range_
    light = lit(frame / spec.fps, 1 / spec.fps, events(spec, video))
    frames = colours + 90 * light[:, None, None, None] + rng.normal(0, 2, (1, size, size, 1))
    return frames.clip(0, 255).astype(np.uint8)


def event_sound(spec: EventSpec, video: int) -> NDArray[np.int16]:
    """Return (samples,) int16 at 16 kHz: a hiss while the light is on, over a faint one, both of random level."""
    rng = generator(spec.seed, Purpose.CLIP, video, 6)
    time_s = np.arange(SAMPLE_RATE_HZ * spec.num_frames // spec.fps) / SAMPLE_RATE_HZ
    on = lit(time_s, 1 / SAMPLE_RATE_HZ, events(spec, video, heard=True))
    level, noise = 10 ** rng.uniform(-1.1, -0.9), 10 ** rng.uniform(-3.1, -2.9)
    return pcm(rng.normal(size=len(time_s)) * (level * on + noise))


def lit(time_s: NDArray[np.float64], step_s: float, spans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (T,) the share of each time step `time_s` .. `time_s + step_s` in which the light is on."""
    both = np.minimum(time_s[:, None] + step_s, spans[None, :, 1]) - np.maximum(time_s[:, None], spans[None, :, 0])
    return np.asarray(np.maximum(both, 0).sum(1) / step_s, np.float64)
