"""Two groups of runs compared: the mean of each, their paired difference with its 95 % interval, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Student's t, 97.5 %, by degrees of freedom (pairs - 1).
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class Gap:
    """The difference second - first of two groups over their pairs, in points (percent of the metric).

    Args:
        names: of the two groups.
        values: of each, one a pair.
        mean: of the differences.
        margin: half of the 95 % interval of the mean, by Student's t.
    """

    names: tuple[str, str]
    values: tuple[tuple[float, ...], tuple[float, ...]]
    mean: float
    margin: float

    def lines(self, metric: str) -> list[str]:
        """Return the result in words.

        Args:
            metric: that was compared.
        """
        groups = [
            f"{name}: {metric} {statistics.fmean(values):.1f} % on average of {', '.join(f'{v:.1f}' for v in values)}"
            for name, values in zip(self.names, self.values, strict=True)
        ]
        low, high = self.mean - self.margin, self.mean + self.margin
        gap = f"{self.names[1]} - {self.names[0]}: {self.mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
        return [*groups, f"{gap} ({len(self.values[0])} pairs)"]


def paired_gap(names: tuple[str, str], first: Sequence[float], second: Sequence[float]) -> Gap:
    """Return the gap between paired values in percent.

    Args:
        names: of the two groups.
        first, second: values, pair by pair.

    Raises:
        ValueError: the groups are not of one length of 2 to 11.
    """
    if len(first) != len(second) or len(first) - 1 not in _T:
        raise ValueError(
            f"groups {names[0]!r} ({len(first)} runs) and {names[1]!r} ({len(second)}) must have equally many finished "
            f"runs, 2 to {len(_T) + 1}; finish the sweep, or give it as many rows of each"
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    margin = _T[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return Gap(names, (tuple(first), tuple(second)), statistics.fmean(differences), margin)


def draw_gap(gap: Gap, metric: str, path: Path) -> None:
    """Draw both groups, a line a pair, and the gap with its interval.

    Args:
        gap: of two groups.
        metric: that was compared.
        path: PNG file, replaced if there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for pair in zip(*gap.values, strict=True):
        left.plot((0, 1), pair, "o-", color="C0", alpha=0.6)
    left.plot((0, 1), [statistics.fmean(values) for values in gap.values], "s", color="C3", label="mean")
    left.set(xticks=(0, 1), xticklabels=gap.names, xlim=(-0.3, 1.3), ylabel=f"{metric} (%)")
    left.legend(fontsize=8)
    right.errorbar([0], [gap.mean], [[gap.margin], [gap.margin]], fmt="s", color="C3", capsize=6)
    right.axhline(0, color="0.6", lw=1)
    right.set(xticks=(), xlim=(-1, 1), ylabel="gap, points (95 % interval)")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
