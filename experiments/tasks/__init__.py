"""The tasks by name. Names are imported when they are used: what only reads scores needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    "Classification",
    "Detection",
    "Entries",
    "LabelError",
    "MultiLabel",
    "Report",
    "SampleScores",
    "SelfSupervision",
    "StepLoss",
    "Task",
    "make_task",
]

if not TYPE_CHECKING:  # a checker shall find wrong names
    _PLACES = {
        "Classification": "classification",
        "Detection": "detection",
        "MultiLabel": "multilabel",
        "SelfSupervision": "self_supervision",
    }

    def __getattr__(name):
        """Import a public name on first use (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES.get(name, 'base')}"), name)
        return value


def make_task(name: str, class_names: tuple[str, ...]) -> Task:
    """Return the task of `train.task`; what detection needs besides, `engine/boxes.py` knows.

    Args:
        name: a key of the table below.
        class_names: K names.
    """
    from experiments.tasks.classification import Classification
    from experiments.tasks.detection import Detection
    from experiments.tasks.multilabel import MultiLabel
    from experiments.tasks.self_supervision import SelfSupervision

    tasks: dict[str, type[Classification] | type[MultiLabel] | type[Detection] | type[SelfSupervision]] = {
        "classification": Classification,
        "multilabel": MultiLabel,
        "detection": Detection,
        "self_supervision": SelfSupervision,
    }
    return tasks[name](class_names)
