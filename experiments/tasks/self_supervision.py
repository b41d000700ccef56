"""Self-supervision (section 6): which way up is this clip, and does this sound belong to it? N clips.

Both losses are switchable (Table A.1): rotation by `data.rotation`, synchronization by `model.sync_loss`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from experiments.runtime import Runtime
from experiments.tasks.base import BadScores, BoxTargets, LabelError, Report, StepLoss, add_sync_loss
from model.output import ModelOutput

ROTATION_NAMES = ("0 degrees", "90 degrees", "180 degrees", "270 degrees")  # counter-clockwise


class SelfSupervision:
    """Task "self_supervision"; its classes are the four rotations.

    Args:
        class_names: `ROTATION_NAMES`.
    """

    reduction: ClassVar[str] = "mean"

    def __init__(self, class_names: tuple[str, ...] = ROTATION_NAMES) -> None:
        self.class_names = class_names

    def step_loss(
        self, outputs: ModelOutput, labels: Tensor | BoxTargets, pair_weight: Tensor | None = None
    ) -> StepLoss:
        """Cross entropy of the rotations, mean over clips, plus the synchronization loss; never synchronises.

        Args:
            outputs: of the model, logits (N, 4).
            labels: (N,) int64 quarter turns; (0,) for a training without rotation.
            pair_weight: see `Task.step_loss`.

        Raises:
            LabelError: for labels of boxes.
        """
        if isinstance(labels, BoxTargets):
            raise LabelError("labels must be quarter turns of clips for train.task=self_supervision; leave boxes out")
        logits = outputs.logits
        if not len(labels):
            assert outputs.sync_loss is not None, "experiments.config asks for one of both losses"
            parts: dict[str, Tensor] = {}
            nothing = logits.detach().new_zeros(len(logits))
            return StepLoss(add_sync_loss(nothing.sum(), outputs, parts, pair_weight), nothing, parts)
        per_clip = F.cross_entropy(logits, labels, reduction="none")
        loss, right = per_clip.mean(), (logits.detach().argmax(1) == labels).float().mean()
        parts = {"rotation_loss": loss.detach(), "rotation_accuracy": right}
        return StepLoss(add_sync_loss(loss, outputs, parts, pair_weight), per_clip.detach(), parts)

    def accumulator(self, num_samples: int, views_per_sample: int) -> Any:
        """Refuse: an evaluation runs by `engine.pretext`, which asks for pairs of sounds."""
        raise AssertionError("engine.pretext evaluates this task")


class PretextScores:
    """Right answers of an evaluation, counted exactly over any number of ranks."""

    def __init__(self, views: int) -> None:
        self.bad = BadScores(views)
        self.counts = torch.zeros(6, dtype=torch.float64)  # rotations right, of; easy right, of; hard right, of

    def add(self, output: ModelOutput, turns: Tensor | None, kind: str) -> None:
        """Take in one batch; synchronises with the device.

        Args:
            output: of the model in evaluation mode.
            turns: (N,) int64 quarter turns; None: rotations are not asked for.
            kind: "none", "easy" or "hard" out-of-sync audio.
        """
        if turns is not None:
            right = (output.scores.argmax(1) == turns).sum().item()
            self.counts[:2] += torch.tensor([right, len(turns)], dtype=torch.float64)
        if kind != "none" and output.sync_accuracy is not None and output.sync_pairs is not None:
            pairs = output.sync_pairs.double().cpu()
            right = (output.sync_accuracy.double().cpu() * pairs * 2).round() / 2  # half a pair is a right answer
            at = 2 if kind == "easy" else 4
            self.counts[at : at + 2] += torch.stack([right, pairs])

    def gather(self, runtime: Runtime) -> None:
        """Sum over the ranks."""
        if runtime.world_size > 1:
            dist.all_reduce(self.counts, group=runtime.control)
            self.bad.gather(runtime)

    def report(self, samples: int) -> Report:
        """Return both accuracies; what was not asked for, or had no pair, is left out.

        Args:
            samples: of the split.
        """
        names = ("rotation_accuracy", "sync_accuracy_easy", "sync_accuracy_hard")
        values = self.counts.view(3, 2).tolist()
        metrics = {name: right / of for name, (right, of) in zip(names, values, strict=True) if of}
        metrics["pretext_accuracy"] = sum(metrics.values()) / len(metrics) if metrics else float("nan")
        counted = {name.replace("accuracy", "answers"): int(of) for name, (_, of) in zip(names, values, strict=True)}
        note = "pretext_accuracy is the mean of the others, chance 25 % for rotation and 50 % for synchronization"
        return Report(metrics, "pretext_accuracy", class_names=ROTATION_NAMES, counts={"manifest": samples, **counted},
                      notes=(note,))  # fmt: skip
