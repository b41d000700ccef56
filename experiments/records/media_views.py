"""What a person looks at of a video file: single pictures, and the spectrogram of its sound. H W pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.folder.describe import PlainFile
from pipeline.folder.read import read_planes
from pipeline.folder.sound import read_samples

WINDOW, HOP, CHUNK_S = 512, 256, 30
_FLOOR_DB = -80.0
Picture = NDArray[np.uint8]


def picture_size(file: PlainFile, most_px: int, least_px: int = 0) -> tuple[int, int]:
    """Return width and height of a file's pictures, upright and even, the longer side within `least_px`..`most_px`."""
    longer = max(file.display_width, file.display_height)
    scale = min(max(longer, least_px), most_px) / longer
    sides = (max(2, round(side * scale / 2) * 2) for side in (file.display_width, file.display_height))
    width, height = sides
    return width, height


def pictures_at(file: PlainFile, times_s: Sequence[float], most_px: int) -> Iterator[Picture]:
    """Yield the pictures (H, W, 3) that are shown at some times, one by one.

    Args:
        file: of them.
        times_s: rising; those outside the file give its first or last picture.
        most_px: longer side.

    Raises:
        MediaError: a picture that cannot be decoded.
    """
    width, height = picture_size(file, most_px)
    for time_s in times_s:
        number = min(max(int(time_s * float(file.fps) + 1e-6), 0), file.num_frames - 1)
        y, uv = read_planes(file, np.array([number], np.int64))
        both = np.concatenate([y[0, :, :, 0], uv[0].reshape(uv.shape[1], -1)])
        frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(both), format="nv12")
        yield frame.reformat(width, height, format="rgb24").to_ndarray()


def spectrogram(file: PlainFile, columns: int) -> NDArray[np.float32]:
    """Return the power of a file's sound over time, in dB below the loudest value, at least -80.

    Args:
        file: with sound.
        columns: at most so many; fewer where the file has fewer hops. Read half a minute at a time.

    Returns:
        (257, C): frequency 0 to 8 kHz, time 0 to the length of the pictures.

    Raises:
        MediaError: sound that cannot be decoded.
    """
    total = int(file.num_frames / file.fps * SAMPLE_RATE_HZ)
    columns = max(1, min(columns, total // HOP))
    sums, counts = np.zeros((columns, WINDOW // 2 + 1)), np.zeros(columns)
    window = np.hanning(WINDOW)
    chunk = CHUNK_S * SAMPLE_RATE_HZ // HOP * HOP
    for start in range(0, total, chunk):
        samples = read_samples(file, start, min(chunk, total - start) + WINDOW).astype(np.float32) / 32768
        frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP][: chunk // HOP]
        power = np.abs(np.fft.rfft(frames * window)) ** 2
        places = np.minimum((start + HOP * np.arange(len(power))) * columns // total, columns - 1)
        np.add.at(sums, places, power)
        np.add.at(counts, places, 1)
    mean = sums / np.maximum(counts, 1)[:, None]
    loudest = mean.max()
    if loudest <= 0:
        return np.full((WINDOW // 2 + 1, columns), _FLOOR_DB, np.float32)
    decibels: NDArray[np.float32] = (10 * np.log10(np.maximum(mean / loudest, 1e-8))).T.astype(np.float32)
    return decibels
