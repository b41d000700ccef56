"""Average precision of boxes by the rules of AVA's official evaluator. D detections, G ground truth, K classes.

A detection is one (box, class) entry of an image with a score. Per image the 50 best entries count. Per class, from the
best score down, a detection is right if the ground-truth box of this class that it overlaps most has an IoU of at least
0.5 with it and no better detection was right about that box before. Average precision is the area under the curve of
precision over recall, after precision was raised to its maximum at any greater recall (the rule of VOC 2010).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.tasks.metrics import FloatArray, IntArray

MIN_IOU = 0.5
MAX_PER_IMAGE = 50
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledBoxes:
    """Boxes with one class each, images in rising order.

    Args:
        image: (D,) int64 number of the image.
        corners: (D, 4) float64 x1, y1, x2, y2.
        label: (D,) int64 class.
        score: (D,) float64 larger is better; not looked at in ground truth.
    """

    image: IntArray
    corners: FloatArray
    label: IntArray
    score: FloatArray

    def __len__(self) -> int:
        return len(self.image)

    def of_class(self, label: int) -> LabelledBoxes:
        """Return those of one class."""
        own = self.label == label
        return LabelledBoxes(self.image[own], self.corners[own], self.label[own], self.score[own])


def best_entries(
    scores: FloatArray, corners: FloatArray, ends: IntArray, classes: IntArray, limit: int = MAX_PER_IMAGE
) -> LabelledBoxes:
    """Return the best entries of every image, from the best down; equal scores in the order of boxes, then of classes.

    Args:
        scores: (R, K) of every box for every class.
        corners: (R, 4) of the boxes, which lie image after image.
        ends: (S,) number of boxes up to and with each image.
        classes: (C,) the classes that count; entries of others take nobody's place.
        limit: entries of an image.
    """
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    images, rows, labels = [], [], []
    for image in np.flatnonzero(ends > starts).tolist():
        first, last = int(starts[image]), int(ends[image])
        best = np.argsort(-scores[first:last, classes], axis=None, kind="stable")[:limit]
        box, index = np.divmod(best, len(classes))
        images.append(np.full(len(best), image, np.int64))
        rows.append(first + box)
        labels.append(classes[index])
    none = [np.zeros(0, np.int64)]
    kept, row, label = (np.concatenate(parts or none) for parts in (images, rows, labels))
    return LabelledBoxes(kept, corners[row], label, scores[row, label].astype(np.float64))


def average_precision_of_boxes(truth: LabelledBoxes, found: LabelledBoxes, num_classes: int) -> FloatArray:
    """Return the average precision of every class, (K,); nan where the ground truth has no box of it.

    Equal scores are one threshold: nothing depends on the order of detections that a model does not tell apart.

    Args:
        truth: the ground truth; of several boxes that a detection overlaps equally the first one counts.
        found: detections, at most `MAX_PER_IMAGE` an image (see `best_entries`).
        num_classes: K.

    Raises:
        ValueError: a score that is not finite.
    """
    if not np.isfinite(found.score).all():
        first = int(np.flatnonzero(~np.isfinite(found.score))[0])
        raise ValueError(
            f"score ({found.score[first]}) of detection {first} (image {found.image[first]}, class "
            f"{found.label[first]}) must be finite; look at the model's weights"
        )
    result = np.full(num_classes, np.nan)
    for label in np.unique(truth.label).tolist():
        own, candidates = truth.of_class(label), found.of_class(label)
        result[label] = area_under_curve(candidates.score, right_detections(own, candidates), len(own))
    return result


def right_detections(truth: LabelledBoxes, found: LabelledBoxes) -> BoolArray:
    """Return which detections of one class are right, (D,) bool."""
    right = np.zeros(len(found), bool)
    best, overlap = _most_overlapped(truth, found)
    matching = np.flatnonzero(overlap >= MIN_IOU)
    ordered = matching[np.argsort(-found.score[matching], kind="stable")]
    _, firsts = np.unique(best[ordered], return_index=True)  # of several detections of one box the best one
    right[ordered[firsts]] = True
    return right


def _most_overlapped(truth: LabelledBoxes, found: LabelledBoxes) -> tuple[IntArray, FloatArray]:
    """Return for each detection the first ground-truth box of its image with the largest IoU, and that IoU (or -1)."""
    first = np.searchsorted(truth.image, found.image, "left")
    count = np.searchsorted(truth.image, found.image, "right") - first
    best, overlap = np.zeros(len(found), np.int64), np.full(len(found), -1.0)
    for step in range(int(count.max(initial=0))):  # as many rounds as one image has boxes of a class
        rows = np.flatnonzero(count > step)
        candidate = first[rows] + step
        iou = intersection_over_union(found.corners[rows], truth.corners[candidate])
        better = iou > overlap[rows]
        best[rows[better]], overlap[rows[better]] = candidate[better], iou[better]
    return best, overlap


def intersection_over_union(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the IoU of boxes pair by pair, (D,); 0 where both have no area.

    Args:
        a, b: (D, 4) x1, y1, x2, y2.
    """
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = width.clip(0) * height.clip(0)
    union = _area(a) + _area(b) - shared
    return np.divide(shared, union, out=np.zeros(len(a)), where=union > 0)


def _area(boxes: FloatArray) -> FloatArray:
    area: FloatArray = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area


def area_under_curve(scores: FloatArray, right: BoolArray, positives: int) -> float:
    """Return the area under the raised curve of precision over recall.

    Args:
        scores: (D,) of one class.
        right: (D,) whether each is.
        positives: ground-truth boxes of the class, at least 1.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], len(ordered) > 0))  # the last of each run of equals
    hits = np.cumsum(right[order])[ends]
    recall, precision = hits / positives, hits / (ends + 1)
    raised = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * raised).sum())
