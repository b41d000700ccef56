"""Videos in which something is seen and heard in step, at random times: synchronization can be learnt, rotation too.

A video shows a plain sky above a rough ground, with a lamp that lights both: at random times it goes over, within a
tenth of a second, to another brightness. A hiss is as loud, in decibels, as the lamp is bright. Times and levels are
drawn anew for every video; which of two sounds belongs to a picture is told by nothing else. No texture and no tint has
anything to do with it: the mean brightness of sky, ground and tint is the same in every video.

Sky and ground are equally bright on average: which way up a video is, is told by where it is rough. The label is the
tilt of the horizon: two steps to the left, one to the left, one to the right, two to the right. Clips turned by
quarters have horizons in sixteen directions, no two of them alike: features that know which way up a clip is are close
to its tilt.
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
from pipeline.synthetic.parts import Progress, Ticks, ensure, numbers_of, pcm, texture

HOLD_S, RAMP_S = (0.3, 1.5), 0.1  # seconds from one change of the lamp to the next, and how long a change takes
TILTS = {"far left": -30.0, "left": -10.0, "right": 10.0, "far right": 30.0}  # label -> degrees, clockwise
DARK, LAMP, ROUGHNESS = 80.0, 110.0, 25.0  # grey without the lamp, what it adds at most, deviation of the ground
QUIET_DB, LOUD_DB = -50.0, -10.0  # root mean square of the hiss, of full scale, at level 0 and at level 1


@dataclass(frozen=True)
class EventSpec:
    """Size of a data set of events.

    Args:
        train_videos: Videos of the training split, with a sound each; a multiple of four, the labels.
        val_videos: The same for validation.
        num_frames: Frames of a video.
        fps: Their rate.
        size_px: Side of the picture, a multiple of 16.
        together: Whether the sound follows the lamp; False: levels and times of its own, the control, in which
            synchronization is a coin.
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
            f"synthetic-events-v2-{self.codec}-{self.size_px}px-{self.train_videos}x{self.val_videos}"
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
        if videos < 1 or videos % len(TILTS):
            raise ValueError(f"videos ({videos}) must be a positive multiple of the {len(TILTS)} labels; correct it")
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
            classes={"action": list(TILTS)},
        ) as writer,
        ThreadPoolExecutor() as pool,
    ):
        for split, numbers in numbers_of(splits):
            rows = []
            for video, encoded in zip(numbers, pool.map(lambda n: _encoded(spec, n), numbers), strict=True):
                sound = writer.add_audio(event_sound(spec, video))
                name = f"{split}-{video - numbers.start:04d}"
                media = writer.add_media(name, writer.add_video(encoded), sound, source=name)
                rows.append(SampleRow(name, media, 0.0, spec.duration_s, {"action": (video % len(TILTS),)}))
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


def levels(spec: EventSpec, video: int, time_s: NDArray[np.float64], heard: bool = False) -> NDArray[np.float64]:
    """Return (T,) in [0, 1]: how bright the lamp of a video is at times `time_s`.

    Args:
        spec: Of the data set.
        video: Number; its label is `video % 4`.
        time_s: (T,) seconds.
        heard: Of the sound, which differs from the lamp in the control.
    """
    rng = generator(spec.seed, Purpose.CLIP, video, 3 if spec.together or not heard else 4)
    changes = 2 + int(spec.duration_s / HOLD_S[0])
    begin_s = np.cumsum(rng.uniform(*HOLD_S, changes)) - rng.uniform(HOLD_S[1], 2 * HOLD_S[1])
    found = np.sin(rng.uniform(0, np.pi / 2, changes + 1)) ** 2  # all levels, the outer ones more often
    times = np.stack([begin_s, begin_s + RAMP_S], 1).reshape(-1)
    return np.asarray(np.interp(time_s, times, np.repeat(found, 2)[1:-1]), np.float64)


def event_pictures(spec: EventSpec, video: int) -> NDArray[np.uint8]:
    """Return (frames, H, W, 3) uint8: a tilted horizon over rough ground, in a light that changes."""
    rng = generator(spec.seed, Purpose.CLIP, video, 5)
    size = spec.size_px
    down, right = np.mgrid[0:size, 0:size] - (size - 1) / 2
    angle = np.radians(tuple(TILTS.values())[video % len(TILTS)])
    depth = down * np.cos(angle) - right * np.sin(angle) + rng.uniform(-0.15, 0.15) * size  # pixels below the horizon
    ground = texture(rng, size, 10, coarsest=4)
    rough = (0.5 + 0.5 * np.tanh(depth / 2)) * (ground - ground.mean()) / ground.std()
    tint, shade = rng.uniform(0.6, 1.4, 3), rng.uniform(-15, 15, 3)
    picture = DARK + ROUGHNESS * (rough - rough.mean())[..., None] * tint + shade - shade.mean()
    light = levels(spec, video, (np.arange(spec.num_frames) + 0.5) / spec.fps)
    frames = picture + LAMP * light[:, None, None, None]
    return frames.clip(0, 255).astype(np.uint8)


def event_sound(spec: EventSpec, video: int) -> NDArray[np.int16]:
    """Return (samples,) int16 at 16 kHz: a hiss as loud as the lamp is bright, and duller at high frequencies.

    A hiss of one level and a level spectrum would be a log-mel without variance, which the loss takes for silence.
    """
    rng = generator(spec.seed, Purpose.CLIP, video, 6)
    time_s = np.arange(SAMPLE_RATE_HZ * spec.num_frames // spec.fps) / SAMPLE_RATE_HZ
    loudness_db = QUIET_DB + (LOUD_DB - QUIET_DB) * levels(spec, video, time_s, heard=True) + rng.uniform(-0.5, 0.5)
    hiss = np.convolve(rng.normal(size=len(time_s)), (0.8, 0.6), mode="same")
    return pcm(hiss * 10 ** (loudness_db / 20))
