"""What a model says of a file: whole, over time, or of persons in boxes. K classes, M moments, R boxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.folder.describe import PlainFile

Named = tuple[tuple[str, float], ...]


def _empty(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@dataclass(frozen=True)
class BoxPredictions:
    """Scores of the boxes of a file.

    Args:
        times_s: (R,) float64 moment of each box.
        corners: (R, 4) float32 x1, y1, x2, y2 in [0, 1].
        scores: (R, K) float32 in 0..1.
    """

    times_s: NDArray[np.float64]
    corners: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """Result for one file.

    Args:
        path: the file.
        class_names: K names.
        scores: (K,) float64 in 0..1, as the evaluation of the task has them; empty where there is none. Of boxes the
            largest of each class.
        predictable: how many of the best classes mean anything (`eval.class_subset` leaves the others out).
        views: how many views were scored.
        has_audio: whether any of them had sound.
        problem: why there is no score, or why parts of the file have none; empty where all is well.
        duration_s: of the file.
        times_s: (M, 2) float64 start and end of each moment.
        moments: (M, K) float32 scores of each moment.
        heard: (M,) bool, whether a moment had sound.
        boxes: of a detection, else None.
        file: what is known of the file; None for one that cannot be used.
        takes_sound: whether the model has an audio pathway.
    """

    path: Path
    class_names: tuple[str, ...] = ()
    scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    predictable: int = 0
    views: int = 0
    has_audio: bool = False
    problem: str = ""
    duration_s: float = 0.0
    times_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    moments: NDArray[np.float32] = field(default_factory=lambda: _empty(0, 0))
    heard: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    boxes: BoxPredictions | None = None
    file: PlainFile | None = None
    takes_sound: bool = True

    @property
    def is_scored(self) -> bool:
        """Whether there are scores."""
        return len(self.scores) > 0

    def best(self, top: int = 5) -> Named:
        """Return the `top` best classes of the whole file with their scores, best first."""
        return self._best(self.scores, top)

    def best_of_moment(self, moment: int, top: int = 5) -> Named:
        """Return the `top` best classes of a moment, best first."""
        return self._best(self.moments[moment], top)

    def best_of_box(self, box: int, top: int = 3) -> Named:
        """Return the `top` best classes of a box, best first."""
        assert self.boxes is not None
        return self._best(self.boxes.scores[box], top)

    def _best(self, scores: NDArray[np.float64] | NDArray[np.float32], top: int) -> Named:
        order = np.argsort(-scores, kind="stable")[: min(top, self.predictable)]
        return tuple((self.class_names[k], float(scores[k])) for k in order.tolist())

    def stretches(self) -> list[tuple[float, float, str, float]]:
        """Return (start_s, end_s, best class, its mean score) of neighbouring moments with the same best class."""
        found: list[tuple[float, float, str, float]] = []
        sizes: list[int] = []
        for (start_s, end_s), scores in zip(self.times_s.tolist(), self.moments, strict=True):
            best = int(np.argmax(scores))
            name, value = self.class_names[best], float(scores[best])
            if found and found[-1][2] == name:
                size = sizes[-1]
                mean = (found[-1][3] * size + value) / (size + 1)
                found[-1], sizes[-1] = (found[-1][0], max(found[-1][1], end_s), name, mean), size + 1
            else:
                found.append((start_s, end_s, name, value))
                sizes.append(1)
        return found
