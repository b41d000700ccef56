"""The tasks by name."""

from experiments.tasks.base import (
    Accumulator,
    BadScores,
    BoxTargets,
    Entries,
    LabelError,
    Report,
    SampleScores,
    StepLoss,
    Task,
)
from experiments.tasks.classification import Classification
from experiments.tasks.detection import Detection
from experiments.tasks.multilabel import MultiLabel
from experiments.tasks.self_supervision import SelfSupervision

__all__ = [
    "Accumulator",
    "BadScores",
    "BoxTargets",
    "Detection",
    "Entries",
    "LabelError",
    "Report",
    "SampleScores",
    "StepLoss",
    "Task",
    "make_task",
]


def make_task(name: str, class_names: tuple[str, ...]) -> Task:
    """Return the task of `train.task`; what detection needs besides, `engine/boxes.py` knows.

    Args:
        name: a key of the table below.
        class_names: K names.
    """
    tasks: dict[str, type[Classification] | type[MultiLabel] | type[Detection] | type[SelfSupervision]] = {
        "classification": Classification,
        "multilabel": MultiLabel,
        "detection": Detection,
        "self_supervision": SelfSupervision,
    }
    return tasks[name](class_names)
