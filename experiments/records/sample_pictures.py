"""Some samples of an evaluation as one picture: frames, sound, true class and best scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from experiments.records.fonts import shown
from experiments.records.plots import draw_picture
from experiments.runtime import Runtime
from pipeline.batch import Batch
from pipeline.clip import PIXEL_MEAN, PIXEL_STD

SAMPLES, FRAMES, TOP = 6, 4, 3


@dataclass(frozen=True)
class ScoredSample:
    """One view of a sample.

    Args:
        name: of the sample.
        frames: (FRAMES, H, W, 3) in 0..1, or None where the model takes no video.
        log_mel: (bins, time), or None where the model takes no sound or the clip has none.
        labels: class ids, none where it is unknown.
        scores: (K,) in 0..1.
    """

    name: str
    frames: NDArray[np.float32] | None
    log_mel: NDArray[np.float32] | None
    labels: tuple[int, ...]
    scores: NDArray[np.float32]


class SampleCollector:
    """Keeps the first view of some samples, spread over a split; called with the batches of an evaluation.

    Args:
        num_samples: of the split.
    """

    def __init__(self, num_samples: int) -> None:
        rows = np.linspace(0, num_samples - 1, SAMPLES).round().astype(int).tolist() if num_samples else []
        self._wanted = set(rows)
        self._kept: dict[int, ScoredSample] = {}  # by row of the split

    @property
    def found(self) -> list[ScoredSample]:
        """What was kept, in the order of the split."""
        return [self._kept[row] for row in sorted(self._kept)]

    def __call__(self, batch: Batch, scores: Tensor) -> None:
        """Take what is wanted of a batch; waits for the device only where something is.

        Args:
            batch: of an evaluation.
            scores: (B, K) in 0..1.
        """
        for i, row in enumerate(batch.sample.tolist()):
            if row in self._wanted:
                self._wanted.remove(row)
                self._kept[row] = _scored(batch, i, scores)

    def gather(self, runtime: Runtime) -> None:
        """Bring to rank 0 what each rank kept of its share of the split; all ranks call it."""
        if runtime.world_size > 1:
            parts: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
            dist.gather_object(self._kept, parts, group=runtime.control)
            for part in parts or ():
                self._kept.update(part)


def _scored(batch: Batch, i: int, scores: Tensor) -> ScoredSample:
    frames = mel = None
    if batch.frames is not None:
        clip = batch.frames[i].float().cpu()  # (3, T, H, W)
        times = np.linspace(0, clip.shape[1] - 1, FRAMES).round().astype(int).tolist()
        frames = (clip[:, times].permute(1, 2, 3, 0) * PIXEL_STD + PIXEL_MEAN).clamp(0, 1).numpy()
    if batch.log_mel is not None and bool(batch.has_audio[i]):
        mel = batch.log_mel[i, 0].float().cpu().numpy().T
    label = batch.labels[i].cpu()
    labels = tuple(label.nonzero().flatten().tolist()) if label.ndim else tuple(x for x in [int(label)] if x >= 0)
    return ScoredSample(batch.ids[i], frames, mel, labels, scores[i].float().cpu().numpy())


def draw_samples(samples: Sequence[ScoredSample], class_names: Sequence[str], path: Path) -> None:
    """Draw samples, a row each: frames, spectrogram, true class and the best scores.

    Args:
        samples: at least one.
        class_names: K names.
        path: PNG file, replaced if there.
    """

    def draw(figure: Any) -> None:
        """Fill the figure."""
        axes = figure.subplots(len(samples), FRAMES + 2, squeeze=False, width_ratios=[1] * FRAMES + [1.4, 2.4])
        for row, sample in zip(axes, samples, strict=True):
            for panel in row:
                panel.set_axis_off()
            for k in range(FRAMES if sample.frames is not None else 0):
                row[k].imshow(sample.frames[k], aspect="equal")  # type: ignore[index]
            if sample.log_mel is not None:
                row[FRAMES].imshow(sample.log_mel, origin="lower", aspect="auto", cmap="magma")
            else:
                row[FRAMES].text(0.5, 0.5, "no sound", ha="center", va="center")
            row[FRAMES + 1].text(0, 0.5, _words(sample, class_names), va="center", fontsize=11)

    draw_picture(path, draw, (12, 1.9 * len(samples)), dpi=90)


def _words(sample: ScoredSample, class_names: Sequence[str]) -> str:
    true = ", ".join(shown(class_names[k], k) for k in sample.labels[:TOP]) or "unknown"
    best = np.argsort(-sample.scores, kind="stable")[:TOP]
    scores = "\n".join(f"{100 * sample.scores[k]:5.1f} %  {shown(class_names[k], int(k))}" for k in best)
    return f"{shown(sample.name[-40:])}\ntrue: {true}\n{scores}"
