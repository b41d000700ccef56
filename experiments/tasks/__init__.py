"""The tasks by name."""

from experiments.tasks.base import Accumulator, BadScores, LabelError, Report, StepLoss, Task
from experiments.tasks.classification import Classification
from experiments.tasks.multilabel import MultiLabel

__all__ = ["Accumulator", "BadScores", "LabelError", "Report", "StepLoss", "Task", "make_task"]


def make_task(name: str, class_names: tuple[str, ...]) -> Task:
    """Return the task of `train.task`.

    Args:
        name: a key of the table below.
        class_names: K names.
    """
    tasks: dict[str, type[Classification] | type[MultiLabel]] = {
        "classification": Classification,
        "multilabel": MultiLabel,
    }
    return tasks[name](class_names)
