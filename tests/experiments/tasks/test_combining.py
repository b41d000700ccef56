"""What is made of several models' scores, against plain counts and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from experiments.tasks.combining import (
    action_scores,
    best_actions,
    class_gains,
    only_classes,
    weighted_mean,
)
from experiments.tasks.metrics import top_k_accuracy

Found = tuple[float, float, float]


def softmaxes(rng: np.random.Generator, count: int, classes: int) -> np.ndarray:
    """Random scores that add up to 1."""
    values = np.exp(rng.normal(0, 2, (count, classes)))
    return np.asarray(values / values.sum(1, keepdims=True))


def counted(verb: np.ndarray, noun: np.ndarray, verbs: np.ndarray, nouns: np.ndarray) -> Found:
    """The same, pair by pair in plain Python."""
    top1 = top5 = both = 0
    for v, n, own_v, own_n in zip(verb.tolist(), noun.tolist(), verbs.tolist(), nouns.tolist(), strict=True):
        own = v[own_v] * n[own_n]
        better = sum(a * b >= own for a in v for b in n) - 1
        top1, top5 = top1 + (better < 1), top5 + (better < 5)
        both += sum(a >= v[own_v] for a in v) <= 5 and sum(b >= n[own_n] for b in n) <= 5
    return top1 / len(verb), top5 / len(verb), both / len(verb)


@pytest.mark.parametrize(("count", "verbs", "nouns"), [(200, 9, 13), (60, 3, 2), (1, 6, 7)])
def test_actions_equal_an_independent_count(count: int, verbs: int, nouns: int) -> None:
    rng = np.random.default_rng(count)
    verb, noun = softmaxes(rng, count, verbs), softmaxes(rng, count, nouns)
    labels = rng.integers(verbs, size=count), rng.integers(nouns, size=count)
    found = action_scores(verb, noun, *labels)
    assert (found.top1, found.top5, found.both_top5) == pytest.approx(counted(verb, noun, *labels), abs=1e-12)
    right = (verb.argmax(1) == labels[0]) & (noun.argmax(1) == labels[1])
    assert found.top1 == pytest.approx(right.mean())  # without ties the best pair is the pair of the best


def test_actions_of_degenerate_scores() -> None:
    ones = np.full((4, 6), 1 / 6)
    found = action_scores(ones, ones, np.zeros(4, np.int64), np.zeros(4, np.int64))
    assert (found.top1, found.top5, found.both_top5) == (0.0, 0.0, 0.0)  # a tie with all others is no answer
    none = action_scores(ones[:0], ones[:0], np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert math.isnan(none.top1)


def test_prior_weighs_pairs() -> None:
    verb, noun = np.array([[0.6, 0.4]]), np.array([[0.6, 0.4]])
    prior = np.array([[0.0, 1.0], [0.0, 9.0]])
    label = np.array([1])
    assert action_scores(verb, noun, label, label).top1 == 0.0
    assert action_scores(verb, noun, label, label, prior).top1 == 1.0


def test_best_actions_are_sorted_products() -> None:
    verb, noun = np.array([0.7, 0.3]), np.array([0.5, 0.1, 0.4])
    found = best_actions(verb, noun, 4)
    assert [pair[:2] for pair in found] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert [pair[2] for pair in found] == pytest.approx([0.35, 0.28, 0.15, 0.12])


def test_weighted_mean_and_its_rules() -> None:
    scores = [np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])]
    assert weighted_mean(scores, [1, 1]) == pytest.approx(np.array([[0.5, 0.5]]))
    assert weighted_mean(scores, [3, 1]) == pytest.approx(np.array([[0.65, 0.35]]))
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match=r"weights \(.*\) must be 2 numbers"):
            weighted_mean(scores, weights)


def test_subset_equals_scikit_learn_on_the_classes_alone() -> None:
    rng = np.random.default_rng(0)
    scores, labels = softmaxes(rng, 300, 20), rng.integers(20, size=300)
    labels[:5] = -1
    allowed = np.isin(np.arange(20), [1, 4, 5, 9, 13, 17, 18])
    own, masked = only_classes(scores, labels, allowed)
    assert own.sum() == sum(label in (1, 4, 5, 9, 13, 17, 18) for label in labels)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels[own], scores[own][:, allowed], k=k, labels=np.flatnonzero(allowed))
        assert top_k_accuracy(masked[own], labels[own], k) == pytest.approx(expected, abs=1e-12)


def test_gains_are_sorted_and_classes_without_samples_left_out() -> None:
    rows = class_gains(["a", "b", "c", "d"], [3, 4, 0, 2], [0.5, 0.0, math.nan, 0.4], [0.4, 0.5, math.nan, 0.9])
    assert [row.name for row in rows] == ["b", "d", "a"]
    assert [row.gain for row in rows] == pytest.approx([0.5, 0.5, -0.1])
    assert [row.ratio for row in rows] == pytest.approx([math.inf, 2.25, 0.8])
