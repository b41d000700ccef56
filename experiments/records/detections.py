"""Detections as a file of AVA's form, which the official evaluator reads.

A row is: video, second, x1, y1, x2, y2, action counted from 1, score.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from experiments.config import Config
from experiments.tasks import Report
from experiments.tasks.box_table import DECIMALS
from pipeline.dataset import Dataset
from pipeline.ingest.target import unwritable_parent
from pipeline.store.durable import write_file

_KEY_FRAME = re.compile(r"[^,]+,[0-9]+")


class DetectionsError(ValueError):
    """Detections that cannot be written."""


def check_detections_file(path: Path, config: Config, dataset: Dataset) -> None:
    """Check, before anything is scored, that the detections of a split can be written.

    Args:
        path: file to be written.
        config: of the evaluation.
        dataset: the split.

    Raises:
        DetectionsError: no detection, samples that are no key frames, or a place that cannot be written to.
    """
    if config.train.task != "detection":
        raise DetectionsError(
            f"--detections ({path}) must be given for train.task=detection alone, not {config.train.task}; leave it out"
        )
    if path.is_dir() or (parent := unwritable_parent(path)):
        found = "a folder" if path.is_dir() else f"{parent} is not writable"
        raise DetectionsError(f"--detections ({path}) must be a file in a writable folder: {found}; choose another one")
    for number in range(len(dataset.samples)):
        name = dataset.samples.id(number)
        if not _KEY_FRAME.fullmatch(name):
            raise DetectionsError(
                f"sample {name!r} must be called <video>,<second> for --detections; prepare the data from AVA's files"
            )


def write_detections(report: Report, path: Path) -> int:
    """Write the entries that were scored, image after image, from the best down.

    The official evaluator takes the 50 best entries of an image, and of equal ones those that come first: the same ones
    that are written. Scores have nine digits, which tell float32 numbers apart.

    Args:
        report: of a detection.
        path: file, replaced if there.

    Returns:
        The number of rows.
    """
    entries = report.entries
    assert entries is not None, "check_detections_file looks at the task"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = (entries.sample.tolist(), entries.corners.tolist(), entries.label.tolist(), entries.score.tolist())
    for sample, corners, label, score in zip(*columns, strict=True):
        place = [f"{value:.{DECIMALS}f}" for value in corners]
        writer.writerow([*entries.names[sample].split(","), *place, label + 1, f"{score:.9g}"])
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())
    return len(entries.sample)
