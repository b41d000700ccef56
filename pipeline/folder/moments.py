"""Samples of plain files for a prediction: a moment every so many seconds, or the key frames of a list of boxes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Ragged, SampleTable
from pipeline.folder.dataset import FolderSplit

MOST_MOMENTS = 1_000_000


@dataclass(frozen=True)
class KeyFrame:
    """Boxes at one moment of a file.

    Args:
        media: number of the file.
        time_s: on the file's time line.
        corners: (R, 4) float32 x1, y1, x2, y2 in [0, 1], R at least 1.
        scores: (R,) float32 of the detector.
    """

    media: int
    time_s: float
    corners: NDArray[np.float32]
    scores: NDArray[np.float32]


def every_moment(split: FolderSplit, every_s: float) -> FolderSplit:
    """Return the same files with a sample for each piece of `every_s` seconds, the last one of a file shorter.

    Args:
        split: files, each one sample.
        every_s: length of a piece, seconds.

    Raises:
        ValueError: pieces without length, or more than a million.
    """
    if not every_s > 0:
        raise ValueError(f"every ({every_s:g}) seconds must be more than 0")
    durations = [split.media.duration_s(i) for i in range(len(split.media))]
    counts = [max(1, int(np.ceil(duration / every_s - 1e-9))) for duration in durations]
    if sum(counts) > MOST_MOMENTS:
        raise ValueError(
            f"every ({every_s:g}) seconds gives {sum(counts)} moments, which must be at most {MOST_MOMENTS}; raise it"
        )
    media = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    start_s = number * every_s
    end_s = np.minimum(start_s + every_s, np.repeat(durations, counts))
    nothing = np.full(len(media), np.nan)
    return _with_samples(split, SampleTable(_names(split, media, start_s), media, start_s, end_s, nothing, {}))


def key_frames(split: FolderSplit, frames: Sequence[KeyFrame]) -> FolderSplit:
    """Return the same files with a sample for each key frame, whose boxes have no labels.

    Args:
        split: files.
        frames: at least one, in the order of files and times.
    """
    media = np.array([frame.media for frame in frames], np.int64)
    times = np.array([frame.time_s for frame in frames], np.float64)
    ends = np.cumsum([0, *(len(frame.corners) for frame in frames)])
    corners = np.concatenate([frame.corners for frame in frames]).astype(np.float32)
    scores = np.concatenate([frame.scores for frame in frames]).astype(np.float32)
    boxes = (
        Ragged(corners.ravel(), 4 * ends),
        Ragged(np.zeros(ends[-1], np.int32), ends),
        Ragged(np.zeros(0, np.int32), np.zeros(len(frames) + 1, np.int64)),
        Ragged(scores, ends),
    )
    table = SampleTable(_names(split, media, times), media, times, times, times, {}, box_columns=boxes)
    return _with_samples(split, table)


def _names(split: FolderSplit, media: NDArray[np.int64], times: NDArray[np.float64]) -> tuple[str, ...]:
    named = zip(media.tolist(), times.tolist(), strict=True)
    return tuple(f"{split.media.id(file)} at {time_s:.3f} s" for file, time_s in named)


def _with_samples(split: FolderSplit, samples: SampleTable) -> FolderSplit:
    changed = copy.copy(split)
    changed.samples = samples
    return changed
