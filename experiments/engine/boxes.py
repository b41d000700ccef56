"""Detection in a run: its task, its labels, and what its data must have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.config import Config
from experiments.engine.data import DataSetupError, class_subset
from experiments.engine.step import StepInputs
from experiments.tasks import Detection, Task, make_task
from experiments.tasks.box_table import BoxTable
from pipeline.batch import Batch
from pipeline.dataset import Dataset


def task_of(config: Config, class_names: tuple[str, ...], dataset: Dataset) -> Task:
    """Return the task of a run.

    Args:
        config: of the run.
        class_names: K names.
        dataset: the split that it will score; detection looks its boxes up.
    """
    if config.train.task != "detection":
        return make_task(config.train.task, class_names)
    subset = class_subset(config, dataset)
    evaluated = () if subset is None else subset.allowed
    return Detection(class_names, BoxTable.of(dataset.samples), config.views.boxes, evaluated)


def require_labelled_boxes(config: Config, dataset: Dataset) -> None:
    """Check that every training sample of a detection has a box with labels.

    Raises:
        DataSetupError: with the number of samples that have none, and the first of them.
    """
    if config.train.task != "detection":
        return
    table = BoxTable.of(dataset.samples)
    labelled = np.bincount(table.sample_of[~table.is_detected], minlength=len(table.names))
    wrong = np.flatnonzero(labelled == 0)
    if len(wrong):
        raise DataSetupError(
            f"split {dataset.split!r}: {len(wrong)} of {len(labelled)} samples have no box with labels, the first is "
            f"{table.names[int(wrong[0])]}; train.task=detection trains on key frames with labelled boxes only: "
            "prepare the data from AVA's files, or choose another data.train_split"
        )


def with_boxes(inputs: StepInputs, batch: Batch, world_size: int) -> StepInputs:
    """Return the inputs of a detection's step; no host synchronisation.

    With R_r boxes on rank r of W the local loss (a mean over R_r) is multiplied by W * R_r / sum R; the gradient
    average over ranks is then that of one process with all clips.

    Args:
        inputs: of the batch without its boxes.
        batch: with boxes.
        world_size: W, all of the default process group.
    """
    boxes = batch.boxes
    assert boxes is not None, "experiments.config holds label_kind to the task"
    weight: Tensor | None = None
    if world_size > 1:
        count = torch.full((), float(len(boxes)), device=boxes.device)
        total = count.clone()
        dist.all_reduce(total)
        weight = count * world_size / total.clamp(min=1.0)
    return dataclasses.replace(inputs, boxes=boxes, box_labels=batch.box_labels, box_weight=weight)


def without_boxes(model: nn.Module) -> Callable[..., Any]:
    """Return a detector's forward pass of (frames, log_mel) without any box, for what only its backbone decides."""

    def forward(frames: Tensor | None, log_mel: Tensor | None, **more: Any) -> Any:
        assert frames is not None, "a detector has visual pathways"
        return model(frames, log_mel, boxes=torch.zeros(0, 5, device=frames.device), **more)

    return forward
