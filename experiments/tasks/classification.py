"""One class a clip: cross entropy, softmax averaged over the views, top-1 and top-5. N clips, K classes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from experiments.runtime import Runtime
from experiments.tasks.base import BadScores, Report, ScoreSums, StepLoss, add_sync_loss
from experiments.tasks.metrics import confusion_matrix, per_class_table, top_k_accuracy
from model.output import ModelOutput
from pipeline.batch import Batch


class Classification:
    """Task "classification" (Kinetics, Kinetics-Sounds, UCF101, HMDB51, EPIC verbs or nouns).

    Args:
        class_names: K names in the order of the class ids.
    """

    reduction: ClassVar[str] = "mean"

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names

    def step_loss(self, outputs: ModelOutput, labels: Tensor, pair_weight: Tensor | None = None) -> StepLoss:
        """Cross entropy, mean over clips, plus the synchronization loss where the model gives one; never synchronises.

        Source: paper, section 3.5.

        Args:
            outputs: of the model, logits (N, K).
            labels: (N,) int64.
            pair_weight: see `Task.step_loss`.
        """
        logits = outputs.logits
        per_clip = F.cross_entropy(logits, labels, reduction="none")
        loss = per_clip.mean()
        top1 = (logits.detach().argmax(1) == labels).float().mean()
        parts = {"top1": top1}
        return StepLoss(add_sync_loss(loss, outputs, parts, pair_weight), per_clip.detach(), parts)

    def accumulator(self, num_samples: int, views_per_sample: int) -> ClassificationScores:
        """Return an empty accumulator."""
        return ClassificationScores(self.class_names, num_samples, views_per_sample)


class ClassificationScores:
    """Mean softmax per sample (paper, section 4.1, inference)."""

    def __init__(self, class_names: tuple[str, ...], num_samples: int, views_per_sample: int) -> None:
        self.class_names = class_names
        self.sums = ScoreSums(num_samples, len(class_names), views_per_sample, (), Classification.reduction)

    @property
    def bad(self) -> BadScores:
        """Views whose scores are not finite."""
        return self.sums.bad

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Take in class scores (N, K)."""
        self.sums.add(scores, batch)

    def gather(self, runtime: Runtime) -> None:
        """Join the ranks."""
        self.sums.gather(runtime)

    def report(self) -> Report:
        """Return top-1, top-5, the per-class table and the confusion matrix."""
        scores, labels, counts = self.sums.result()
        rows = per_class_table(scores, labels, self.class_names)
        shares = [row.top1 for row in rows if row.samples]
        metrics = {
            "top1": top_k_accuracy(scores, labels, 1),
            "top5": top_k_accuracy(scores, labels, 5),
            "mean_class_accuracy": float(np.mean(shares)) if shares else float("nan"),
        }
        notes: tuple[str, ...] = ()
        if len(self.class_names) <= 5:
            notes = (f"top-5 of {len(self.class_names)} classes is 100 % by definition",)
        table = tuple(
            (row.name, str(row.samples), f"{row.top1:.4f}", f"{row.top5:.4f}", row.most_confused_with) for row in rows
        )
        header = ("class", "samples", "top1", "top5", "most_confused_with")
        confusion = confusion_matrix(scores, labels)
        samples = self.sums.samples()
        return Report(metrics, "top1", header, table, confusion, self.class_names, counts, notes, samples=samples)
