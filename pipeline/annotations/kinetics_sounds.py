"""Kinetics-Sounds: the 32 classes of Kinetics-400 that can be seen and heard (appendix B of the paper)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.annotations.kinetics import read_rows
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations

#: The paper's classes, in the order of their labels (sorted).
CLASSES = (
    "blowing nose",
    "blowing out candles",
    "bowling",
    "chopping wood",
    "dribbling basketball",
    "laughing",
    "mowing lawn",
    "playing accordion",
    "playing bagpipes",
    "playing bass guitar",
    "playing clarinet",
    "playing drums",
    "playing guitar",
    "playing harmonica",
    "playing keyboard",
    "playing organ",
    "playing piano",
    "playing saxophone",
    "playing trombone",
    "playing trumpet",
    "playing violin",
    "playing xylophone",
    "ripping paper",
    "shoveling snow",
    "shuffling cards",
    "singing",
    "stomping grapes",
    "strumming guitar",
    "tap dancing",
    "tapping guitar",
    "tapping pen",
    "tickling",
)
PUBLISHED_VAL_ROWS = 1_594
NUM_KINETICS_CLASSES = 400


def read_kinetics_sounds(
    annotations: Path | None, videos: Path, *, classes: Path | None = None, untrimmed: bool = False
) -> Annotations:
    """Read the 32 classes out of the files of Kinetics-400.

    Args:
        annotations: the files of Kinetics-400, as ``read_kinetics`` takes them; lists need ``classes``.
        videos: folder of the clips.
        classes: text file with one class name of Kinetics-400 a line; without it: the sorted names.
        untrimmed: files are whole YouTube videos called ``<id>.*``.
    Returns:
        Rows with two label sets: ``action``, the label among the classes of Kinetics-400 (to evaluate a model of
        Kinetics-400 on this subset), and ``sounds``, the label among the 32 (to train on the subset alone).
    Raises:
        AnnotationError: a malformed line, none of the 32 classes is there, or without ``classes`` not all 400 of
            Kinetics-400: ``action`` would be other labels than those of its models.
    """
    report = ReportBuilder("kinetics_sounds")
    wanted = frozenset(CLASSES)
    found, kinetics_names = read_rows(annotations, videos, report, NUM_KINETICS_CLASSES, classes, untrimmed, wanted)
    sound_of = {kinetics_names.index(name): label for label, name in enumerate(CLASSES) if name in kinetics_names}
    if not sound_of:
        raise AnnotationError(
            f"classes of {annotations} ({', '.join(kinetics_names[:3])}, ...) must contain the 32 of Kinetics-Sounds; "
            "give the official CSV of Kinetics-400, or classes=FILE with its class names beside a list"
        )
    if classes is None and len(kinetics_names) != NUM_KINETICS_CLASSES:
        raise AnnotationError(
            f"classes of {annotations} ({len(kinetics_names)}) must be all {NUM_KINETICS_CLASSES} of Kinetics-400, or "
            "the labels are not those of its models; give the whole official CSV, or classes=FILE with all names"
        )
    rows = [replace(row, labels={**row.labels, "sounds": (sound_of[row.labels["action"][0]],)}) for row in found]
    report.count("classes of Kinetics-Sounds", len(sound_of), len(CLASSES))
    for split, number in Counter(row.split for row in rows).items():
        report.count(f"clips of {split}", number, PUBLISHED_VAL_ROWS if split == "val" else None)
    labels = {"action": tuple(kinetics_names), "sounds": CLASSES}
    return Annotations(report.dataset, tuple(rows), labels, report.build(len(rows)))
