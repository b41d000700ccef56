"""One picture a file: frames, the sound's spectrogram, and the scores over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.records.fonts import shown
from experiments.records.media_views import pictures_at, spectrogram
from experiments.records.plots import draw_picture
from experiments.records.predictions import Prediction

FRAMES, COLUMNS, FRAME_PX, LINES = 8, 800, 320, 5
_MINUTES_FROM_S = 180.0


def curves(found: Prediction, top: int = LINES) -> tuple[NDArray[np.float64], list[int], NDArray[np.float32]]:
    """Return the scores of the best classes of a file over time.

    Args:
        found: scored.
        top: classes.

    Returns:
        (M,) times in seconds, the numbers of the classes, best first, and (M, classes) scores.
    """
    order = np.argsort(-found.scores, kind="stable")[: min(top, found.predictable)]
    if found.boxes is None:
        return found.times_s.mean(1), order.tolist(), found.moments[:, order]
    times = np.unique(found.boxes.times_s)
    rows = [found.boxes.scores[found.boxes.times_s == time][:, order].max(0) for time in times]
    return times, order.tolist(), np.stack(rows)


def draw_prediction(found: Prediction, path: Path) -> None:
    """Draw a scored file.

    Args:
        found: with its file.
        path: PNG file, replaced if there.

    Raises:
        MediaError: pictures or sound that cannot be decoded.
    """
    assert found.file is not None
    assert found.is_scored

    def draw(figure: Any) -> None:
        """Fill the figure."""
        grid = figure.add_gridspec(3, 1, height_ratios=(0.8, 1, 1.6))
        _draw_frames(figure, grid, found)
        unit, word = (60.0, "min") if found.duration_s > _MINUTES_FROM_S else (1.0, "s")
        sound = figure.add_subplot(grid[1])
        _draw_sound(sound, found, unit)
        scores = figure.add_subplot(grid[2], sharex=sound)
        _draw_scores(scores, found, unit)
        sound.tick_params(labelbottom=False)
        scores.set(xlabel=f"time ({word})", xlim=(0, found.duration_s / unit))
        names = ", ".join(f"{_label(found, found.class_names.index(n))} {100 * v:.1f} %" for n, v in found.best(3))
        figure.suptitle(f"{shown(found.path.name)}: {names}", fontsize=11)

    draw_picture(path, draw, (12, 7), dpi=100)


def _label(found: Prediction, number: int) -> str:
    return shown(found.class_names[number], number)


def _draw_frames(figure: Any, grid: Any, found: Prediction) -> None:
    """Draw pictures from all over the file, or of key frames with their boxes."""
    assert found.file is not None
    if found.boxes is None:
        times = [(number + 0.5) * found.duration_s / FRAMES for number in range(FRAMES)]
    else:
        keys = np.unique(found.boxes.times_s)
        places = np.unique(np.linspace(0, len(keys) - 1, FRAMES).round().astype(int))
        times = keys[places].tolist()
    row = grid[0].subgridspec(1, max(len(times), FRAMES // 2))
    for number, picture in enumerate(pictures_at(found.file, times, FRAME_PX)):
        axes = figure.add_subplot(row[number])
        axes.imshow(picture)
        axes.set_title(f"{times[number]:.1f} s", fontsize=8)
        axes.set_axis_off()
        if found.boxes is not None:
            _draw_boxes(axes, found, times[number], picture.shape)


def _draw_boxes(axes: Any, found: Prediction, time_s: float, shape: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    assert found.boxes is not None
    for box in np.flatnonzero(found.boxes.times_s == time_s).tolist():
        x1, y1, x2, y2 = found.boxes.corners[box] * np.array([shape[1], shape[0]] * 2)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="yellow", linewidth=1.2))
        (name, value), *_ = found.best_of_box(box, 1)
        text = f"{_label(found, found.class_names.index(name))} {100 * value:.0f}"
        plate = {"facecolor": "yellow", "edgecolor": "none", "pad": 1}
        axes.text(x1, y1, text, fontsize=6, color="black", bbox=plate, va="top", clip_on=True)


def _draw_sound(axes: Any, found: Prediction, unit: float) -> None:
    """Draw the spectrogram."""
    assert found.file is not None
    axes.set(ylabel="frequency (kHz)")
    if not found.file.num_samples:
        axes.set(ylim=(0, 8))
        axes.text(0.5, 0.5, "no sound", transform=axes.transAxes, ha="center", va="center")
        return
    image = axes.imshow(
        spectrogram(found.file, COLUMNS), origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0,
        extent=(0, found.duration_s / unit, 0, 8), interpolation="nearest",
    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.01)


def _draw_scores(axes: Any, found: Prediction, unit: float) -> None:
    """Draw the best classes over time."""
    times, classes, values = curves(found)
    marker = "." if len(times) < 60 else ""
    for number, line in zip(classes, values.T, strict=True):
        axes.plot(times / unit, 100 * line, marker=marker, label=_label(found, number))
    axes.set(ylabel="score (%)", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(classes), frameon=False, borderpad=0)
