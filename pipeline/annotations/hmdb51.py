"""HMDB51: ``testTrainMulti_7030_splits/<class>_test_split{1,2,3}.txt`` with the flags 1 train, 2 test, 0 unused.

The official test parts are what the paper evaluates on: split x becomes ``train<x>`` and ``val<x>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.report import ReportBuilder, note_partial_classes
from pipeline.annotations.rows import AnnotationError, Annotations, Row, confine
from pipeline.annotations.text import error, read_lines

NUM_CLASSES = 51
PUBLISHED_TRAIN, PUBLISHED_VAL, PUBLISHED_VIDEOS = 3_570, 1_530, 6_766
PART_OF_FLAG = {"1": "train", "2": "val", "0": ""}
_LIST = re.compile(r"(.+)_test_split([1-3])\.txt", re.IGNORECASE)


def read_hmdb51(annotations: Path | None, videos: Path, *, split: int = 0) -> Annotations:
    """Read HMDB51.

    Args:
        annotations: folder with the split files (``testTrainMulti_7030_splits``, unpacked from the .rar).
        videos: folder of the videos, in class folders or flat, as .avi or converted.
        split: 1, 2 or 3 for one of the official splits; 0 for all of them in one store.
    Returns:
        Rows with the label set ``action`` (sorted class names); splits ``train1``, ``val1``, ...
    Raises:
        AnnotationError: a malformed line, or no split file.
    """
    if split not in (0, 1, 2, 3):
        raise AnnotationError(
            f"split ({split}) must be 1, 2, 3, or 0 for all; the paper's number is the mean of the three"
        )
    files = annotation_files(annotations, (".txt",))
    lists = {path: match for path in files if (match := _LIST.fullmatch(path.name))}
    if not lists:
        raise AnnotationError(
            f"annotations ({annotations}) must hold <class>_test_split1.txt and so on; unpack test_train_splits.rar"
        )
    if split and not any(int(match.group(2)) == split for match in lists.values()):
        there = ", ".join(sorted({match.group(2) for match in lists.values()}))
        raise AnnotationError(
            f"split ({split}) must be one whose lists are in {annotations}: {there}; unpack the whole .rar"
        )
    names = sorted({match.group(1) for match in lists.values()})
    label_of = {name: label for label, name in enumerate(names)}
    report = ReportBuilder("hmdb51")
    report.layout("official split files")
    report.count("classes", len(names), NUM_CLASSES)
    note_partial_classes(report, names, NUM_CLASSES, "give the split files of all classes")
    index = VideoIndex(videos, report)
    rows: list[Row] = []
    used: dict[str, int] = {}
    listed: set[str] = set()
    for path, match in lists.items():
        if split not in (0, int(match.group(2))):
            continue
        folder = match.group(1)
        for _, video, flag in read_split(path):
            report.listed += 1
            listed.add(f"{folder}/{video}")
            if not PART_OF_FLAG[flag]:
                report.drop("unused by its split (flag 0)")
                continue
            name = PART_OF_FLAG[flag] + match.group(2)
            used[name] = used.get(name, 0) + 1
            found = _find(index, video, folder, set(names))
            if found is None:
                report.missing(f"{folder}/{video}")
            else:
                rows.append(Row(f"{folder}/{video}", name, found, labels={"action": (label_of[folder],)}))
    for name, number in sorted(used.items()):
        report.count(f"rows of {name}", number, PUBLISHED_TRAIN if name.startswith("train") else PUBLISHED_VAL)
    report.count("videos", len(listed), PUBLISHED_VIDEOS)
    rows.sort(key=lambda row: row.split)
    return Annotations("hmdb51", tuple(rows), {"action": tuple(names)}, report.build(len(rows)))


def _find(index: VideoIndex, video: str, folder: str, classes: set[str]) -> str | None:
    """Return the file in its class folder, or outside any; never one in the folder of another class."""
    found = index.find(video, lambda candidate: 0 if folder in candidate.split("/") else 1)
    if found is None or folder in (parts := found.split("/")) or classes.isdisjoint(parts):
        return found
    return None


def read_split(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, file name, flag) of a split file; the last blank parts name and flag, trailing blanks are ignored.

    Raises:
        AnnotationError: a malformed line, a name with a folder in it, another flag than 0, 1, 2, or a video twice.
    """
    seen: set[str] = set()
    for line, text in read_lines(path):
        if not text.strip():
            continue
        name, _, flag = text.strip().rpartition(" ")
        name = name.strip()
        if flag not in PART_OF_FLAG:
            raise error(path, line, "flag", flag, "be 1 (train), 2 (test) or 0 (unused)", "correct this row")
        try:
            plain = confine(name) == name and "/" not in name
        except AnnotationError as problem:
            raise AnnotationError(f"{path}:{line}: {problem}") from problem
        if not plain or name in seen:
            raise error(path, line, "video", name, "be a plain file name, listed once", "correct this row")
        seen.add(name)
        yield line, name, flag
