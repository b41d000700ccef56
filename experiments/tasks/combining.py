"""Scores of several models or splits made into one result. V samples, K classes, N nouns, B base, O ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.tasks.metrics import FloatArray, IntArray, rank_of_label

BoolArray = npt.NDArray[np.bool_]


def weighted_mean(scores: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
    """Return the weighted mean of the scores of several models: late fusion (Table 6, SlowFast + Audio).

    Args:
        scores: (V, K) each.
        weights: one each, >= 0, not all 0.

    Raises:
        ValueError: weights that do not fit.
    """
    if len(weights) != len(scores) or min(weights) < 0 or sum(weights) <= 0 or not np.isfinite(sum(weights)):
        raise ValueError(
            f"weights ({', '.join(map(str, weights))}) must be {len(scores)} numbers, none negative, one above 0"
        )
    total: FloatArray = np.zeros_like(scores[0])
    for one, weight in zip(scores, weights, strict=True):
        total += weight * one
    return total / sum(weights)


@dataclass(frozen=True)
class ActionScores:
    """How often verb and noun are right together (EPIC-Kitchens), shares of V samples, nan for V = 0.

    Args:
        top1, top5: the true pair is (among) the best of all pairs by P(verb) P(noun), ties against it.
        both_top5: verb among the 5 best verbs and noun among the 5 best nouns, as other code counts it.
    """

    top1: float
    top5: float
    both_top5: float


def action_scores(
    verb: FloatArray, noun: FloatArray, verb_label: IntArray, noun_label: IntArray, prior: FloatArray | None = None
) -> ActionScores:
    """Score actions from two models: an action is a pair, its score the product of the two softmaxes (section 4.1).

    Args:
        verb: (V, K), of the verb model.
        noun: (V, N), of the noun model.
        verb_label, noun_label: (V,) the truth.
        prior: (K, N) that the products are multiplied with, such as how often each pair comes in training.
    """
    ranks = np.empty(len(verb), np.int64)
    for row, (verbs, nouns) in enumerate(zip(verb, noun, strict=True)):
        pairs = np.outer(verbs, nouns)
        if prior is not None:
            pairs *= prior
        ranks[row] = (pairs >= pairs[verb_label[row], noun_label[row]]).sum() - 1
    both = (rank_of_label(verb, verb_label) < 5) & (rank_of_label(noun, noun_label) < 5)
    if not len(ranks):
        return ActionScores(float("nan"), float("nan"), float("nan"))
    return ActionScores(float((ranks < 1).mean()), float((ranks < 5).mean()), float(both.mean()))


def best_actions(verb: FloatArray, noun: FloatArray, count: int) -> list[tuple[int, int, float]]:
    """Return the best pairs of one sample as (verb, noun, product), best first, then by verb and noun.

    Args:
        verb: (K,). noun: (N,). count: how many, at most K N.
    """
    pairs = np.outer(verb, noun).ravel()
    order = np.argsort(-pairs, kind="stable")[:count]
    return [(int(i) // len(noun), int(i) % len(noun), float(pairs[i])) for i in order]


def only_classes(scores: FloatArray, labels: IntArray, allowed: BoolArray) -> tuple[BoolArray, FloatArray]:
    """Restrict scores to some classes (Kinetics-Sounds: 32 of 400).

    Args:
        scores: (V, K). labels: (V,). allowed: (K,).

    Returns:
        (V,) bool, which samples are of these classes; scores with -inf for all other classes.
    """
    return allowed[np.maximum(labels, 0)] & (labels >= 0), np.where(allowed, scores, -np.inf)


@dataclass(frozen=True)
class ClassGain:
    """One class in a comparison of two models: its count, both values in 0..1, nan for a class without samples."""

    name: str
    samples: int
    base: float
    ours: float

    @property
    def gain(self) -> float:
        """Absolute gain."""
        return self.ours - self.base

    @property
    def ratio(self) -> float:
        """Relative gain: ours / base, inf for something from nothing, nan for nothing from nothing."""
        if self.base == 0:
            return float("inf") if self.ours > 0 else float("nan")
        return self.ours / self.base


def class_gains(
    names: Sequence[str], samples: Sequence[int], base: Sequence[float], ours: Sequence[float]
) -> list[ClassGain]:
    """Return the classes that have samples, largest gain first, then by name (Fig. A.1, section A.3).

    Args:
        names: K. samples: K counts. base, ours: K values each, nan where a class has no value.
    """
    rows = [ClassGain(*row) for row in zip(names, samples, base, ours, strict=True)]
    return sorted((row for row in rows if row.gain == row.gain), key=lambda row: (-row.gain, row.name))
