"""What a task gives to training and evaluation: a loss for a step, and an exact score for a split.

Synchronization fits in as a further `Task`: its accumulator keys on pairs, that of detection on boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.runtime import Runtime
from experiments.tasks.metrics import FloatArray, IntArray
from model.output import ModelOutput
from pipeline.batch import Batch


class LabelError(ValueError):
    """Labels that do not fit the model or the task."""


@dataclass(frozen=True)
class StepLoss:
    """Loss of one step on this rank.

    Args:
        total: scalar with gradient.
        per_clip: (N,) float32, detached.
        parts: detached scalars, means over the clips.
    """

    total: Tensor
    per_clip: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class BoxTargets:
    """What the boxes of a step are labelled with, R boxes of N clips.

    Args:
        labels: (R, K) float32 multi-hot.
        clip: (R,) int64 clip of each box, 0..N-1.
        num_clips: N.
        weight: () float32, larger on ranks with more boxes: R times ranks / boxes of all ranks; None = 1.
    """

    labels: Tensor
    clip: Tensor
    num_clips: int
    weight: Tensor | None = None


@dataclass(frozen=True)
class Entries:
    """What a detector said, D entries of one box and one class, sample after sample, from the best down.

    Args:
        names: S sample names.
        sample: (D,) int64 number of the name.
        corners: (D, 4) float64 x1, y1, x2, y2 in [0, 1].
        label: (D,) int64 class, from 0.
        score: (D,) float64.
    """

    names: tuple[str, ...]
    sample: IntArray
    corners: FloatArray
    label: IntArray
    score: FloatArray


@dataclass(frozen=True)
class SampleScores:
    """What an evaluation found about every sample with at least one scored view. V samples, K classes.

    Args:
        rows: (V,) int64 of the split's sample table, rising.
        scores: (V, K) float64, reduced over the views as the task does it.
        labels: (V,) int64, -1 where there is none; or (V, K) float64 multi-hot.
        views: (V,) int64, how many were scored.
        silent: (V,) int64, how many of them had no sound; 0 where the model takes none.
        reduction: "mean" or "max" over the views.
    """

    rows: IntArray
    scores: FloatArray
    labels: IntArray | FloatArray
    views: IntArray
    silent: IntArray
    reduction: str


@dataclass(frozen=True)
class Report:
    """Result of an evaluation over all ranks.

    Args:
        metrics: name -> value, `primary` names the one that ranks checkpoints.
        header, table: the per-class table as texts.
        confusion: (K, K) counts, rows are true classes, or None.
        counts: how many samples were what.
        notes: sentences for the reader.
        entries: the scored detections, or None.
        samples: the scores behind it, None for a task that has none per sample.
    """

    metrics: Mapping[str, float]
    primary: str
    header: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    confusion: IntArray | None = None
    class_names: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    entries: Entries | None = None
    samples: SampleScores | None = None


@dataclass
class BadScores:
    """Views whose scores are not finite: how many of those planned, and the first few (sample and view, sorted)."""

    SHOWN: ClassVar[int] = 8

    planned: int
    views: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)

    def add(self, finite: Tensor, ids: Sequence[str], views: Tensor) -> None:
        """Take in a batch, on the host.

        Args:
            finite: (N,) bool, whether all scores of a view are.
            ids: N of the samples.
            views: (N,) int64.
        """
        bad = torch.nonzero(~finite)[:, 0].tolist()
        self.views += len(bad)
        self._keep([(ids[i], int(views[i])) for i in bad])

    def gather(self, runtime: Runtime) -> None:
        """Join the ranks."""
        parts: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(parts, (self.views, self.first), group=runtime.control)
        self.views, self.first = sum(count for count, _ in parts), []
        for _, first in parts:
            self._keep(first)

    def _keep(self, more: list[tuple[str, int]]) -> None:
        self.first = sorted({*self.first, *more})[: self.SHOWN]


class Accumulator(Protocol):
    """Collects the predictions of an evaluation; never counts a view twice."""

    @property
    def bad(self) -> BadScores:
        """Views whose scores are not finite; of all ranks after `gather`."""

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Take in the class scores (N, K) of a batch of views."""

    def gather(self, runtime: Runtime) -> None:
        """Join the ranks' shares; afterwards every rank holds everything."""

    def report(self) -> Report:
        """Return the result."""


class Task(Protocol):
    """A kind of supervision.

    Args:
        class_names: K names in the order of the class ids.
    """

    class_names: tuple[str, ...]
    reduction: ClassVar[str]  # of a sample's views: "mean" or "max"

    def step_loss(self, outputs: ModelOutput, labels: Any, pair_weight: Tensor | None = None) -> StepLoss:
        """Return the loss of a training step, without waiting for the device or for other ranks.

        Args:
            outputs: of the model.
            labels: (N,) int64 class ids, (N, K) float32 multi-hot, or `BoxTargets` for detection.
            pair_weight: () float32, of this rank's synchronization loss; None = 1.
        """

    def accumulator(self, num_samples: int, views_per_sample: int) -> Accumulator:
        """Return an empty accumulator for a split."""


def add_sync_loss(
    clip_loss: Tensor, outputs: ModelOutput, parts: dict[str, Tensor], pair_weight: Tensor | None
) -> Tensor:
    """Add the synchronization loss, if there is one.

    Args:
        clip_loss: scalar.
        outputs: of the model.
        parts: receives sync_loss and sync_accuracy.
        pair_weight: () float32, larger on ranks with more valid pairs; None = 1.

    Returns:
        The scalar sum.
    """
    sync_loss = outputs.sync_loss
    if sync_loss is None:
        return clip_loss
    assert outputs.sync_accuracy is not None, "the model gives all three or none"
    parts["sync_loss"] = sync_loss.detach()
    parts["sync_accuracy"] = outputs.sync_accuracy.detach()
    return clip_loss + (sync_loss if pair_weight is None else sync_loss * pair_weight)


def silent_views(batch: Batch) -> Tensor:
    """Return 1 for each view without sound, else 0: (N,) int64 on the host; 0 where the model takes no sound."""
    if batch.log_mel is None:
        return torch.zeros(len(batch.has_audio), dtype=torch.int64)
    return (~batch.has_audio.cpu()).to(torch.int64)


class ScoreSums:
    """Scores of the views of every sample, averaged (or their maximum), exact over any number of ranks.

    Args:
        num_samples: S of the split.
        num_classes: K.
        views_per_sample: expected views.
        label_shape: () for class ids, (K,) for multi-hot.
        reduction: "mean" or "max" over the views.
    """

    def __init__(
        self, num_samples: int, num_classes: int, views_per_sample: int, label_shape: tuple[int, ...], reduction: str
    ) -> None:
        self.views_per_sample, self.reduction = views_per_sample, reduction
        start = 0.0 if reduction == "mean" else -torch.inf
        self.scores = torch.full((num_samples, num_classes), start, dtype=torch.float64)
        self.views = torch.zeros(num_samples, dtype=torch.int64)
        self.silent = torch.zeros(num_samples, dtype=torch.int64)
        self.labels = torch.full((num_samples, *label_shape), -1.0 if label_shape else -1, dtype=torch.float64)
        self.bad = BadScores(num_samples * views_per_sample)

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Take in (N, K) scores of N views; synchronises with the device."""
        host = scores.detach().double().cpu()
        rows = batch.sample.cpu()
        self.bad.add(torch.isfinite(host).all(1), batch.ids, batch.view.cpu())
        if self.reduction == "mean":
            self.scores.index_add_(0, rows, host)
        else:
            np.maximum.at(self.scores.numpy(), rows.numpy(), host.numpy())  # in place: the array shares the memory
        self.views.index_add_(0, rows, torch.ones_like(rows))
        self.silent.index_add_(0, rows, silent_views(batch))
        self.labels[rows] = batch.labels.double().cpu()

    def gather(self, runtime: Runtime) -> None:
        """Sum (or take the maximum) over the ranks."""
        if runtime.world_size == 1:
            return
        combine = dist.ReduceOp.SUM if self.reduction == "mean" else dist.ReduceOp.MAX
        for tensor, operation in (
            (self.scores, combine), (self.views, dist.ReduceOp.SUM),
            (self.silent, dist.ReduceOp.SUM), (self.labels, dist.ReduceOp.MAX),
        ):  # fmt: skip
            dist.all_reduce(tensor, op=operation, group=runtime.control)
        self.bad.gather(runtime)

    def samples(self) -> SampleScores:
        """Return the scores of the samples with at least one view, those without a label included."""
        assert bool((self.views <= self.views_per_sample).all()), "a view was scored twice"
        seen = self.views > 0
        scores, labels = self.scores[seen], self.labels[seen]
        if self.reduction == "mean":
            scores = scores / self.views[seen, None]
        if labels.dim() == 1:
            labels = labels.to(torch.int64)
        rows, views, silent = torch.nonzero(seen)[:, 0], self.views[seen], self.silent[seen]
        arrays = rows.numpy(), scores.numpy(), labels.numpy(), views.numpy(), silent.numpy()
        return SampleScores(*arrays, self.reduction)

    def result(self) -> tuple[Any, Any, dict[str, int]]:
        """Return scores (L, K) and labels (L, ...) of the labelled samples, as numpy, and the counts."""
        samples, seen = self.samples(), self.views > 0
        scores, labels = torch.from_numpy(samples.scores), torch.from_numpy(samples.labels)
        labelled = (labels >= 0).all(1) if labels.dim() > 1 else labels >= 0
        counts = {
            "manifest": len(seen),
            "scored": int(seen.sum()),
            "quarantined": int((~seen).sum()),
            "partly_read": int((seen & (self.views < self.views_per_sample)).sum()),
            "silent": int((seen & (self.silent == self.views)).sum()),
            "unlabelled": int((~labelled).sum()),
        }
        return scores[labelled].numpy(), labels[labelled].numpy(), counts
