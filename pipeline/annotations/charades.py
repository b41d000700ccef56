"""Charades: ``Charades_v1_{train,test}.csv`` and ``Charades_v1_classes.txt``.

The official ``test`` part is what the paper evaluates on, so its split is ``val`` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files, files_beside
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Row, TimedLabel
from pipeline.annotations.text import error, parse_float, parse_int, place, read_class_names, read_table

NUM_CLASSES = 157
PUBLISHED = {"train": 7_985, "val": 1_863}
PUBLISHED_ACTIONS = {"train": 49_809, "val": 16_691}
_ACTION = re.compile(r"c([0-9]{3}) (\S+) (\S+)")
_ID = re.compile(r"[A-Za-z0-9]{1,16}")


def read_charades(annotations: Path | None, videos: Path) -> Annotations:
    """Read Charades.

    Args:
        annotations: folder with ``Charades_v1_train.csv``, ``Charades_v1_test.csv`` and ``Charades_v1_classes.txt``,
            or one of the CSV files, beside which the class list is looked for.
        videos: folder of the videos ``<id>.*`` (``Charades_v1`` or ``Charades_v1_480``; frames have no sound).
    Returns:
        One row a video: label set ``action`` = union over the video, ``actions`` = the labels with their times.
    Raises:
        AnnotationError: a malformed line, or no CSV.
    """
    files = annotation_files(annotations, (".csv", ".txt"))
    tables = {path: split for path in files if (split := _split_of(path))}
    if not tables:
        raise AnnotationError(
            f"annotations ({annotations}) must hold Charades_v1_train.csv or Charades_v1_test.csv; unpack Charades.zip"
        )
    report = ReportBuilder("charades")
    report.layout("official CSV")
    near = files_beside(annotations, files, (".txt",))
    lists = [path for path in near if re.fullmatch(r"Charades_v1_classes\.txt", path.name, re.IGNORECASE)]
    if lists:
        names = read_charades_classes(lists[0])
        report.count("classes", len(names), NUM_CLASSES)
    else:
        report.oddity("no class names", "put Charades_v1_classes.txt beside the CSV to see names in place of numbers")
        names = [f"class {label}" for label in range(NUM_CLASSES)]
    index = VideoIndex(videos, report)
    rows: list[Row] = []
    for path, split in tables.items():
        number = actions = 0
        for _, row in read_videos(path, split, len(names), report):
            number += 1
            actions += len(row.actions)
            report.listed += 1
            video = index.find(row.id)
            if video is None:
                report.missing(row.id)
            else:
                rows.append(Row(row.id, split, video, labels=row.labels, actions=row.actions))
        report.count(f"videos of {split}", number, PUBLISHED[split])
        report.count(f"actions of {split}", actions, PUBLISHED_ACTIONS[split])
    return Annotations("charades", tuple(rows), {"action": tuple(names)}, report.build(len(rows)))


def _split_of(path: Path) -> str | None:
    if path.suffix.lower() != ".csv":
        return None
    name = path.name.lower()
    return "train" if name.endswith("_train.csv") else "val" if name.endswith(("_test.csv", "_val.csv")) else None


def read_videos(path: Path, split: str, num_classes: int, report: ReportBuilder) -> Iterator[tuple[int, Row]]:
    """Yield (line, row) of a Charades CSV; the row's ``video`` is still the bare id.

    An action that ends after the video is kept as annotated and counted: the union over a clip does not depend on it.

    Raises:
        AnnotationError: a malformed line, or an id twice.
    """
    seen: set[str] = set()
    for line, cells in read_table(path, ("id", "actions", "length")):
        name = cells["id"].strip()
        if not _ID.fullmatch(name) or name in seen:
            raise error(path, line, "id", name, "be up to 16 letters and digits, each video once", "correct this row")
        seen.add(name)
        length = parse_float(cells["length"], "length", path, line, 0, 86_400)
        actions: list[TimedLabel] = []
        for text in filter(None, (part.strip() for part in cells["actions"].split(";"))):
            match = _ACTION.fullmatch(text)
            if not match:
                raise error(path, line, "action", text, "look like 'c092 11.90 21.20'", "correct this row")
            label = parse_int(match.group(1), "class", path, line, 0, num_classes - 1)
            start = parse_float(match.group(2), "start", path, line, 0, 86_400)
            end = parse_float(match.group(3), "end", path, line, 0, 86_400)
            if end < start:
                report.oddity("action that ends before it starts, turned round", place(path, line, f"{name} {text}"))
                start, end = end, start
            if end > length:
                report.oddity("action that ends after the video", place(path, line, f"{name} {text}, length {length}"))
            actions.append(TimedLabel(label, start, end))
        if not actions:
            report.oddity("video without actions", place(path, line, name))
        labels = {"action": tuple(sorted({action.label for action in actions}))}
        yield line, Row(name, split, name, labels=labels, actions=tuple(actions))


def read_charades_classes(path: Path) -> list[str]:
    """Return the names of ``Charades_v1_classes.txt`` (``c000 Holding some clothes``) by label.

    Raises:
        AnnotationError: a malformed line, or numbers that are not 0, 1, 2, ...
    """
    return read_class_names(path, "c{:03d}".format, r"\S|\S.*\S")
