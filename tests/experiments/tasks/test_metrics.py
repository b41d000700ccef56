"""Metrics against small cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as counted

from experiments.tasks.metrics import (
    NO_RANK,
    average_precision,
    confusion_matrix,
    mean_average_precision,
    per_class_table,
    rank_of_label,
    top_k_accuracy,
)

SCORES = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
LABELS = np.array([0, 1, 2, 0])


def test_top_k_by_hand() -> None:
    assert rank_of_label(SCORES, LABELS).tolist() == [0, 1, 0, 2]  # the tie of the last row counts against it
    assert [top_k_accuracy(SCORES, LABELS, k) for k in (1, 2, 3, 5)] == [0.5, 0.75, 1.0, 1.0]
    assert np.isnan(top_k_accuracy(SCORES[:0], LABELS[:0], 1))


def test_constant_scores_earn_nothing() -> None:
    assert top_k_accuracy(np.ones((10, 4)), np.zeros(10, np.int64), 1) == 0.0


NAN, INF = float("nan"), float("inf")
BROKEN = np.array([[NAN, NAN, NAN], [0.5, NAN, 0.1], [NAN, 0.5, 0.1], [0.2, INF, 0.1], [INF, 0.2, 0.1], [-INF] * 3])


def test_scores_that_are_not_finite_are_right_for_no_k() -> None:
    labels = np.zeros(len(BROKEN), np.int64)
    assert rank_of_label(BROKEN, labels).tolist() == [NO_RANK, 0, NO_RANK, 0, NO_RANK, NO_RANK]
    assert top_k_accuracy(np.full((4, 2), NAN), np.array([0, 1, 0, 1]), 1) == 0.0
    assert top_k_accuracy(np.full((4, 2), NAN), np.array([0, 1, 0, 1]), 5) == 0.0
    rows = per_class_table(np.full((2, 2), NAN), np.array([0, 1]), ("a", "b"))
    assert [(r.top1, r.top5, r.most_confused_with) for r in rows] == [(0.0, 0.0, "")] * 2


def test_scores_that_are_not_finite_predict_nothing() -> None:
    counts = confusion_matrix(BROKEN, np.zeros(len(BROKEN), np.int64))
    assert counts.tolist() == [[2, 2, 0], [0, 0, 0], [0, 0, 0]]  # rows 0 and 5 have no best class
    assert confusion_matrix(np.full((3, 2), NAN), np.array([0, 1, 1])).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_average_precision_ranks_what_is_not_finite_last(broken: float) -> None:
    positives = np.array([True, False, True, False])
    assert average_precision(np.array([broken, 0.8, 0.7, 0.1]), positives) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(np.full(4, broken), positives) == pytest.approx(0.5)  # one threshold: the share


def test_confusion_rows_are_true_classes() -> None:
    assert confusion_matrix(SCORES, LABELS).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_confusion_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 7)), rng.integers(0, 5, 200)  # two classes have no sample
    expected = counted(labels, scores.argmax(axis=1), labels=np.arange(7))
    assert confusion_matrix(scores, labels).tolist() == expected.tolist()


def test_per_class_table() -> None:
    rows = per_class_table(SCORES, LABELS, ("a", "b", "c"))
    assert [(r.name, r.samples, r.top1, r.most_confused_with) for r in rows] == [
        ("a", 2, 0.5, "b"), ("b", 1, 0.0, "a"), ("c", 1, 1.0, ""),
    ]  # fmt: skip


def test_average_precision_by_hand() -> None:
    positives = np.array([True, False, True, False])
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), positives) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.ones(2), np.zeros(2, bool)))


def test_average_precision_of_ties_ignores_the_order() -> None:
    scores, positives = np.array([0.5, 0.5, 0.5, 0.1]), np.array([True, False, False, True])
    for order in ([0, 1, 2, 3], [2, 1, 0, 3], [3, 1, 0, 2]):
        assert average_precision(scores[order], positives[order]) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_average_precision_is_that_of_its_definition() -> None:
    """Also with many ties, against the mean precision at the end of each positive's run of equal scores."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        count = int(generator.integers(1, 60))
        scores = generator.integers(0, 8, count) / 7.0
        positives = generator.random(count) < 0.4
        if not positives.any():
            continue
        precisions = [positives[scores >= s].mean() for s in scores[positives]]
        assert average_precision(scores, positives) == pytest.approx(np.mean(precisions), abs=1e-12)


def test_confusion_of_no_samples_and_of_absent_classes() -> None:
    assert confusion_matrix(SCORES[:0], LABELS[:0]).tolist() == [[0] * 3] * 3
    counts = confusion_matrix(np.array([[0.5, 0.5, 0.0], [0.2, 0.2, 0.2]]), np.array([1, 1]))
    assert counts.tolist() == [[0, 0, 0], [2, 0, 0], [0, 0, 0]]  # the first of equal scores is predicted
    assert counts.dtype == np.int64


def test_mean_leaves_out_classes_without_positives() -> None:
    labels = np.array([[True, False], [False, False]])
    mean, per_class = mean_average_precision(np.array([[0.1, 0.5], [0.9, 0.5]]), labels)
    assert mean == 0.5
    assert per_class[0] == 0.5
    assert np.isnan(per_class[1])
