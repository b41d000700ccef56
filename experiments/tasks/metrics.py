"""Exact scores from summed predictions: top-k, per class, confusion, average precision. N samples, K classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
NO_RANK = int(np.iinfo(np.int64).max)  # of a score that is not finite: behind every k


def rank_of_label(scores: FloatArray, labels: IntArray) -> IntArray:
    """Return how many classes beat the true one, per sample; ties count against the true class.

    A constant score therefore earns nothing, where argmax would earn whatever class comes first. A score that is not
    finite beats no other; as the true class's it is right for no k.

    Args:
        scores: (N, K) float64, larger is better.
        labels: (N,) in [0, K).

    Returns:
        (N,) int64 in [0, K); `NO_RANK` where the true class's score is not finite.
    """
    ranked = _finite_or_last(scores)
    own = ranked[np.arange(len(labels)), labels][:, None]
    beaten_by = (ranked >= own).sum(axis=1) - 1
    return np.where(np.isneginf(own[:, 0]), NO_RANK, beaten_by).astype(np.int64)


def _finite_or_last(scores: FloatArray) -> FloatArray:
    """Return the scores with -inf for each that is not finite."""
    return np.where(np.isfinite(scores), scores, -np.inf)


def top_k_accuracy(scores: FloatArray, labels: IntArray, k: int) -> float:
    """Return the share of samples whose true class is among the k best.

    Args:
        scores: (N, K).
        labels: (N,).
        k: >= 1; k >= K gives 1.0 where all scores are finite.

    Returns:
        A share in [0, 1], nan without samples.
    """
    if len(labels) == 0:
        return float("nan")
    return float((rank_of_label(scores, labels) < k).mean())


def confusion_matrix(scores: FloatArray, labels: IntArray) -> IntArray:
    """Count samples by (true class, predicted class).

    Args:
        scores: (N, K); the first of several best classes is the predicted one. A score that is not finite is never
            the best; a sample without a finite one predicts nothing and is left out.
        labels: (N,).

    Returns:
        (K, K) int64; rows are true classes.
    """
    num_classes = scores.shape[1]
    predicts = np.isfinite(scores).any(axis=1)
    predicted = _finite_or_last(scores[predicts]).argmax(axis=1)
    pairs = np.bincount(labels[predicts] * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64)


@dataclass(frozen=True)
class ClassRow:
    """One line of the per-class table; shares are nan for a class without samples."""

    name: str
    samples: int
    top1: float
    top5: float
    most_confused_with: str


def per_class_table(scores: FloatArray, labels: IntArray, names: tuple[str, ...]) -> list[ClassRow]:
    """Return top-1, top-5 and the most frequent wrong answer of every class.

    Args:
        scores: (N, K).
        labels: (N,).
        names: K class names.

    Returns:
        K rows in class order.
    """
    ranks, counts = rank_of_label(scores, labels), confusion_matrix(scores, labels)
    rows = []
    for index, name in enumerate(names):
        own = ranks[labels == index]
        wrong = counts[index].copy()
        wrong[index] = 0
        confused = names[int(wrong.argmax())] if wrong.any() else ""
        top1, top5 = (float((own < k).mean()) if len(own) else float("nan") for k in (1, 5))
        rows.append(ClassRow(name, len(own), top1, top5, confused))
    return rows


def average_precision(scores: FloatArray, positives: npt.NDArray[np.bool_]) -> float:
    """Return the average precision of one class: the mean precision at the ranks of its positives.

    Equal scores are one threshold: the precision at the end of their run counts for all of them, so that the result
    does not depend on the order of the samples. Scores that are not finite are one threshold below all others.

    Args:
        scores: (N,) larger is better.
        positives: (N,) bool.

    Returns:
        A share in [0, 1], nan without positives.
    """
    from sklearn.metrics import average_precision_score

    order = np.unique(_finite_or_last(scores), return_inverse=True)[1]  # scikit-learn refuses -inf
    return float(average_precision_score(positives, order)) if positives.any() else float("nan")


def mean_average_precision(scores: FloatArray, labels: npt.NDArray[np.bool_]) -> tuple[float, FloatArray]:
    """Return the mean of the classes' average precisions; classes without positives are left out (Charades' protocol).

    Args:
        scores: (N, K).
        labels: (N, K) bool.

    Returns:
        (mean, (K,) per class with nan where there is no positive).
    """
    per_class = np.array([average_precision(scores[:, k], labels[:, k]) for k in range(scores.shape[1])])
    valid = per_class[~np.isnan(per_class)]
    return (float(valid.mean()) if len(valid) else float("nan")), per_class


def loss_of_scores(scores: FloatArray, labels: IntArray | FloatArray) -> float:
    """Return the loss of scores, as a training has it of logits: cross entropy, or binary cross entropy.

    Args:
        scores: (N, K) in 0..1, reduced over the views; at least 1e-7 and at most 1 - 1e-7 counts.
        labels: (N,) class ids, -1 where there is none; or (N, K) multi-hot.

    Returns:
        The mean over the samples with a label (and over the classes); nan without any.
    """
    kept = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(1)
    inside = np.clip(scores[kept], 1e-7, 1 - 1e-7)
    if not len(inside):
        return float("nan")
    if labels.ndim == 1:
        return float(-np.log(inside[np.arange(len(inside)), labels[kept].astype(np.int64)]).mean())
    positive = labels[kept] > 0.5
    return float(-np.where(positive, np.log(inside), np.log1p(-inside)).mean())
