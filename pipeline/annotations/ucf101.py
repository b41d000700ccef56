"""UCF101: ``classInd.txt`` and the three splits ``trainlist0x.txt`` and ``testlist0x.txt``.

The official test lists are what the paper evaluates on: split x becomes ``train<x>`` and ``val<x>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Row, confine
from pipeline.annotations.text import error, parse_int, place, read_class_names, read_lines

NUM_CLASSES = 101
PUBLISHED = {"train1": 9_537, "val1": 3_783, "train2": 9_586, "val2": 3_734, "train3": 9_624, "val3": 3_696}
PUBLISHED_VIDEOS = 13_320
_LIST = re.compile(r"(train|test)list0([1-3])\.txt", re.IGNORECASE)


def read_ucf101(annotations: Path | None, videos: Path, *, split: int = 0) -> Annotations:
    """Read UCF101.

    Args:
        annotations: folder with ``classInd.txt`` and the lists (``ucfTrainTestlist``).
        videos: folder of the videos, in class folders or flat, as .avi or converted.
        split: 1, 2 or 3 for one of the official splits; 0 for all of them in one store.
    Returns:
        Rows with the label set ``action``; splits ``train1``, ``val1``, ... (``val`` = the official test lists).
    Raises:
        AnnotationError: a malformed line, a class that is not in ``classInd.txt``, or no list.
    """
    if split not in (0, 1, 2, 3):
        raise AnnotationError(
            f"split ({split}) must be 1, 2, 3, or 0 for all; the paper's number is the mean of the three"
        )
    files = annotation_files(annotations, (".txt",))
    lists = {path: match for path in files if (match := _LIST.fullmatch(path.name))}
    lists = {path: match for path, match in lists.items() if split in (0, int(match.group(2)))}
    class_files = [path for path in files if path.name.lower() == "classind.txt"]
    if not lists or not class_files:
        wanted = f"trainlist0{split or 'x'}.txt / testlist0{split or 'x'}.txt"
        raise AnnotationError(
            f"annotations ({annotations}) must hold classInd.txt and {wanted}; "
            "unpack UCF101TrainTestSplits-RecognitionTask.zip"
        )
    have = {(match.group(1).lower(), int(match.group(2))) for match in lists.values()}
    missing = [
        f"{kind}list0{n}.txt"
        for n in sorted({n for _, n in have})
        for kind in ("train", "test")
        if (kind, n) not in have
    ]
    if missing:
        raise AnnotationError(
            f"annotations ({annotations}) must hold {', '.join(missing)}: a split has both lists; "
            "unpack UCF101TrainTestSplits-RecognitionTask.zip"
        )
    report = ReportBuilder("ucf101")
    report.layout("official lists")
    names = read_class_index(class_files[0])
    report.count("classes", len(names), NUM_CLASSES)
    index = VideoIndex(videos, report, ignore_case=True)
    rows: list[Row] = []
    listed: set[str] = set()
    for path, match in lists.items():
        name = ("train" if match.group(1).lower() == "train" else "val") + match.group(2)
        number = 0
        for line, video, label in read_list(path, names):
            number += 1
            listed.add(video)
            _add(name, video, label, path, line, index, rows, report)
        report.count(f"rows of {name}", number, PUBLISHED[name])
    if split == 0:
        report.count("videos", len(listed), PUBLISHED_VIDEOS)
    return Annotations("ucf101", tuple(rows), {"action": tuple(names)}, report.build(len(rows)))


def _add(
    split: str, video: str, label: int, path: Path, line: int, index: VideoIndex, rows: list[Row], report: ReportBuilder
) -> None:
    report.listed += 1
    folder, _, file = video.rpartition("/")
    found = index.find(file, lambda candidate: folder.casefold() not in candidate.casefold().split("/"))
    if found is None:
        report.missing(video)
        return
    if found.rpartition("/")[2] != file:
        report.oddity("file called differently (case or suffix)", place(path, line, f"{video} -> {found}"))
    rows.append(Row(video, split, found, labels={"action": (label,)}))


def read_class_index(path: Path) -> list[str]:
    """Return the names of ``classInd.txt`` (``1 ApplyEyeMakeup``) by label from 0.

    Raises:
        AnnotationError: a malformed line, a name twice, or numbers that are not 1, 2, 3, ...
    """
    return read_class_names(path, lambda label: str(label + 1), r"\S+", once=True)


def read_list(path: Path, names: list[str]) -> Iterator[tuple[int, str, int]]:
    """Yield (line, ``Class/file.avi``, label from 0) of a train list (with the number from 1) or test list (without).

    Raises:
        AnnotationError: a malformed line, a path that leaves the folder, an unknown class, a number that contradicts
            the folder, or a video twice.
    """
    label_of = {name.casefold(): label for label, name in enumerate(names)}
    seen: set[str] = set()
    for line, text in read_lines(path):
        parts = text.split()
        if not parts:
            continue
        if len(parts) > 2:
            raise error(path, line, "line", text, "be 'Class/file.avi number' or 'Class/file.avi'", "correct this row")
        try:
            video = confine(parts[0])
        except AnnotationError as problem:
            raise AnnotationError(f"{path}:{line}: {problem}") from problem
        folder = video.rpartition("/")[0]
        label = label_of.get(folder.casefold())
        if label is None:
            raise error(path, line, "class folder", folder, "be in classInd.txt", "give the list of the same release")
        if len(parts) == 2 and parse_int(parts[1], "class number", path, line, 1, len(names)) != label + 1:
            raise error(path, line, "class number", parts[1], f"be {label + 1}, that of {folder}", "correct this row")
        if video in seen:
            raise error(path, line, "video", video, "be listed once", "remove one of the two rows")
        seen.add(video)
        yield line, video, label
