"""Actions of persons in boxes (AVA): a sigmoid a class on every box, average precision at an IoU of 0.5.

Legend: N clips, R boxes, K classes, S samples (key frames).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from experiments.runtime import Runtime
from experiments.tasks.base import BadScores, BoxTargets, Entries, LabelError, Report, StepLoss, silent_views
from experiments.tasks.box_table import BoxTable
from experiments.tasks.detection_metrics import BoolArray, average_precision_of_boxes, best_entries
from model.output import ModelOutput
from pipeline.batch import Batch

BoxSource = Literal["detected", "ground_truth"]
NUM_AVA_CLASSES = 80


class Detection:
    """Task "detection" (paper, section 5 and appendix A.7).

    Args:
        class_names: K names in the order of the class ids.
        boxes: of the split that is scored; None where nothing will be.
        source: which of its boxes are scored.
        evaluated: for each class whether it counts; empty = all do.
    """

    reduction: ClassVar[str] = "mean"  # of one view: a key frame has no more

    def __init__(
        self,
        class_names: tuple[str, ...],
        boxes: BoxTable | None = None,
        source: BoxSource = "detected",
        evaluated: Sequence[bool] = (),
    ) -> None:
        self.class_names, self._boxes, self._source = class_names, boxes, source
        self._evaluated = np.array(evaluated or [True] * len(class_names), bool)

    def step_loss(self, outputs: ModelOutput, labels: Any, pair_weight: Tensor | None = None) -> StepLoss:
        """Binary cross entropy, mean over classes and over the boxes of all ranks; never synchronises.

        A clip without a box (its persons lie outside the crop) adds nothing, a step without any has loss 0.

        Args:
            outputs: of the model, logits (R, K).
            labels: `BoxTargets`.
            pair_weight: not used: the paper's detectors have no synchronization loss.

        Raises:
            LabelError: for labels of clips.
        """
        logits = outputs.logits
        if not isinstance(labels, BoxTargets) or labels.labels.shape != logits.shape:
            shown = tuple(labels.labels.shape) if isinstance(labels, BoxTargets) else "of clips"
            raise LabelError(
                f"labels {shown} must be multi-hot {tuple(logits.shape)}, a row a box, for train.task=detection; "
                "set data.label_kind=boxes"
            )
        per_box = F.binary_cross_entropy_with_logits(logits, labels.labels, reduction="none").mean(1)
        total = per_box.sum() / max(len(per_box), 1)  # R is a shape: known without asking the device
        if labels.weight is not None:
            total = total * labels.weight
        boxes, sums = torch.zeros(2, labels.num_clips, device=logits.device).unbind()
        boxes = boxes.index_add(0, labels.clip, torch.ones_like(per_box))
        sums = sums.index_add(0, labels.clip, per_box.detach())
        return StepLoss(total, sums / boxes.clamp(min=1), {"boxes_per_clip": boxes.mean()})

    def accumulator(self, num_samples: int, views_per_sample: int) -> BoxScores:
        """Return an empty accumulator for the split whose boxes the task knows."""
        assert self._boxes is not None, "a task that scores was given the boxes of its split"
        assert (len(self._boxes.names), views_per_sample) == (num_samples, 1), "a key frame has one view"
        return BoxScores(self.class_names, self._boxes, self._source, self._evaluated)


class BoxScores:
    """Scores of the boxes of a split, each exactly once over any number of ranks.

    Args:
        class_names: K.
        boxes: of the split.
        source: which of them are scored.
        evaluated: (K,) which classes count.
    """

    def __init__(self, class_names: tuple[str, ...], boxes: BoxTable, source: BoxSource, evaluated: BoolArray) -> None:
        self.class_names, self.boxes, self.source, self.evaluated = class_names, boxes, source, evaluated
        self.scores = torch.zeros(len(boxes), len(class_names))
        self.times_scored = torch.zeros(len(boxes), dtype=torch.int32)
        self.views, self.silent = torch.zeros(2, len(boxes.names), dtype=torch.int64).unbind()
        self.bad = BadScores(len(boxes.names))

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Take in (R, K) scores of the boxes of a batch; synchronises with the device."""
        assert batch.boxes is not None, "the loader gives boxes where the split has some"
        assert batch.box_index is not None, "boxes come with their numbers"
        host, entry = scores.detach().float().cpu(), batch.boxes[:, 0].long().cpu()
        samples = batch.sample.cpu()
        rows = torch.from_numpy(self.boxes.offsets)[samples[entry]] + batch.box_index
        broken = torch.zeros(len(samples)).index_add_(0, entry, (~torch.isfinite(host).all(1)).float())
        self.bad.add(broken == 0, batch.ids, batch.view.cpu())
        self.scores[rows] = host
        self.times_scored.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        self.views.index_add_(0, samples, torch.ones_like(samples))
        self.silent.index_add_(0, samples, silent_views(batch))

    def gather(self, runtime: Runtime) -> None:
        """Sum over the ranks: each box was scored by one of them."""
        if runtime.world_size == 1:
            return
        for tensor in (self.scores, self.times_scored, self.views, self.silent):
            dist.all_reduce(tensor, group=runtime.control)
        self.bad.gather(runtime)

    def report(self) -> Report:
        """Return mean AP over the evaluated classes that have ground truth, AP per class, and the entries scored."""
        boxes, seen = self.boxes, (self.views > 0).numpy()
        assert bool((self.views <= 1).all()), "a view was scored twice"
        assert bool((self.times_scored <= 1).all()), "a box was scored twice"
        truth = boxes.truth(seen, self.evaluated)
        scored = np.flatnonzero(self.times_scored.numpy())
        ends = np.cumsum(np.bincount(boxes.sample_of[scored], minlength=len(seen)))
        classes = np.flatnonzero(self.evaluated)
        found = best_entries(self.scores.numpy()[scored], boxes.corners[scored], ends, classes)
        per_class = average_precision_of_boxes(truth, found, len(self.class_names))[classes]
        known = per_class[~np.isnan(per_class)]
        mean = float(known.mean()) if len(known) else float("nan")
        table = tuple(
            (self.class_names[k], str(int((truth.label == k).sum())), str(int((found.label == k).sum())), f"{ap:.4f}")
            for k, ap in zip(classes.tolist(), per_class.tolist(), strict=True)
        )
        header = ("class", "ground_truth_boxes", "detections", "average_precision")
        entries = Entries(boxes.names, found.image, found.corners, found.label, found.score)
        return Report(
            {"mean_ap": mean}, "mean_ap", header, table, None, self.class_names,
            self._counts(seen, len(scored)), self._notes(per_class), entries,
        )  # fmt: skip

    def _counts(self, seen: BoolArray, scored: int) -> dict[str, int]:
        boxes, views = self.boxes, self.views.numpy()
        wanted = boxes.is_detected if self.source == "detected" else ~boxes.is_detected
        return {
            "manifest": len(seen),
            "scored": int(seen.sum()),
            "quarantined": int((~seen).sum()),
            "silent": int((seen & (self.silent.numpy() == views)).sum()),
            "boxes_scored": scored,
            "boxes_below_one_pixel": int((wanted & seen[boxes.sample_of]).sum()) - scored,
        }

    def _notes(self, per_class: np.ndarray) -> tuple[str, ...]:
        notes = []
        if without := int(np.isnan(per_class).sum()):
            notes.append(f"{without} classes without ground truth are left out of the mean")
        if not self.evaluated.all():
            notes.append(f"{int(self.evaluated.sum())} of {len(self.evaluated)} classes count")
        elif len(self.evaluated) == NUM_AVA_CLASSES:
            notes.append(f"all {len(self.evaluated)} classes count; AVA's protocol: eval.class_subset=action_evaluated")
        if self.source == "ground_truth":
            notes.append(
                "ground-truth boxes were scored (views.boxes): no result of AVA's protocol, which detects them"
            )
        return tuple(notes)
