"""Results to read: tables, a CSV file, pictures. Pictures are drawn without a display."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.spool import read_metrics
from experiments.tasks import Report
from experiments.tasks.metrics import IntArray
from pipeline.store.durable import write_file

_ALWAYS = ("manifest", "scored")
_COUNT_WORDS = {
    "quarantined": "unreadable",
    "partly_read": "read in part",
    "silent": "without sound",
    "unlabelled": "without a label",
}
_MAX_TICK_LABELS = 40


def counts_line(counts: Mapping[str, int]) -> str:
    """Return the counts of an evaluation in words; what is 0 is left out, but for what was scored.

    Args:
        counts: by the names that report.json has.
    """
    scored = f"{counts['scored']} of " if "scored" in counts else ""
    shown = [f"{scored}{counts.get('manifest', 0)} samples{' scored' if scored else ''}"]
    words = {name: _COUNT_WORDS.get(name, name.replace("_", " ")) for name in counts}
    shown += [f"{n} {words[name]}" for name, n in counts.items() if n and name not in _ALWAYS]
    return ", ".join(shown)


def result_lines(report: Report, rows: int = 10) -> list[str]:
    """Return the lines that the command line prints: metrics, counts, notes and the weakest classes.

    Args:
        report: of an evaluation.
        rows: classes to show.
    """
    lines = ["  ".join(f"{name} {100 * value:.2f} %" for name, value in report.metrics.items())]
    lines.append(counts_line(report.counts))
    lines += [f"note: {note}" for note in report.notes]
    if report.table:
        value = len(report.header) - 1 if report.primary == "mean_ap" else 2
        ordered = sorted(report.table, key=lambda row: (row[value] == "nan", row[value]))
        shown = [report.header, *ordered[:rows]]
        widths = [max(len(row[i]) for row in shown) for i in range(len(report.header))]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in shown
        ]
        if len(ordered) > rows:
            lines.append(f"... and {len(ordered) - rows} more classes, weakest first; all are in per_class.csv")
    return lines


def write_table(report: Report, path: Path) -> None:
    """Write the per-class table as CSV.

    Args:
        report: of an evaluation.
        path: file, replaced if there.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([report.header, *report.table])
    write_file(path, buffer.getvalue())


def draw_confusion(counts: IntArray, names: tuple[str, ...], path: Path) -> None:
    """Draw a confusion matrix, each row as shares of its true class.

    Args:
        counts: (K, K), rows are true classes.
        names: K.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = float(np.clip(len(names) * 0.3, 4, 20))
    figure = Figure(figsize=(size + 1.5, size))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(names) <= _MAX_TICK_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    _put_picture(figure, path, dpi=120, bbox_inches="tight")


def draw_per_class(report: Report, path: Path) -> None:
    """Draw the average precision of every class, the best first (the form of figure A.1).

    Args:
        report: of an evaluation whose table ends with the average precision, nan = no ground truth.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [(row[0], float(row[-1])) for row in report.table if row[-1] != "nan"]
    known.sort(key=lambda item: -item[1])
    figure = Figure(figsize=(float(np.clip(len(known) * 0.25, 4, 22)), 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(known)), [100 * value for _, value in known], color="tab:blue")
    axes.set_xticks(range(len(known)), [name for name, _ in known], rotation=90, fontsize=7)
    axes.set(ylabel="average precision (%)", ylim=(0, 100), title=f"mean {100 * report.metrics['mean_ap']:.2f} %")
    axes.grid(alpha=0.3, axis="y")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_curves(spool: Path, path: Path) -> None:
    """Draw loss, learning rate, accuracy and data wait of a run over its steps.

    Args:
        spool: metrics.jsonl.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(spool)
    panels = {
        "loss": [n for n in series if n in ("train/loss", "train/sync_loss")],
        "learning rate": ["train/learning_rate"],
        "accuracy": [n for n in series if n.split("/")[-1] in ("top1", "top5", "mean_ap")],
        "share of time waiting for data": ["train/data_wait_share"],
    }
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(2, 2, index + 1)
        drawn = [n for n in names if n in series]
        for name in drawn:
            axes.plot(*series[name], marker="." if len(series[name][0]) < 50 else "", label=name)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(drawn) > 1:
            axes.legend(fontsize=7)
    _put_picture(figure, path, dpi=110)


def _put_picture(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getbuffer())
