"""Training and validation error of several runs over their epochs: Fig. 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.records.fonts import shown
from experiments.records.plots import draw_picture, points
from experiments.records.spool import SPOOL_NAME, read_metrics


def error_curves(run_dir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return the curves of a run.

    Args:
        run_dir: with metrics.jsonl; an empty or absent one gives no curves.

    Returns:
        "training" and "validation" -> epochs and top-1 errors in percent, both of the evaluations (the training
        samples scored as validation is); for a run without such scores (`eval.train_samples`: 0) "training" is of
        the steps, with dropout and augmentation.
    """
    series = read_metrics(run_dir / SPOOL_NAME)
    steps, epochs = series.get("train/epoch", ([], []))
    known = [step for step, epoch in zip(steps, epochs, strict=True) if epoch > 0]
    if not known:
        return {}
    each = epochs[-1] / steps[-1]  # epochs a step
    found = {}
    training = "train_eval/top1" if "train_eval/top1" in series else "train/top1"  # without: in training mode
    for name, metric in (("training", training), ("validation", "val/top1")):
        if metric in series:
            at, values = series[metric]
            found[name] = ([step * each for step in at], [100 * (1 - value) for value in values])
    return found


def draw_error_curves(runs: Mapping[str, Path], path: Path) -> list[str]:
    """Draw the curves of runs: training dashed, validation solid, one colour a run.

    Args:
        runs: name -> run folder.
        path: PNG file, replaced if there.

    Returns:
        The names of runs without curves.
    """
    found = {name: error_curves(run_dir) for name, run_dir in runs.items()}
    missing = [name for name, curves in found.items() if not curves]

    def draw(figure: Any) -> None:
        """Fill the figure."""
        axes = figure.add_subplot(1, 1, 1)
        for index, (name, curves) in enumerate(found.items()):
            for kind, (epochs, errors) in curves.items():
                style = "--" if kind == "training" else "-"
                own = {"color": f"C{index}", "label": f"{shown(name)}, {kind}", **points(len(epochs), style)}
                axes.plot(epochs, errors, style, **own)
        axes.set(xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, 100))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if len(missing) < len(runs):
            axes.legend(fontsize=8)

    draw_picture(path, draw, (7, 5))
    return missing
