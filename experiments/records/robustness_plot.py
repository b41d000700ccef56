"""The score by what is heard, as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.records.fonts import shown
from experiments.records.plots import draw_picture


def draw_robustness(values: Sequence[tuple[str, float]], metric: str, title: str, path: Path) -> None:
    """Draw a bar a condition.

    Args:
        values: (condition, score in 0..1), the first one with the sound as it is, whose height is drawn as a line.
        metric: its name.
        title: run and split.
        path: PNG file, replaced if there.
    """

    def draw(figure: Any) -> None:
        """Fill the figure."""
        axes = figure.add_subplot()
        shares = [100 * value for _, value in values]
        bars = axes.bar(range(len(values)), shares, color=["tab:blue", *["tab:gray"] * (len(values) - 1)])
        axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2)
        axes.axhline(shares[0], color="tab:blue", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(values)), [textwrap.fill(name, 12) for name, _ in values])
        axes.set(xlabel="sound", ylabel=f"{metric} (%)", ylim=(0, 108), title=shown(title))
        axes.set_yticks(range(0, 101, 20))

    draw_picture(path, draw, (8, 4.5))
