"""The score by what is heard, as a picture."""

from __future__ import annotations

import re
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
        axes.set_xticks(range(len(values)), [in_lines(name) for name, _ in values])
        axes.set(xlabel="sound", ylabel=f"{metric} (%)", ylim=(0, 108), title=shown(title))
        axes.set_yticks(range(0, 101, 20))

    draw_picture(path, draw, (8, 4.5))


def in_lines(name: str) -> str:
    """Return a name in lines of a bar's width; a number and its unit stay together."""
    return textwrap.fill(re.sub(r" s$", "\N{NO-BREAK SPACE}s", name), 12)
