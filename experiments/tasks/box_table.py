"""The boxes of a split that is scored, in flat arrays. S samples (key frames), R boxes, L labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.detection_metrics import BoolArray, LabelledBoxes
from experiments.tasks.metrics import FloatArray, IntArray
from pipeline.dataset import SampleTable

#: Corners are compared as they are written to files of detections: the official files have three decimals.
DECIMALS = 6


@dataclass(frozen=True)
class BoxTable:
    """All boxes of a split, sample after sample.

    Args:
        names: S sample names.
        offsets: (S + 1,) int64: sample i has boxes offsets[i] .. offsets[i + 1] - 1.
        corners: (R, 4) float64 x1, y1, x2, y2 in [0, 1].
        label_counts: (R,) int64, 0 = a detector's box, which is to be scored.
        labels: (L,) int64, the labels of box 0, then box 1, ...
    """

    names: tuple[str, ...]
    offsets: IntArray
    corners: FloatArray
    label_counts: IntArray
    labels: IntArray

    @classmethod
    def of(cls, samples: SampleTable) -> BoxTable:
        """Return the boxes of a split; none at all where it has no columns of boxes."""
        names = tuple(samples.id(i) for i in range(len(samples)))
        if samples.box_columns is None:
            none = np.zeros(0, np.int64)
            return cls(names, np.zeros(len(names) + 1, np.int64), np.zeros((0, 4)), none, none)
        boxes, counts, labels, _ = samples.box_columns
        corners = np.asarray(boxes.values, np.float64).reshape(-1, 4).round(DECIMALS)
        as_int = (np.asarray(a, np.int64) for a in (counts.offsets, counts.values, labels.values))
        offsets, label_counts, values = as_int
        return cls(names, offsets, corners, label_counts, values)

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def is_detected(self) -> BoolArray:
        """Which boxes come from a detector, (R,)."""
        return self.label_counts == 0

    @property
    def sample_of(self) -> IntArray:
        """Sample of each box, (R,)."""
        return np.repeat(np.arange(len(self.names)), np.diff(self.offsets))

    def truth(self, samples: BoolArray, classes: BoolArray) -> LabelledBoxes:
        """Return the ground truth of some samples and classes, one entry a box and class.

        Args:
            samples: (S,) which.
            classes: (K,) which.
        """
        box = np.repeat(np.arange(len(self)), self.label_counts)
        image = self.sample_of[box]
        kept = samples[image] & classes[self.labels]
        score = np.ones(int(kept.sum()))
        return LabelledBoxes(image[kept], self.corners[box[kept]], self.labels[kept], score)
