"""Training and validation error of several runs over their epochs: Fig. 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.records.spool import SPOOL_NAME, read_metrics


def error_curves(run_dir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return the curves of a run.

    Args:
        run_dir: with metrics.jsonl; an empty or absent one gives no curves.

    Returns:
        "training" and "validation" -> epochs and top-1 errors in percent, of the report steps.
    """
    series = read_metrics(run_dir / SPOOL_NAME)
    steps, epochs = series.get("train/epoch", ([], []))
    known = [step for step, epoch in zip(steps, epochs, strict=True) if epoch > 0]
    if not known:
        return {}
    each = epochs[-1] / steps[-1]  # epochs a step
    found = {}
    for name, metric in (("training", "train/top1"), ("validation", "val/top1")):
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, missing = figure.add_subplot(1, 1, 1), []
    for index, (name, run_dir) in enumerate(runs.items()):
        curves = error_curves(run_dir)
        if not curves:
            missing.append(name)
        for kind, (epochs, errors) in curves.items():
            style = "--" if kind == "training" else "-"
            axes.plot(epochs, errors, style, color=f"C{index}", label=f"{name}, {kind}")
    axes.set(xlabel="epoch", ylabel="top-1 error (%)")
    axes.grid(alpha=0.3)
    if len(missing) < len(runs):
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return missing
