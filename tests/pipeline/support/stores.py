"""Small stores with known contents for the tests of plan, graph and loader."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.reader import Store, StoreSplit
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter


def numbered_frames(count: int, width: int = 96, height: int = 64) -> list[NDArray[np.uint8]]:
    """Frames whose number can be read back: eight vertical bars are the bits of the frame number, over a soft ramp."""
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), 128, np.uint8)
        for bit in range(8):
            level = 220 if number >> bit & 1 else 30
            frame[:, bit * width // 8 : (bit + 1) * width // 8] = level
        frames.append(frame)
    return frames


def read_number(frame: NDArray[np.float64]) -> int:
    """Number of a frame of `numbered_frames`, (H, W, 3) with values 0..255."""
    width = frame.shape[1]
    middles = [frame[:, (2 * bit + 1) * width // 16].mean() for bit in range(8)]
    return sum((level > 125) << bit for bit, level in enumerate(middles))


def cut_of(video: FragmentedVideo, first: int, last: int) -> tuple[bytes, int]:
    """Bytes that decode to a range that covers the frames `first..last`, and the number of its first frame."""
    begin, end = (max(i for i, start in enumerate(video.first_frames) if start <= frame) for frame in (first, last))
    return video.init + b"".join(video.fragments[begin : end + 1]), video.first_frames[begin]


def write_store(
    path: Path,
    media: Iterable[tuple[str, list[NDArray[np.uint8]], NDArray[np.int16] | None]],
    *,
    fps: Fraction = Fraction(30),
    codec: str = "vp9",
    gop: int = 12,
    quality: int = 24,
    labels: list[int] | None = None,
    sources: list[str] | None = None,
) -> StoreSplit:
    """Write a store with one sample a medium in split "train" and return the split."""
    with StoreWriter(
        path, video_codec=codec, gop=gop, short_side_px=64, dataset="test", classes={"action": ["a", "b", "c", "d"]}
    ) as writer:
        rows = []
        for number, (name, frames, audio) in enumerate(media):
            height, width = frames[0].shape[:2]
            video = encode_fragments(frames, fps=fps, width=width, height=height, codec=codec, gop=gop, quality=quality)
            reference = writer.add_video(video)
            sound = None if audio is None else writer.add_audio(audio)
            source = sources[number] if sources else name
            row = writer.add_media(name, reference, sound, source=source)
            label = labels[number] if labels else number % 4
            rows.append(SampleRow(name, row, 0.0, float(len(frames) / fps), {"action": (label,)}))
        writer.add_samples("train", rows)
        writer.add_samples("val", rows)
    return Store.open(path).split("train")


def noise(seconds: float, seed: int = 0) -> NDArray[np.int16]:
    """White noise, 16 kHz."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=int(seconds * 16_000)) * 3000).clip(-32768, 32767).astype(np.int16)
