"""A small audiovisual data set with known answers, really encoded: neither what moves nor what sounds is enough.

A video shows a texture that drifts in one of K directions; a track is one of K kinds of sound, K = 2 to 4. The label
is (direction + kind) mod K, so each modality alone says nothing about it: a model that is blind to one of them has a
ceiling of 1/K, both together determine it. A split is a full factorial: every video stream comes with every sound
stream, so on it a blind model scores exactly 1/K and any excess is a leak. Training and validation share no stream.

With the rule "sight" the label is seen: the texture is upright or level (it drifts anywhere). The kind of sound is a
cue that can be learnt faster and misleads: it is that of the label in a share of the clips, and another in the rest.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.draw import Purpose, generator
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter
from pipeline.synthetic.parts import Progress, Ticks, ensure, numbers_of, pcm, texture

LOOKS = ("upright", "level")  # of the rule "sight"
SOUNDS_A_VIDEO = 10  # of the rule "sight"
DIRECTIONS = ("right", "down", "left", "up")
SOUNDS = ("hum", "clicks", "hiss", "chirps")


@dataclass(frozen=True)
class SyntheticSpec:
    """Size of a synthetic data set.

    Args:
        num_classes: K, 2 to 4; more take longer to learn.
        train_streams: Video streams of the training split, and as many sound streams; a multiple of K.
        val_streams: The same for validation.
        num_frames: Frames of a video.
        fps: Their rate.
        size_px: Side of the picture, a multiple of 16.
        codec: "vp9" or "h264".
        gop: Frames of a fragment.
        seed: Seed of everything.
        rule: What the label is: "parity" of direction and kind of sound, or "sight", the look of the texture (K = 2).
        agreement: Rule "sight": share of the clips whose kind of sound is that of their label, training and validation.
    """

    num_classes: int = 2
    train_streams: int = 64
    val_streams: int = 20
    num_frames: int = 72
    fps: int = 30
    size_px: int = 64
    codec: str = "vp9"
    gop: int = 12
    seed: int = 0
    rule: Literal["parity", "sight"] = "parity"
    agreement: tuple[float, float] = (1.0, 1.0)

    @property
    def name(self) -> str:
        """Folder name that changes with every setting."""
        return (
            f"synthetic-v1-{self.codec}-{self.size_px}px-{self.num_classes}classes-{self.train_streams}x{self.val_streams}"
            f"-{self.num_frames}f-{self.fps}fps-g{self.gop}-s{self.seed}"
            f"{'' if self.rule == 'parity' else f'-sight{self.agreement[0]:g}-{self.agreement[1]:g}'}"
        )


def ensure_store(root: Path, spec: SyntheticSpec, progress: Progress | None = None) -> Path:
    """Make the store under `root` unless it is there already.

    Args:
        root: Folder of data sets.
        spec: What to make.
        progress: Called with streams done and streams in all.

    Returns:
        The store's folder.

    Raises:
        ValueError: a number of classes or streams that breaks its rule.
    """
    path = root / spec.name
    return ensure(path, lambda: make_store(path, spec, progress))


def make_store(path: Path, spec: SyntheticSpec, progress: Progress | None = None) -> None:
    """Encode all streams and write the store with its splits `train` and `val`; arguments as in `ensure_store`."""
    if not 2 <= spec.num_classes <= len(DIRECTIONS):
        raise ValueError(f"num_classes ({spec.num_classes}) must be 2 to {len(DIRECTIONS)}")
    if spec.rule == "sight" and (spec.num_classes > len(LOOKS) or spec.val_streams < 2 * SOUNDS_A_VIDEO):
        raise ValueError(
            f"num_classes ({spec.num_classes}) must be {len(LOOKS)} and streams ({spec.val_streams}) at least "
            f"{2 * SOUNDS_A_VIDEO} for rule sight; correct them"
        )
    for streams in (spec.train_streams, spec.val_streams):
        if streams < 1 or streams % spec.num_classes:
            raise ValueError(f"streams ({streams}) must be a positive multiple of num_classes ({spec.num_classes})")
    splits = {"train": spec.train_streams, "val": spec.val_streams}
    ticks = Ticks(2 * sum(splits.values()), progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        StoreWriter(
            path,
            video_codec=spec.codec,
            gop=spec.gop,
            short_side_px=spec.size_px,
            dataset="synthetic",
            classes={"action": [f"class_{k}" for k in range(spec.num_classes)]},
        ) as writer,
        ThreadPoolExecutor() as pool,
    ):
        for split, numbers in numbers_of(splits):
            _write_split(writer, pool, spec, split, numbers, ticks)


def _write_split(
    writer: StoreWriter,
    pool: ThreadPoolExecutor,
    spec: SyntheticSpec,
    split: str,
    numbers: range,
    ticks: Ticks,
) -> None:
    """Write every stream once and every pair of a video with a sound as a sample."""
    videos, sounds = [], []
    for video in pool.map(lambda number: encode_stream(spec, number), numbers):
        videos.append(writer.add_video(video))
        ticks.tick()
    for wave in pool.map(lambda number: sound_stream(spec, number), numbers):
        sounds.append(writer.add_audio(wave))
        ticks.tick()
    rows = []
    for v, a in _pairs(spec, split, len(numbers)):
        shown, kind = v % spec.num_classes, a % spec.num_classes
        seen = (LOOKS if spec.rule == "sight" else DIRECTIONS)[shown]
        name = f"{split}-v{v:03d}-{seen}-a{a:03d}-{SOUNDS[kind]}"
        media = writer.add_media(name, videos[v], sounds[a], source=f"{split}-v{v:03d}")
        label = shown if spec.rule == "sight" else (shown + kind) % spec.num_classes
        rows.append(SampleRow(name, media, 0.0, spec.num_frames / spec.fps, {"action": (label,)}))
    writer.add_samples(split, rows)


def _pairs(spec: SyntheticSpec, split: str, streams: int) -> list[tuple[int, int]]:
    """Return which video stream comes with which sound stream: all with all, or as `agreement` has it."""
    if spec.rule == "parity":
        return [(v, a) for v in range(streams) for a in range(streams)]
    share, kinds = spec.agreement[split == "val"], spec.num_classes
    rng = generator(spec.seed, Purpose.CLIP, int(split == "val"), 7)
    pairs = []
    agree = round(share * SOUNDS_A_VIDEO)
    for v in range(streams):
        own = rng.choice(np.arange(v % kinds, streams, kinds), agree, replace=False)
        other = rng.choice([a for a in range(streams) if a % kinds != v % kinds], SOUNDS_A_VIDEO - agree, replace=False)
        pairs += [(v, int(a)) for a in (*own, *other)]
    return pairs


def encode_stream(spec: SyntheticSpec, stream: int) -> FragmentedVideo:
    """Encode the video stream `stream`; its direction is `stream % K`."""
    return encode_fragments(
        list(video_stream(spec, stream)),
        fps=Fraction(spec.fps),
        width=spec.size_px,
        height=spec.size_px,
        codec=spec.codec,
        gop=spec.gop,
        quality=28,
    )


def video_stream(spec: SyntheticSpec, stream: int) -> NDArray[np.uint8]:
    """Return (frames, H, W, 3) uint8: a smooth random texture of random colours that drifts at a random speed."""
    rng = generator(spec.seed, Purpose.CLIP, stream, 1)
    size = spec.size_px
    looks = spec.rule == "sight"
    shades = texture(rng, size, axis=stream % spec.num_classes if looks else None)
    low, high = np.sort(rng.uniform(0, 255, (2, 3)), axis=0)
    colours = (low - 30 + shades[..., None] * (high - low + 60)).clip(0, 255)
    speed_px = rng.uniform(0.8, 1.4) * size / 64
    shifts = np.floor(np.arange(spec.num_frames) * speed_px + rng.uniform(0, size)).astype(int)
    drift = int(rng.integers(4)) if looks else stream % spec.num_classes
    axis, sign = {"right": (1, 1), "down": (0, 1), "left": (1, -1), "up": (0, -1)}[DIRECTIONS[drift]]
    frames = np.stack([np.roll(colours, sign * int(shift), axis) for shift in shifts])
    noise = rng.normal(0, 3, (1, size, size, 1))
    return (frames + noise).clip(0, 255).astype(np.uint8)


def sound_stream(spec: SyntheticSpec, stream: int) -> NDArray[np.int16]:
    """Return (samples,) int16 at 16 kHz of the stream's kind `stream % K`: random pitch, rate, level and noise."""
    rng = generator(spec.seed, Purpose.CLIP, stream, 2)
    count = SAMPLE_RATE_HZ * spec.num_frames // spec.fps
    time_s = np.arange(count) / SAMPLE_RATE_HZ
    kind = SOUNDS[stream % spec.num_classes]
    wave: NDArray[np.float64] = np.zeros(count)
    if kind == "hum":
        pitch_hz = rng.uniform(150, 600)
        for harmonic in range(1, 6):
            wave += np.sin(2 * np.pi * pitch_hz * harmonic * time_s + rng.uniform(0, 6)) / harmonic
    elif kind == "clicks":
        phase = (time_s * rng.uniform(8, 14) + rng.uniform()) % 1.0
        wave = 6 * rng.normal(size=count) * np.exp(-phase * 60)
    elif kind == "hiss":
        wave = rng.normal(size=count)
    else:
        rate_hz, low_hz = rng.uniform(4, 7), rng.uniform(300, 800)
        phase = (time_s * rate_hz + rng.uniform()) % 1.0
        glide_hz = low_hz * 2.0 ** (rng.uniform(2, 3) * phase)
        wave = np.sin(2 * np.pi * np.cumsum(glide_hz) / SAMPLE_RATE_HZ)
    wave = wave / np.sqrt(np.mean(wave**2)) * 10 ** rng.uniform(-1.3, -0.8)
    wave = wave + rng.normal(size=count) * 10 ** rng.uniform(-3.5, -2.5)
    return pcm(wave)
