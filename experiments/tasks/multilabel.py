"""Any number of classes a clip (Charades): binary cross entropy, sigmoid, maximum over the views, mean AP."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from experiments.runtime import Runtime
from experiments.tasks.base import BadScores, LabelError, Report, ScoreSums, StepLoss, add_sync_loss
from experiments.tasks.metrics import mean_average_precision
from model.output import ModelOutput
from pipeline.batch import Batch


class MultiLabel:
    """Task "multilabel".

    Args:
        class_names: K names in the order of the class ids.
    """

    reduction: ClassVar[str] = "max"

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names

    def step_loss(self, outputs: ModelOutput, labels: Tensor, pair_weight: Tensor | None = None) -> StepLoss:
        """Binary cross entropy, mean over classes and clips, plus the synchronization loss; never synchronises.

        Args:
            outputs: of the model, logits (N, K).
            labels: (N, K) float32.
            pair_weight: see `Task.step_loss`.

        Raises:
            LabelError: for class ids.
        """
        logits = outputs.logits
        if labels.shape != logits.shape:
            raise LabelError(
                f"labels {tuple(labels.shape)} must be multi-hot {tuple(logits.shape)} for "
                "train.task=multilabel; set data.label_kind to multi_hot or timed"
            )
        per_clip = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        parts: dict[str, Tensor] = {}
        return StepLoss(add_sync_loss(per_clip.mean(), outputs, parts, pair_weight), per_clip.detach(), parts)

    def accumulator(self, num_samples: int, views_per_sample: int) -> MultiLabelScores:
        """Return an empty accumulator."""
        return MultiLabelScores(self.class_names, num_samples, views_per_sample)


class MultiLabelScores:
    """Maximum of the sigmoid scores over a sample's views (Charades' protocol)."""

    def __init__(self, class_names: tuple[str, ...], num_samples: int, views_per_sample: int) -> None:
        self.class_names = class_names
        self.sums = ScoreSums(
            num_samples, len(class_names), views_per_sample, (len(class_names),), MultiLabel.reduction
        )

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
        """Return mean AP over the classes that have positives, and AP per class."""
        scores, labels, counts = self.sums.result()
        positives = labels > 0.5
        mean, per_class = mean_average_precision(scores, positives)
        table = tuple(
            (name, str(int(positives[:, k].sum())), f"{per_class[k]:.4f}") for k, name in enumerate(self.class_names)
        )
        without = int(np.isnan(per_class).sum())
        notes = (f"{without} classes without positives are left out of the mean",) if without else ()
        header = ("class", "positives", "average_precision")
        samples, names = self.sums.samples(), self.class_names
        return Report({"mean_ap": mean}, "mean_ap", header, table, None, names, counts, notes, samples=samples)
