"""The gain of one model over another, class by class: table and picture (Fig. A.1, section A.3)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.fonts import shown
from experiments.records.plots import draw_picture
from experiments.records.score_files import ScoreFile, ScoreFileError
from experiments.tasks.combining import ClassGain
from experiments.tasks.metrics import average_precision, per_class_table

HEADER = ("class", "samples", "base", "ours", "gain", "ratio")
HIGHLIGHTED = 5  # classes with the largest absolute, and with the largest relative gain (Fig. A.1)
_VALUES = ("average_precision", "top1")  # columns of a per_class.csv
Values = dict[str, tuple[int, float]]


def class_values(file: ScoreFile) -> Values:
    """Return class -> samples (multilabel: positives) and top-1 (average precision) of a score file."""
    if file.labels.ndim == 1:
        known = file.labels >= 0
        rows = per_class_table(file.scores[known], file.labels[known].astype(np.int64), file.class_names)
        return {row.name: (row.samples, row.top1) for row in rows}
    positives = file.labels > 0.5
    return {
        name: (int(positives[:, k].sum()), average_precision(file.scores[:, k], positives[:, k]))
        for k, name in enumerate(file.class_names)
    }


def read_class_values(path: Path) -> Values:
    """Read the per-class table of a report (per_class.csv), of AVA's too.

    Raises:
        ScoreFileError: no such file, or no such table.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ScoreFileError(f"table ({path}) must be a per_class.csv of a report: {error}") from error
    header = rows[0] if rows else []
    column = next((header.index(name) for name in _VALUES if name in header), 0)
    try:
        if not column:
            raise ValueError(f"its columns are {', '.join(header) or 'none'}")
        return {row[0]: (int(row[1]), float(row[column])) for row in rows[1:]}
    except (ValueError, IndexError) as error:
        raise ScoreFileError(f"table ({path}) must be a per_class.csv of a report ({error})") from error


def gain_table(gains: Sequence[ClassGain]) -> str:
    """Return the gains as CSV, in their order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    for row in gains:
        numbers = (row.base, row.ours, row.gain, row.ratio)
        writer.writerow([row.name, row.samples, *(f"{value:.4f}" for value in numbers)])
    return buffer.getvalue()


def highlights(gains: Sequence[ClassGain]) -> tuple[list[str], list[str]]:
    """Return the `HIGHLIGHTED` classes of the largest absolute gains, and of the largest relative ones, best first.

    Args:
        gains: any order; only gains above 0, and finite ratios, count.
    """
    gaining = [row for row in gains if row.gain > 0]
    absolute = sorted(gaining, key=lambda row: (-row.gain, row.name))
    relative = sorted((r for r in gaining if np.isfinite(r.ratio)), key=lambda row: (-row.ratio, row.name))
    return [row.name for row in absolute[:HIGHLIGHTED]], [row.name for row in relative[:HIGHLIGHTED]]


def draw_gains(gains: Sequence[ClassGain], path: Path, base: str, ours: str) -> None:
    """Draw both models' values of every class, largest base value first, the highlights bold and orange.

    Args:
        gains: not empty. path: PNG file. base, ours: names of the models.
    """
    rows = sorted(gains, key=lambda row: (-row.base, row.name))
    numbers = {row.name: number for number, row in enumerate(gains)}  # rows of the table
    names = [(row.name, numbers[row.name]) for row in rows]
    draw_picture(
        path, lambda figure: _draw(figure, rows, names, base, ours), (max(6.0, 0.22 * len(rows) + 2), 5), dpi=120
    )


def _draw(figure: Any, rows: Sequence[ClassGain], names: Sequence[tuple[str, int]], base: str, ours: str) -> None:
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    axes.bar(places - 0.2, [100 * row.base for row in rows], 0.4, label=shown(base), color="tab:gray")
    axes.bar(places + 0.2, [100 * row.ours for row in rows], 0.4, label=shown(ours), color="tab:blue")
    axes.set_xticks(places, [shown(name, number) for name, number in names], rotation=90, fontsize=6)
    axes.set(xlabel="class", ylabel="score of the class (%)", xlim=(-1, len(rows)), ylim=(0, 100))
    absolute, relative = highlights(rows)
    for label, row in zip(axes.get_xticklabels(), rows, strict=True):
        if row.name in absolute:
            label.set_fontweight("bold")
        if row.name in relative:
            label.set_color("tab:orange")
    axes.legend(fontsize=7, title="bold: largest absolute gains, orange: largest relative ones", title_fontsize=6)
