"""A small audiovisual data set with known answers, really encoded: neither what moves nor what sounds is enough.

A video shows a texture that drifts in one of K directions; a track is one of K kinds of sound, K = 2 to 4. The label
is (direction + kind) mod K, so each modality alone says nothing about it: a model that is blind to one of them has a
ceiling of 1/K, both together determine it. A split is a full factorial: every video stream comes with every sound
stream, so on it a blind model scores exactly 1/K and any excess is a leak. Training and validation share no stream.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.draw import Purpose, generator
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.format import StoreError
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter

DIRECTIONS = ("right", "down", "left", "up")
SOUNDS = ("hum", "clicks", "hiss", "chirps")
QUICKSTART = "synthetic:quickstart"


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

    @property
    def name(self) -> str:
        """Folder name that changes with every setting."""
        return (
            f"synthetic-v1-{self.codec}-{self.size_px}px-{self.num_classes}classes-{self.train_streams}x{self.val_streams}"
            f"-{self.num_frames}f-{self.fps}fps-g{self.gop}-s{self.seed}"
        )


def ensure_store(root: Path, spec: SyntheticSpec, progress: Callable[[int, int], None] | None = None) -> Path:
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
    if not (path / "store.json").is_file():
        try:
            make_store(path, spec, progress)
        except StoreError:
            if not (path / "store.json").is_file():  # else another process made it in the meantime
                raise
    return path


def make_store(path: Path, spec: SyntheticSpec, progress: Callable[[int, int], None] | None = None) -> None:
    """Encode all streams and write the store with its splits `train` and `val`; arguments as in `ensure_store`."""
    if not 2 <= spec.num_classes <= len(DIRECTIONS):
        raise ValueError(f"num_classes ({spec.num_classes}) must be 2 to {len(DIRECTIONS)}")
    for streams in (spec.train_streams, spec.val_streams):
        if streams < 1 or streams % spec.num_classes:
            raise ValueError(f"streams ({streams}) must be a positive multiple of num_classes ({spec.num_classes})")
    splits = {"train": spec.train_streams, "val": spec.val_streams}
    total, done = 2 * sum(splits.values()), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

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
        for number, (split, count) in enumerate(splits.items()):
            # Streams of the two splits are drawn from separate counters: they share nothing but the rule.
            numbers = range(number << 20, (number << 20) + count)
            _write_split(writer, pool, spec, split, numbers, tick)


def _write_split(
    writer: StoreWriter,
    pool: ThreadPoolExecutor,
    spec: SyntheticSpec,
    split: str,
    numbers: range,
    tick: Callable[[], None],
) -> None:
    """Write every stream once and every pair of a video with a sound as a sample."""
    videos, sounds = [], []
    for video in pool.map(lambda number: encode_stream(spec, number), numbers):
        videos.append(writer.add_video(video))
        tick()
    for wave in pool.map(lambda number: sound_stream(spec, number), numbers):
        sounds.append(writer.add_audio(wave))
        tick()
    rows = []
    for v, video_ref in enumerate(videos):
        for a, sound_ref in enumerate(sounds):
            direction, kind = v % spec.num_classes, a % spec.num_classes
            name = f"{split}-v{v:03d}-{DIRECTIONS[direction]}-a{a:03d}-{SOUNDS[kind]}"
            media = writer.add_media(name, video_ref, sound_ref, source=f"{split}-v{v:03d}")
            label = (direction + kind) % spec.num_classes
            rows.append(SampleRow(name, media, 0.0, spec.num_frames / spec.fps, {"action": (label,)}))
    writer.add_samples(split, rows)


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
    texture = _texture(rng, size)
    low, high = np.sort(rng.uniform(0, 255, (2, 3)), axis=0)
    colours = (low - 30 + texture[..., None] * (high - low + 60)).clip(0, 255)
    speed_px = rng.uniform(0.8, 1.4) * size / 64
    shifts = np.floor(np.arange(spec.num_frames) * speed_px + rng.uniform(0, size)).astype(int)
    axis, sign = {"right": (1, 1), "down": (0, 1), "left": (1, -1), "up": (0, -1)}[
        DIRECTIONS[stream % spec.num_classes]
    ]
    frames = np.stack([np.roll(colours, sign * int(shift), axis) for shift in shifts])
    noise = rng.normal(0, 3, (1, size, size, 1))
    return (frames + noise).clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Periodic band-limited noise in [0, 1], (H, W): wavelengths of a quarter to an eighth of the picture."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size, 1 / size), np.fft.fftfreq(size, 1 / size)))
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) * ((frequency >= 2) & (frequency <= 6))
    field = np.fft.ifft2(spectrum).real
    return ((field - field.min()) / (field.max() - field.min())).astype(np.float64)


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
    return (wave * 32767).clip(-32768, 32767).astype(np.int16)


def resolve(path: str, root: Path = Path("data"), progress: Callable[[int, int], None] | None = None) -> str:
    """Turn `synthetic:quickstart` (VP9) or `synthetic:quickstart-h264` into a store's folder; other paths stay.

    Raises:
        ValueError: an unknown synthetic data set.
    """
    if not path.startswith("synthetic:"):
        return path
    specs = {QUICKSTART: SyntheticSpec(), f"{QUICKSTART}-h264": SyntheticSpec(codec="h264")}
    if path not in specs:
        raise ValueError(f"data.path ({path}) must be one of {', '.join(specs)} or the folder of a store")
    return str(ensure_store(root, specs[path], progress))
