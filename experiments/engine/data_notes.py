"""What a person should know of the data before a training: classes without samples, a validation that says little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.config import Config
from pipeline.dataset import Dataset

_SHOWN = 5


def data_notes(config: Config, class_names: Sequence[str], train: Dataset, val: Dataset) -> list[str]:
    """Return sentences for the log; empty for data without anything odd.

    Args:
        config: of the run.
        class_names: K names.
        train: training split.
        val: validation split.
    """
    notes = []
    if len(val.samples) == 1:
        notes.append(f"validation has one sample, so a score is 0 or 100 %: add videos to split {val.split!r}")
    if config.train.task != "classification":
        return notes
    for dataset, what in ((train, "to learn from"), (val, "to be scored on")):
        if config.data.label_set not in dataset.samples.label_sets:
            continue
        labels = np.asarray(dataset.samples.labels(config.data.label_set).values)
        counts = np.bincount(labels, minlength=len(class_names))
        empty = [name for name, count in zip(class_names, counts.tolist(), strict=False) if count == 0]
        if empty:
            more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
            shown = ", ".join(repr(name) for name in empty[:_SHOWN])
            notes.append(f"split {dataset.split!r} has no sample {what} of {len(empty)} classes: {shown}{more}")
    return notes
