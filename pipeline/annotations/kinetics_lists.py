"""Lists of ``path label`` (PySlowFast, mmaction) and of class names: text without header, one entry a line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.annotations.files import VideoIndex
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Row, confine
from pipeline.annotations.text import error, parse_int, place, read_lines

SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test", "holdout": "test"}
UNKNOWN_LABEL = -1
OTHER_CLASS = "not one of the wanted classes"
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|validate|validation|val|test|holdout)", re.IGNORECASE)


def names_split(path: Path) -> bool:
    """Return whether a file's name tells a split."""
    return _SPLIT_IN_NAME.search(path.name) is not None


def read_class_names(path: Path) -> list[str]:
    """Return the class names of a text file, one a line, the position being the label.

    Raises:
        AnnotationError: an empty file, an empty name, or a name twice.
    """
    names = [(line, text.strip()) for line, text in read_lines(path)]
    while names and not names[-1][1]:
        names.pop()
    seen: set[str] = set()
    for line, name in names:
        if not name or name in seen:
            raise error(path, line, "class name", name, "be there and differ from the others", "correct the list")
        seen.add(name)
    if not names:
        raise error(path, 0, "class list", "", "have one name a line", "write the names in the order of the labels")
    return [name for _, name in names]


def split_of_name(path: Path) -> str:
    """Return the split that a file's name tells.

    Raises:
        AnnotationError: the name tells none.
    """
    match = _SPLIT_IN_NAME.search(path.name)
    if not match:
        raise error(path, 0, "file name", path.name, "contain train, val or test", "rename the file")
    return SPLITS[match.group(1).lower()]


def part(text: str) -> tuple[str, str]:
    """Return what stands before and after the last blank; paths may hold blanks of their own."""
    parts = text.rsplit(None, 1)
    return (parts[0].strip(), parts[1]) if len(parts) == 2 else ("", "")


def read_list(path: Path, videos: Path) -> Iterator[tuple[int, str, int]]:
    """Yield (line, path relative to ``videos``, label) of a list of ``path label``; the last blank parts the two.

    The label -1 means that it is not known, as in lists of a test split.

    Raises:
        AnnotationError: a malformed line or a path outside the folder of videos.
    """
    for line, text in read_lines(path):
        if not text.strip():
            continue
        name, number = part(text)
        if not name:
            raise error(path, line, "line", text, "be 'path label' with one blank", "correct this row")
        label = parse_int(number, "label", path, line, UNKNOWN_LABEL, 99_999)
        try:
            yield line, confine(name.strip('"'), videos), label
        except AnnotationError as problem:
            raise AnnotationError(f"{path}:{line}: {problem}") from problem


def rows_of_lists(
    files: Sequence[Path],
    videos: Path,
    index: VideoIndex,
    names: list[str] | None,
    num_classes: int,
    keep: frozenset[str] | None,
    report: ReportBuilder,
) -> tuple[list[Row], list[str]]:
    """Return the rows of lists and the class names.

    Args:
        files: the lists, with the split in their names.
        videos: folder of the videos. index: what lies in it.
        names: class names by label, or None: they are called by number.
        num_classes: least length of the class list.
        keep: names of the classes whose rows are wanted; None: all.
        report: what was found is added to it.
    Raises:
        AnnotationError: a malformed line, a path outside the folder of videos, a label without a name.
    """
    report.layout("lists of 'path label'")
    reader = _ListRows(index, report)
    highest = -1
    for path in files:
        split = split_of_name(path)
        for line, video, label in read_list(path, videos):
            report.listed += 1
            highest = max(highest, label)
            if names is not None and label >= len(names):
                rule = f"be below {len(names)}"
                raise error(path, line, "label", str(label), rule, "give the list's own class names")
            if keep is not None and (names is None or label == UNKNOWN_LABEL or names[label] not in keep):
                report.drop(OTHER_CLASS)
            else:
                reader.add(split, video, label, path, line)
    if names is None:
        report.oddity("no class names", "give classes=FILE with one name a line to see names in place of numbers")
        names = [f"class {label}" for label in range(max(num_classes, highest + 1))]
    return reader.rows, names


class _ListRows:
    """Rows in the order of the lists, each file once a split; what is left out is reported."""

    def __init__(self, index: VideoIndex, report: ReportBuilder) -> None:
        self._index, self._report = index, report
        self._seen: dict[tuple[str, str], int] = {}
        self._taken: dict[tuple[str, str], tuple[str, int]] = {}  # file -> how the list names it, label
        self.rows: list[Row] = []

    def add(self, split: str, video: str, label: int, path: Path, line: int) -> None:
        """Take a line of the list `path`, unless its file is missing or was listed before."""
        if (split, video) in self._seen:
            same = self._seen[split, video] == label
            kind = "row repeated" if same else "path with two labels, the first kept"
            self._report.oddity(kind, place(path, line, video))
            self._report.drop(kind)
            return
        self._seen[split, video] = label
        found = self._index.find_path(video)
        if found is None:
            self._report.missing(video)
            return
        if self._taken.setdefault((split, found), (video, label))[0] != video:
            other, its_label = self._taken[split, found]
            kind = f"file listed before with {'the same' if its_label == label else 'another'} label"
            self._report.oddity(kind, place(path, line, f"{video} -> {found}, as {other}"))
            self._report.drop(kind)
            return
        if found != video:
            self._report.oddity("path not as listed, taken by its name", place(path, line, f"{video} -> {found}"))
        self.rows.append(Row(video, split, found, labels={} if label == UNKNOWN_LABEL else {"action": (label,)}))
