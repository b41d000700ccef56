"""A file of persons' boxes for a prediction: rows of AVA's form, as a detector writes them.

A row is: video, second, x1, y1, x2, y2 in [0, 1], and if there are more columns, action (not looked at) and score.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.folder.moments import KeyFrame

_LEAST_COLUMNS, _SCORE_COLUMN = 6, 7


class BoxesFileError(ValueError):
    """A file that is no list of boxes."""


@dataclass(frozen=True)
class FileBoxes:
    """Boxes by name of the video.

    Args:
        path: of the file.
        rows: name of a video (with or without its suffix) -> (second, x1, y1, x2, y2, score), by second.
    """

    path: Path
    rows: dict[str, list[tuple[float, ...]]]

    def of(self, file: Path) -> list[tuple[float, ...]]:
        """Return the rows of a video file."""
        return [*self.rows.get(file.stem, ()), *(self.rows.get(file.name, ()) if file.name != file.stem else ())]

    def key_frames(self, files: Sequence[Path], durations_s: Sequence[float]) -> list[KeyFrame]:
        """Return the key frames of video files that lie inside them, in their order."""
        found = []
        for media, (file, duration_s) in enumerate(zip(files, durations_s, strict=True)):
            rows = [row for row in self.of(file) if row[0] <= duration_s]
            for time_s in sorted({row[0] for row in rows}):
                own = np.array([row[1:] for row in rows if row[0] == time_s], np.float32)
                found.append(KeyFrame(media, time_s, own[:, :4], own[:, 4]))
        return found

    def problem(self, file: Path, duration_s: float) -> str:
        """Return what is wrong with the boxes of a video file; empty where nothing is."""
        rows = self.of(file)
        if not rows:
            return f"{self.path} must have boxes of it, in rows that begin with {file.stem}; add them"
        late = [row[0] for row in rows if row[0] > duration_s]
        if not late:
            return ""
        return (
            f"{len(late)} of {len(rows)} boxes of {self.path} lie after its end ({min(late):g} s, it has "
            f"{duration_s:.1f} s): seconds must count from the start of the file; correct them"
        )


def read_boxes(path: Path) -> FileBoxes:
    """Read a file of boxes.

    Raises:
        BoxesFileError: not readable, or a row that is none, with its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BoxesFileError(f"--boxes ({path}) must be a readable CSV file: {error}; check the path") from error
    rows: dict[str, list[tuple[float, ...]]] = {}
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        if not row:
            continue
        rows.setdefault(row[0], []).append(_numbers(row, f"{path}:{number}"))
    if not rows:
        raise BoxesFileError(f"--boxes ({path}) must hold at least one row; see docs/predict.md")
    return FileBoxes(path, rows)


def _numbers(row: list[str], where: str) -> tuple[float, ...]:
    try:
        if len(row) < _LEAST_COLUMNS:
            raise ValueError(f"{len(row)} columns")
        second, *corners = (float(value) for value in row[1:_LEAST_COLUMNS])
        score = float(row[_SCORE_COLUMN]) if len(row) > _SCORE_COLUMN and row[_SCORE_COLUMN] else 1.0
    except ValueError as error:
        raise BoxesFileError(
            f"{where}: must be video,second,x1,y1,x2,y2[,action,score], but: {error}; fix it"
        ) from error
    x1, y1, x2, y2 = corners
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and math.isfinite(second) and second >= 0):
        raise BoxesFileError(
            f"{where}: second ({second:g}) must be at least 0, corners ({x1:g}, {y1:g}, {x2:g}, {y2:g}) in 0..1 with "
            "x1 < x2 and y1 < y2; divide pixels by the picture's size"
        )
    return (second, x1, y1, x2, y2, score)
