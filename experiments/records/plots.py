"""Pictures of a run: curves, confusion, scores by class. Drawn without a display, in fonts that fit the names."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.records.fonts import in_plot_style, shown
from experiments.records.spool import read_metrics
from experiments.tasks.metrics import IntArray
from pipeline.store.durable import write_file

if TYPE_CHECKING:  # torch comes with it, and commands that draw nothing import this
    from experiments.tasks import Report

MOST_NUMBERED = 30  # classes whose confusions are written as numbers
MOST_PAIRS = 25
STEPS_LABEL = "training steps, with dropout and augmentation"
SCORED_LABEL = "training, scored as validation is"  # eval.train_samples
# Of the scores that are drawn: name -> what it is called beside others in one panel, colour.
_SCORES = {
    "top1": ("", "C1"), "mean_ap": ("", "C1"), "top5": ("top 5", "C2"),
    "rotation_accuracy": ("rotation", "C1"), "sync_accuracy_easy": ("synchronization, easy", "C2"),
    "sync_accuracy_hard": ("synchronization, hard", "C3"),
}  # fmt: skip
Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def draw_picture(path: Path, draw: Callable[[Any], None], size: tuple[float, float], dpi: int = 110) -> None:
    """Write a picture, whole or not at all.

    Args:
        path: PNG file, replaced if there.
        draw: puts everything on a figure of matplotlib; is called again where it needs fonts that were not in use.
        size: width and height, inches.
        dpi: dots an inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def drawn() -> io.BytesIO:
        """Draw the figure; returns the bytes of its PNG."""
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        return buffer

    content = in_plot_style(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getbuffer())


def worst_pairs(counts: IntArray, most: int = MOST_PAIRS) -> list[tuple[int, int, int, float]]:
    """Return (true class, predicted class, samples, share of the true class) of the commonest confusions.

    Args:
        counts: (K, K), rows are true classes.
        most: pairs; ties go by share, then by class.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = np.nonzero(counts * (1 - np.eye(len(counts), dtype=counts.dtype)))
    found = [(int(i), int(j), int(counts[i, j]), float(shares[i, j])) for i, j in zip(rows, columns, strict=True)]
    return sorted(found, key=lambda pair: (-pair[2], -pair[3], pair[0], pair[1]))[:most]


def draw_confusion(counts: IntArray, names: Sequence[str], path: Path, title: str = "") -> None:
    """Draw a confusion matrix, each row as shares of its true class.

    Up to 30 classes the cells hold how many samples they are; beyond, the commonest confusions are listed beside it.

    Args:
        counts: (K, K), rows are true classes.
        names: K.
        path: PNG file.
        title: of the picture, such as the name of the run.
    """
    few = len(names) <= MOST_NUMBERED
    side = float(np.clip(len(names) * 0.42, 4, 13)) if few else 10.0
    pairs = [] if few else worst_pairs(counts)

    def draw(figure: Any) -> None:
        """Fill the figure."""
        axes = figure.add_subplot() if few else figure.add_subplot(1, 2, 1)
        _draw_matrix(figure, axes, counts, names, few=few)
        if not few:
            _draw_pairs(figure.add_subplot(1, 2, 2), pairs, names)
        if title:
            figure.suptitle(shown(title))

    draw_picture(path, draw, (side + 2.5, side) if few else (2 * side, side))


def _draw_matrix(figure: Any, axes: Any, counts: IntArray, names: Sequence[str], *, few: bool) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if not few:
        axes.set(xlabel="predicted class (number)", ylabel="true class (number)")
        return
    drawn = [shown(name, number) for number, name in enumerate(names)]
    axes.set_xticks(range(len(names)), drawn, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), drawn, fontsize=8)
    for i, j in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", fontsize=7, color=colour)


def _draw_pairs(axes: Any, pairs: Sequence[tuple[int, int, int, float]], names: Sequence[str]) -> None:
    places = range(len(pairs))
    texts = [f"{shown(names[i], i)} as {shown(names[j], j)}" for i, j, _, _ in pairs]
    bars = axes.barh(places, [100 * share for *_, share in pairs], color="tab:red")
    axes.bar_label(bars, [f"{count}" for _, _, count, _ in pairs], padding=2, fontsize=8)
    axes.set_yticks(places, texts, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="share of the true class (%); the number of samples at the bar", xlim=(0, 108))
    axes.set_title("commonest confusions" if pairs else "no confusions", fontsize=10)


def draw_per_class(report: Report, path: Path, title: str = "") -> None:
    """Draw the average precision of every class, the best first (the form of figure A.1).

    Args:
        report: of an evaluation whose table ends with the average precision, nan = no ground truth.
        path: PNG file.
        title: of the picture, such as the name of the run.
    """
    numbers = {row[0]: number for number, row in enumerate(report.table)}
    known = [(row[0], float(row[-1])) for row in report.table if row[-1] != "nan"]
    known.sort(key=lambda item: -item[1])

    def draw(figure: Any) -> None:
        """Fill the figure."""
        axes = figure.add_subplot()
        axes.bar(range(len(known)), [100 * value for _, value in known], color="tab:blue")
        axes.set_xticks(range(len(known)), [shown(name, numbers[name]) for name, _ in known], rotation=90, fontsize=7)
        start = f"{shown(title)}: " if title else ""
        axes.set(xlabel="class", ylabel="average precision (%)", ylim=(0, 100))
        axes.set_title(f"{start}mean {100 * report.metrics['mean_ap']:.2f} %")
        axes.grid(alpha=0.3, axis="y")

    draw_picture(path, draw, (float(np.clip(len(known) * 0.25, 5, 22)), 5), dpi=120)


class _Line(NamedTuple):
    """One curve: metric, label, colour, style of the line."""

    metric: str
    label: str
    colour: str
    style: str = "-"


def points(count: int, style: str) -> dict[str, Any]:
    """Return how the points of a curve are marked: hollow on a dashed one, which is told from a solid one by that alone
    where there is one point; not at all where there are many.

    Args:
        count: of points. style: of the line.
    """
    if count >= 50:
        return {"marker": ""}
    return {"marker": "o", "markersize": 4, "markerfacecolor": "white"} if style == "--" else {"marker": "."}


def _losses(series: Series) -> list[_Line]:
    """The losses: of both splits in evaluation mode, and of the steps."""
    return [
        _Line("train/loss", STEPS_LABEL, "C0" if "train_eval/loss" not in series else "0.75"),
        _Line("train/sync_loss", "training steps, synchronization alone", "C2"),
        _Line("train_eval/loss", SCORED_LABEL, "C1", "--"),
        _Line("val/loss", "validation", "C1"),
    ]


def _scores(series: Series) -> list[_Line]:
    """The accuracies: each of both splits, and top-1 of the steps where the training split is not scored."""
    lines = [] if "train_eval/top1" in series else [_Line("train/top1", STEPS_LABEL, "C0")]
    for name, (words, colour) in _SCORES.items():
        behind = f": {words}" if words else ""
        if name != "top5":
            lines.append(_Line(f"train_eval/{name}", SCORED_LABEL + behind, colour, "--"))
        elif min(series.get("val/top5", ([], []))[1], default=1.0) == 1.0:
            continue  # of five classes or fewer it says nothing
        lines.append(_Line(f"val/{name}", "validation" + behind, colour))
    return lines


def draw_curves(spool: Path, path: Path, title: str = "") -> None:
    """Draw loss, learning rate, accuracy and data wait of a run over its steps.

    Args:
        spool: metrics.jsonl.
        path: PNG file.
        title: of the picture, such as the name of the run.
    """
    series = read_metrics(spool)
    panels: list[tuple[str, float, list[_Line]]] = [
        ("loss", 1.0, _losses(series)),
        ("learning rate", 1.0, [_Line("train/learning_rate", "", "C0")]),
        ("accuracy (%)", 100.0, _scores(series)),
        ("share of time waiting for data (%)", 100.0, [_Line("train/data_wait_share", "", "C0")]),
    ]

    def draw(figure: Any) -> None:
        """Fill the figure."""
        for index, (label, scale, lines) in enumerate(panels):
            axes = figure.add_subplot(2, 2, index + 1)
            drawn = [line for line in lines if line.metric in series]
            for line in drawn:
                steps, values = series[line.metric]
                own = {"color": line.colour, "linestyle": line.style, "label": line.label}
                axes.plot(steps, [scale * v for v in values], **own, **points(len(steps), line.style))
            axes.set(xlabel="step", ylabel=label)
            axes.set_ylim(bottom=0, top=102 if scale == 100 else None)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            if len(drawn) > 1:
                axes.legend(fontsize=7, framealpha=0.6)
        if title:
            figure.suptitle(shown(title))

    draw_picture(path, draw, (10, 7))
