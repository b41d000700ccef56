"""Maps drawn on frames: where the sound of a clip meets its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.records.fonts import shown
from experiments.records.plots import draw_picture

MOST_FRAMES = 8
Row = tuple[str, NDArray[np.uint8], NDArray[np.float32]]


def draw_attention(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw frames with their maps on them: red is above the mean of the clip's map, blue below.

    Args:
        rows: label, frames (T, H, W, 3), maps (T, h, w); each row has its own scale, whose end stands beside it.
        path: PNG file, replaced if there.
        title: of the picture.
    """
    columns = min(MOST_FRAMES, max(len(frames) for _, frames, _ in rows))

    def draw(figure: Any) -> None:
        """Fill the figure."""
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_of_row, (label, frames, maps) in zip(grid, rows, strict=True):
            above = maps - maps.mean()
            most = float(np.abs(above).max()) or 1.0
            chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
            for axes, number in zip(axes_of_row, chosen.tolist(), strict=True):
                height, width = frames[number].shape[:2]
                axes.imshow(frames[number].mean(-1), cmap="gray", vmin=0, vmax=255)
                image = axes.imshow(
                    above[number], cmap="RdBu_r", vmin=-most, vmax=most, interpolation="bilinear",
                    alpha=0.15 + 0.5 * np.abs(above[number]) / most, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"frame {number}", fontsize=7)
            axes_of_row[0].set_ylabel(shown(label), fontsize=8)
            figure.colorbar(image, ax=list(axes_of_row), format="%.2g", shrink=0.9)
        figure.suptitle(shown(title), fontsize=10)

    draw_picture(path, draw, (1.6 * columns + 1.5, 1.9 * len(rows) + 0.5))
