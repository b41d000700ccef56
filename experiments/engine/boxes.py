"""Detection in a run: its task, its labels, and what its data must have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
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


def with_boxes(inputs: StepInputs, batch: Batch) -> StepInputs:
    """Return the inputs of a detection's step.

    Args:
        inputs: of the batch without its boxes.
        batch: with boxes.
    """
    assert batch.boxes is not None, "check_consistency holds label_kind to the task"
    return dataclasses.replace(inputs, boxes=batch.boxes, box_labels=batch.box_labels)


def box_count(batch: Batch) -> Tensor:
    """Return the number of boxes of a batch, () float32."""
    assert batch.boxes is not None
    return torch.full((), float(len(batch.boxes)), device=batch.boxes.device)


def without_boxes(model: nn.Module) -> Callable[..., Any]:
    """Return a detector's forward pass of (frames, log_mel) without any box, for what only its backbone decides."""

    def forward(frames: Tensor | None, log_mel: Tensor | None, **more: Any) -> Any:
        assert frames is not None, "a detector has visual pathways"
        return model(frames, log_mel, boxes=torch.zeros(0, 5, device=frames.device), **more)

    return forward
