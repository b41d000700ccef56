"""EPIC-Kitchens-55 with the paper's split, and EPIC-Kitchens-100, from their CSV files.

Times come from the time stamps, never from the frame columns: those are floor(60 t) whatever the video's frame rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files, files_beside
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Row
from pipeline.annotations.text import error, parse_clock, parse_int, place, read_cells, read_table

#: The last person of the training part; P26 to P31 are the validation part (section 4, split of Baradel et al.).
LAST_TRAIN_PERSON = 25
LAST_PERSON = 31
MIN_SPAN_S = 0.001
_VIDEO_ID = re.compile(r"P([0-9]{2})_[0-9]{2,3}")


@dataclass(frozen=True)
class Edition:
    """What differs between the two editions, whose files may lie in one folder.

    Args:
        name: of the data set. id_column: column of the row's id.
        verbs, nouns: number of classes.
        class_list: pattern of the file of class names, ``{kind}`` for verb or noun.
        tests: file of a test split -> split.
        rows: split -> published rows.
    """

    name: str
    id_column: str
    verbs: int
    nouns: int
    class_list: str
    tests: dict[str, str]
    rows: dict[str, int]


EDITION_55 = Edition(
    "epic_kitchens55",
    "uid",
    125,
    352,
    r"EPIC_{kind}_classes\.csv",
    {"EPIC_test_s1_timestamps.csv": "test_s1", "EPIC_test_s2_timestamps.csv": "test_s2"},
    {"train": 23_191, "val": 5_281, "test_s1": 8_047, "test_s2": 2_929},
)
EDITION_100 = Edition(
    "epic_kitchens100",
    "narration_id",
    97,
    300,
    r"EPIC_100_{kind}_classes(_v2)?\.csv",
    {"EPIC_100_test_timestamps.csv": "test"},
    {"train": 67_217, "val": 9_668, "test": 13_092},
)


def read_epic55(annotations: Path | None, videos: Path, *, split: str = "paper") -> Annotations:
    """Read EPIC-Kitchens-55.

    Args:
        annotations: ``EPIC_train_action_labels.csv`` or the folder with it; ``EPIC_{verb,noun}_classes.csv`` beside it
            are used where they are there, and of a folder also ``EPIC_test_s{1,2}_timestamps.csv``.
        videos: folder of the videos ``Pxx_yy.*``, at any depth.
        split: ``paper``: persons P01 to P25 train, P26 to P31 val. ``all``: every labelled row is train.
    Returns:
        Rows with the label sets ``verb`` and ``noun``; splits ``train``, ``val``, ``test_s1``, ``test_s2`` (no labels).
    Raises:
        AnnotationError: a malformed line, a pickle, no labelled file, or a class list with too many names.
    """
    if split not in ("paper", "all"):
        raise AnnotationError(f"split ({split}) must be paper or all; paper is persons P01-P25 against P26-P31")
    files = annotation_files(annotations, (".csv",))
    labelled = [path for path in files if "EPIC_train_action_labels" in path.name] or _the_only(files)
    return _read(EDITION_55, labelled, files, videos, annotations, by_person=split == "paper")


def read_epic100(annotations: Path | None, videos: Path) -> Annotations:
    """Read EPIC-Kitchens-100.

    Args:
        annotations: folder with ``EPIC_100_train.csv``, ``EPIC_100_validation.csv`` and, where there,
            ``EPIC_100_test_timestamps.csv``, ``EPIC_100_{verb,noun}_classes.csv``; or one of the first three.
        videos: folder of the videos ``Pxx_yy.*`` and ``Pxx_1yy.*``, at any depth.
    Returns:
        Rows with the label sets ``verb`` and ``noun``; splits ``train``, ``val``, ``test`` (no labels).
    Raises:
        AnnotationError: a malformed line, a pickle, no labelled file, or a class list with too many names.
    """
    files = annotation_files(annotations, (".csv",))
    names = {"EPIC_100_train.csv", "EPIC_100_validation.csv"}
    labelled = [path for path in files if path.name in names] or _the_only(files)
    return _read(EDITION_100, labelled, files, videos, annotations, by_person=False)


def _the_only(files: list[Path]) -> list[Path]:
    return files if len(files) == 1 else []


def _read(
    edition: Edition, labelled: list[Path], files: list[Path], videos: Path, annotations: Path | None, by_person: bool
) -> Annotations:
    tests = {path: split for path in files if (split := edition.tests.get(path.name))}
    labelled = [path for path in labelled if path not in tests]
    if not labelled and not tests:
        raise AnnotationError(
            f"annotations ({annotations}) must hold the action labels of {edition.name} as CSV; "
            "give the folder of the official repository"
        )
    report = ReportBuilder(edition.name)
    lists = files_beside(annotations, files, (".csv",))
    classes = {
        "verb": _class_names(lists, "verb", edition, edition.verbs, report),
        "noun": _class_names(lists, "noun", edition, edition.nouns, report),
    }
    index = VideoIndex(videos, report)
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    listed: dict[str, int] = {}
    for path in [*labelled, *tests]:
        for line, segment in read_segments(path, edition, path in labelled):
            split = tests.get(path) or ("val" if "validation" in path.name else "train")
            if by_person and path in labelled:
                split = "train" if segment.person <= LAST_TRAIN_PERSON else "val"
                if segment.person > LAST_PERSON:
                    report.oddity("person outside P01 to P31, taken as val", place(path, line, segment.video))
            _add(segment, split, path, line, index, classes, rows, seen, report)
            listed[split] = listed.get(split, 0) + 1
    report.layout(f"{edition.name} CSV" + ("; split by person" if by_person else ""))
    for split, number in listed.items():
        report.count(
            f"rows of {split}", number, None if not by_person and "55" in edition.name else edition.rows[split]
        )
    return Annotations(edition.name, tuple(rows), classes, report.build(len(rows)))


@dataclass(frozen=True, slots=True)
class Segment:
    """One row: a span of a video by time stamps in seconds, and the labels where they are public."""

    id: str
    video: str
    person: int
    start_s: float
    end_s: float
    labels: dict[str, int]


def read_segments(path: Path, edition: Edition, labelled: bool) -> Iterator[tuple[int, Segment]]:
    """Yield (line, segment) of an EPIC CSV; the frame columns and the lists of all nouns are not looked at.

    Raises:
        AnnotationError: a malformed line.
    """
    required = [edition.id_column, "video_id", "start_timestamp", "stop_timestamp"]
    required += ["verb_class", "noun_class"] if labelled else []
    for line, row in read_table(path, required):
        video = row["video_id"].strip()
        match = _VIDEO_ID.fullmatch(video)
        if not match:
            raise error(path, line, "video_id", video, "look like P01_01", "correct this row")
        name = row[edition.id_column].strip()
        if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", name):
            raise error(path, line, edition.id_column, name, "be 1 to 40 letters, digits or _", "correct this row")
        start = parse_clock(row["start_timestamp"], "start_timestamp", path, line)
        stop = parse_clock(row["stop_timestamp"], "stop_timestamp", path, line)
        if stop < start:
            raise error(path, line, "stop_timestamp", row["stop_timestamp"], "not lie before the start", "correct it")
        labels: dict[str, int] = {}
        if labelled:
            labels["verb"] = parse_int(row["verb_class"], "verb_class", path, line, 0, edition.verbs - 1)
            labels["noun"] = parse_int(row["noun_class"], "noun_class", path, line, 0, edition.nouns - 1)
        yield line, Segment(name, video, int(match.group(1)), start, stop, labels)


def _add(
    segment: Segment,
    split: str,
    path: Path,
    line: int,
    index: VideoIndex,
    classes: dict[str, tuple[str, ...]],
    rows: list[Row],
    seen: set[tuple[str, str]],
    report: ReportBuilder,
) -> None:
    report.listed += 1
    if (split, segment.id) in seen:
        raise error(path, line, "id", segment.id, "be unique", "remove one of the two rows")
    seen.add((split, segment.id))
    end = segment.end_s
    if end - segment.start_s < MIN_SPAN_S:
        report.oddity("segment without length, taken as 1 ms", place(path, line, segment.id))
        end = segment.start_s + MIN_SPAN_S
    video = index.find(segment.video)
    if video is None:
        report.missing(segment.video)
        return
    labels = {name: (label,) for name, label in segment.labels.items()}
    rows.append(Row(segment.id, split, video, segment.start_s, end, labels))


def _class_names(files: list[Path], kind: str, edition: Edition, number: int, report: ReportBuilder) -> tuple[str, ...]:
    """Return the class keys of the edition's own list, or numbers where the file is not there."""
    wanted = re.compile(edition.class_list.format(kind=kind))
    found = [path for path in files if wanted.fullmatch(path.name)]
    if not found:
        shown = edition.class_list.format(kind=kind).replace("(_v2)?", "").replace("\\", "")
        report.oddity(f"no {kind} names", f"put {shown} beside the labels to see names in place of numbers")
        return tuple(f"{kind} {label}" for label in range(number))
    names = read_epic_classes(found[-1], kind)
    if len(names) > number:
        raise error(
            found[-1],
            0,
            f"{kind} names",
            str(len(names)),
            f"be at most the {number} classes of {edition.name}",
            "give the list of this edition",
        )
    report.count(f"{kind} classes", len(names), number)
    return tuple(names) + tuple(f"{kind} {label}" for label in range(len(names), number))


def read_epic_classes(path: Path, kind: str) -> list[str]:
    """Return the keys of a class list by label (columns ``verb_id,class_key`` or ``id,key``).

    Raises:
        AnnotationError: a malformed line, or ids that are not 0, 1, 2, ...
    """
    first = next(read_cells(path), (1, []))[1]
    header = [cell.strip() for cell in first]
    id_column = next((name for name in (f"{kind}_id", "id") if name in header), f"{kind}_id")
    key_column = next((name for name in ("class_key", "key") if name in header), "class_key")
    names: dict[int, str] = {}
    for line, row in read_table(path, (id_column, key_column)):
        label = parse_int(row[id_column], id_column, path, line, 0, 9_999)
        key = row[key_column].strip()
        if label in names or not key:
            raise error(path, line, "class", f"{label} {key}", "have one id and one name", "give the official file")
        names[label] = key
    if sorted(names) != list(range(len(names))) or not names:
        raise error(path, 0, "ids", f"{len(names)} of them", "be 0, 1, 2, ... without gaps", "give the official file")
    return [names[label] for label in range(len(names))]
