"""Predictions as JSON and CSV, written as they come, and as lines for a terminal."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from experiments.records.predictions import Prediction
from experiments.records.sealed import strict_json
from pipeline.ingest.target import unwritable_parent

COLUMNS = ("file", "start_s", "end_s", "x1", "y1", "x2", "y2", "rank", "class", "score", "problem")
MOST_STRETCHES = 20
log = logging.getLogger(__name__)


class PredictionFileError(ValueError):
    """A place to which predictions cannot be written."""


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """Check, before anything is scored, that a file (or what goes into a folder) can be written.

    Raises:
        PredictionFileError: with the option that names it.
    """
    kind = "a folder" if folder else "a file"
    if path.exists() and path.is_dir() != folder:
        raise PredictionFileError(f"{option} ({path}) must be {kind}; choose another one")
    if parent := unwritable_parent(path / "x" if folder else path):
        raise PredictionFileError(f"{option} ({path}) must be {kind} below a writable folder, {parent} is not")


class _Growing:
    """A file that grows under another name, and gets its own when it is closed, however that comes about."""

    def __init__(self, path: Path) -> None:
        self.path, self._partial = path, path.with_name(f".{path.name}.partial")
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = self._partial.open("w", encoding="utf-8", newline="")

    def write(self, text: str) -> None:
        """Append, so that it is there after a crash."""
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Give the file its name."""
        self._file.close()
        self._partial.replace(self.path)


class JsonPredictions:
    """A JSON file: what scored, and an entry a file; `complete` is false where the work was cut short.

    Args:
        path: replaced if there.
        header: what the file says before the predictions.
        top: classes to name.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], top: int) -> None:
        self._out, self._top, self._count = _Growing(path), top, 0
        self._out.write(strict_json(dict(header)).rstrip().removesuffix("}").rstrip() + ',\n "files": [')

    def __enter__(self) -> JsonPredictions:
        return self

    def add(self, found: Prediction) -> None:
        """Write one prediction."""
        self._out.write(("," if self._count else "") + "\n  " + json.dumps(entry(found, self._top), allow_nan=False))
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.write(f'\n ],\n "complete": {json.dumps(kind is None)}\n}}\n')
        self._out.close()


class CsvPredictions:
    """A CSV file: for each file its best classes (start_s and end_s empty), then those of every moment or box.

    Args:
        path: replaced if there.
        top: classes to name.
    """

    def __init__(self, path: Path, top: int) -> None:
        self._out, self._top = _Growing(path), top
        self._rows([COLUMNS])

    def __enter__(self) -> CsvPredictions:
        return self

    def add(self, found: Prediction) -> None:
        """Write one prediction."""
        name = str(found.path)
        if not found.is_scored:
            self._rows([[name, *[""] * 9, found.problem]])
            return
        nowhere = [""] * 4
        rows = [[name, "", "", *nowhere, *ranked, found.problem] for ranked in _ranked(found.best(self._top))]
        for moment, (start_s, end_s) in enumerate(found.times_s.tolist()):
            best = _ranked(found.best_of_moment(moment, self._top))
            rows += [[name, f"{start_s:.3f}", f"{end_s:.3f}", *nowhere, *ranked, ""] for ranked in best]
        if found.boxes is not None:
            for box, time_s in enumerate(found.boxes.times_s.tolist()):
                place = [f"{value:.4f}" for value in found.boxes.corners[box].tolist()]
                best = _ranked(found.best_of_box(box, self._top))
                rows += [[name, f"{time_s:.3f}", f"{time_s:.3f}", *place, *ranked, ""] for ranked in best]
        self._rows(rows)

    def _rows(self, rows: Any) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(rows)
        self._out.write(buffer.getvalue())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()


def _ranked(best: tuple[tuple[str, float], ...]) -> list[list[str]]:
    return [[str(rank), name, f"{score:.6f}"] for rank, (name, score) in enumerate(best, 1)]


def entry(found: Prediction, top: int) -> dict[str, Any]:
    """Return a prediction as JSON has it.

    Args:
        found: of one file.
        top: classes to name.
    """
    facts: dict[str, Any] = {"file": str(found.path), "problem": found.problem}
    if not found.is_scored:
        return facts
    heard = found.has_audio if found.takes_sound else None
    facts |= {"duration_s": round(found.duration_s, 3), "views": found.views, "with_sound": heard}
    facts["best"] = _named(found.best(top))
    if found.boxes is None:
        facts["over_time"] = [
            {"start_s": round(start_s, 3), "end_s": round(end_s, 3), "with_sound": bool(found.heard[moment]),
             "best": _named(found.best_of_moment(moment, top))}
            for moment, (start_s, end_s) in enumerate(found.times_s.tolist())
        ]  # fmt: skip
    else:
        facts["boxes"] = [
            {"time_s": round(time_s, 3), "corners": [round(v, 4) for v in found.boxes.corners[box].tolist()],
             "best": _named(found.best_of_box(box, top))}
            for box, time_s in enumerate(found.boxes.times_s.tolist())
        ]  # fmt: skip
    return facts


def _named(best: tuple[tuple[str, float], ...]) -> list[dict[str, Any]]:
    return [{"class": name, "score": round(score, 6)} for name, score in best]


def clock(seconds: float) -> str:
    """Return a time in a file as 0:07 or 1:02:07."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def lines_of(found: Prediction, top: int, *, over_time: bool) -> list[str]:
    """Return the lines to print about a file.

    Args:
        found: of one file.
        top: classes to name.
        over_time: also which class is best when.
    """
    if not found.is_scored:
        return [f"{found.path}: not scored: {found.problem}"]
    best = found.best(top)
    width = max(len(name) for name, _ in best)
    count = f"{len(found.boxes.times_s)} boxes, " if found.boxes is not None else ""
    sound = "with sound" if found.has_audio else "without sound" if found.takes_sound else "sound not used"
    lines = [f"{found.path}: {count}{found.views} views, {sound}"]
    lines += [f"  {name.ljust(width)}  {100 * value:6.2f} %" for name, value in best]
    if found.problem:
        lines.append(f"  {found.problem}")
    stretches = found.stretches() if over_time else []
    for start_s, end_s, name, value in stretches[:MOST_STRETCHES]:
        lines.append(f"  {clock(start_s):>7} to {clock(end_s):<7}  {name.ljust(width)}  {100 * value:6.2f} %")
    if len(stretches) > MOST_STRETCHES:
        lines.append(f"  ... and {len(stretches) - MOST_STRETCHES} more stretches; --json and --csv have every moment")
    return lines
