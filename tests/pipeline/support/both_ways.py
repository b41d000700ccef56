"""What a store and a plain folder each make of one file: frames, rate, and when flashes are seen and clicks heard."""

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.folder.describe import describe
from pipeline.folder.read import read_planes
from pipeline.folder.sound import read_samples
from pipeline.ingest.item import Item, TranscodeSettings
from pipeline.ingest.transcode import transcode
from pipeline.media.probe import RefusedError
from tests.pipeline.support import media_zoo as zoo

SAMPLE_S = 1 / 16_000


@dataclass(frozen=True)
class Seen:
    """What a reader gets of a file, times in seconds from its first frame."""

    frames: int
    fps: Fraction
    flashes: list[float]
    clicks: list[float]


def from_store(path: Path, settings: TranscodeSettings | None = None) -> tuple[Item, Seen]:
    """Ingest a file; all zero if it was refused."""
    out = path.with_name(f"{path.name}.payload")
    item = transcode(path, out, settings or TranscodeSettings())
    if item.refused:
        return item, Seen(0, Fraction(0), [], [])
    data = out.read_bytes()
    with av.open(io.BytesIO(data[: item.mp4_bytes])) as container:
        luma = [float(frame.to_ndarray()[: frame.height].mean()) for frame in container.decode(video=0)]
    assert len(luma) == item.num_frames
    sound = np.frombuffer(data, "<i2", item.num_samples, item.mp4_bytes)
    return item, _seen(luma, Fraction(item.fps_num, item.fps_den), sound)


def from_folder(path: Path) -> Seen:
    """Read a file as a folder of plain videos reads it."""
    file = describe(path)
    luma, _ = read_planes(file, np.arange(file.num_frames))
    sound = read_samples(file, 0, file.num_samples) if file.num_samples else np.zeros(0, np.int16)
    return _seen([float(plane.mean()) for plane in luma], file.fps, sound)


def _seen(luma: list[float], fps: Fraction, sound: np.ndarray) -> Seen:
    times = [float(number / fps) for number in range(len(luma))]
    return Seen(len(luma), fps, zoo.bright_at(luma, times), zoo.loud_at(sound, 16_000))


def check_both(
    path: Path,
    *,
    frames: int = 75,
    fps: Fraction | int = 25,
    flashes: tuple[float, ...] | None = zoo.FLASHES_S,
    clicks: tuple[float, ...] = zoo.FLASHES_S,
    within_s: float = 0.0005,
    clicks_within_s: float = 0.0005,
) -> Item:
    """Check that both ways give these frames, this rate, and flashes and clicks at these times; returns the item.

    Args:
        within_s: half a frame where the source's times are not on the grid. flashes: None is not looked at.
    """
    item, store = from_store(path)
    assert not item.refused
    for seen in (store, from_folder(path)):
        assert (seen.frames, seen.fps) == (frames, fps)
        if flashes is not None:
            assert seen.flashes == pytest.approx(flashes, abs=within_s)
        assert seen.clicks == pytest.approx(clicks, abs=clicks_within_s)
    return item


def check_refused(path: Path, words: str) -> None:
    """Check that both ways refuse a file with these words (a pattern)."""
    item, _ = from_store(path)
    with pytest.raises(RefusedError, match=words):
        describe(path)
    with pytest.raises(RefusedError, match=words):
        raise RefusedError(item.refused)
