"""Kinetics-400, 600 and 700: official CSV, CVDF and crawler folders, and lists of ``path label``.

A clip is found by its file name ``<id>_<start>_<end>``, whatever the folders are called: CVDF's flat folders, the
crawler's class folders, class folders with underscores. Files below ``replacement_for_corrupted_k400`` win.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.kinetics_lists import (
    OTHER_CLASS,
    SPLITS,
    names_split,
    part,
    read_class_names,
    rows_of_lists,
    split_of_name,
)
from pipeline.annotations.report import ReportBuilder, note_partial_classes
from pipeline.annotations.rows import AnnotationError, Annotations, Row
from pipeline.annotations.text import error, parse_float, place, read_cells, read_lines, read_table

#: Rows of the official files of 2017, 2018 and 2019, by number of classes and split; later editions differ.
PUBLISHED = {
    400: {"train": 246_534, "val": 19_906},
    600: {"train": 392_622, "val": 30_000},
    700: {"train": 545_317, "val": 35_000},
}
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of an official CSV: a span of a YouTube video, in whole or fractional seconds."""

    label: str | None
    youtube_id: str
    start_s: float
    end_s: float
    split: str
    path: Path
    line: int

    @property
    def name(self) -> str:
        """File name of the trimmed clip, without suffix."""
        return f"{self.youtube_id}_{int(self.start_s):06d}_{int(self.end_s):06d}"


def read_kinetics(
    annotations: Path | None,
    videos: Path,
    *,
    num_classes: int = 400,
    classes: Path | None = None,
    untrimmed: bool = False,
    dataset: str = "",
) -> Annotations:
    """Read Kinetics from the official CSV files or from lists of ``path label``, told apart by the first line.

    Args:
        annotations: one file, or a folder with ``train``, ``val`` and ``test`` in the file names.
        videos: folder of the clips, in any of the usual layouts.
        num_classes: 400, 600 or 700; published counts and the length of the class list are checked against it.
        classes: text file with one class name a line; the label is the line's position. Without it: the sorted names.
        untrimmed: files are whole YouTube videos called ``<id>.*``; the CSV's times cut the clip out of them.
        dataset: name in the report and the store.
    Returns:
        Rows with the label set ``action``; splits ``train``, ``val``, ``test``.
    Raises:
        AnnotationError: a malformed line, a path outside ``videos``, or no annotation file.
    """
    report = ReportBuilder(dataset or f"kinetics{num_classes}")
    rows, names = read_rows(annotations, videos, report, num_classes, classes, untrimmed)
    return Annotations(report.dataset, tuple(rows), {"action": tuple(names)}, report.build(len(rows)))


def read_rows(
    annotations: Path | None,
    videos: Path,
    report: ReportBuilder,
    num_classes: int,
    classes: Path | None,
    untrimmed: bool,
    keep: frozenset[str] | None = None,
) -> tuple[list[Row], list[str]]:
    """Return the rows and the sorted class names; arguments as in ``read_kinetics``.

    Args:
        keep: names of the classes whose rows are wanted, the others being counted as dropped; None: all.
    Raises:
        AnnotationError: as ``read_kinetics``.
    """
    files = [
        path
        for path in annotation_files(annotations, (".csv", ".txt", ".list"))
        if classes is None or path.resolve() != classes.resolve()
    ]
    names = read_class_names(classes) if classes else None
    index = VideoIndex(videos, report)
    tables, lists = _by_kind(files, report)
    clips = [clip for path in tables for clip in read_clips(path, report)]
    if not clips and not lists:
        raise AnnotationError(
            f"annotations ({annotations}) must hold a CSV with the columns {','.join(_COLUMNS)} or a list of "
            "'path label'; give the official files"
        )
    if clips and lists:
        raise AnnotationError(
            f"annotations ({annotations}) must be CSV files or lists, not both ({lists[0].name}); give one kind"
        )
    if lists:
        rows, names = rows_of_lists(lists, videos, index, names, num_classes, keep, report)
    else:
        if names is None:
            names = sorted({clip.label for clip in clips if clip.label is not None})
            note_partial_classes(report, names, num_classes, "give classes=FILE with all names")
        for split, number in Counter(clip.split for clip in clips).items():
            report.count(f"rows of {split}", number, PUBLISHED.get(num_classes, {}).get(split))
        rows = _rows_of_clips(clips, index, names, untrimmed, keep, report)
    report.count("classes", len(names), num_classes)
    if keep is None:
        index.note_unused()
    return rows, names


def _by_kind(files: Sequence[Path], report: ReportBuilder) -> tuple[list[Path], list[Path]]:
    """Return the CSV files and the lists; what is neither is reported, or an error if its name tells a split."""
    tables: list[Path] = []
    lists: list[Path] = []
    for path in files:
        kind = detect(path)
        if kind == "csv":
            tables.append(path)
        elif kind == "list" and (len(files) == 1 or names_split(path)):
            lists.append(path)
        elif kind == "other" and len(files) > 1 and names_split(path):
            rule = f"be the header {','.join(_COLUMNS)}, a row under it, or 'path label'"
            line, text = _first_line(path)
            raise error(path, line, "first line", text, rule, "give the official file, or move this one elsewhere")
        else:
            report.oddity("file not read: no CSV of clips, no list of a split", path.name)
    return tables, lists


def _first_line(path: Path) -> tuple[int, str]:
    """Return number and text of the first line that is not empty; (0, "") if there is none."""
    return next(((line, text.strip()) for line, text in read_lines(path) if text.strip()), (0, ""))


def detect(path: Path) -> str:
    """Return ``csv``, ``list``, ``addresses`` (of downloads) or ``other`` by the first line that is not empty."""
    _, text = _first_line(path)
    try:
        cells = [cell.strip() for cell in next(csv.reader([text], strict=True), [])]
    except csv.Error:
        cells = []
    if "youtube_id" in cells or _first_column(cells) is not None:
        return "csv"
    if re.fullmatch(r"-?[0-9]{1,9}", part(text)[1]):
        return "list"
    return "addresses" if re.match(r"(https?|s3)://", text) else "other"


def _first_column(cells: Sequence[str]) -> int | None:
    """Return which of ``label,youtube_id,time_start,...`` a row without header starts with, or None."""
    for position in (0, 1):
        span = cells[position + 1 : position + 3]
        if len(span) == 2 and _YOUTUBE_ID.fullmatch(cells[position]) and all(cell.strip().isdecimal() for cell in span):
            return 1 - position
    return None


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV with or without header (CVDF's lists of Kinetics-600 have none)."""
    cells = read_cells(path)
    first = next(cells, None)
    if first is None:
        return
    has_header = "youtube_id" in [cell.strip() for cell in first[1]]
    columns = _COLUMNS[_first_column(first[1]) or 0 :]
    header = first if has_header else (0, list(columns[: len(first[1])]))

    def rows() -> Iterator[tuple[int, list[str]]]:
        yield header
        if not has_header and first is not None:
            yield first
        yield from cells

    yield from read_table(path, ("youtube_id", "time_start", "time_end"), rows())


def read_clips(path: Path, report: ReportBuilder) -> Iterator[Clip]:
    """Yield the rows of an official CSV; a row whose id a spreadsheet destroyed (``#NAME?``) is counted and left out.

    Raises:
        AnnotationError: a malformed line.
    """
    for line, row in _table(path):
        report.listed += 1
        youtube_id = row["youtube_id"].strip()
        if youtube_id.startswith("#"):
            report.oddity("id destroyed by a spreadsheet", place(path, line, youtube_id))
            report.drop("id destroyed by a spreadsheet")
            continue
        if not _YOUTUBE_ID.fullmatch(youtube_id):
            raise error(path, line, "youtube_id", youtube_id, "be 11 letters, digits, - or _", "correct this row")
        start = parse_float(row["time_start"], "time_start", path, line, 0, 999_999)
        end = parse_float(row["time_end"], "time_end", path, line, 0, 999_999)
        if not start < end:
            raise error(
                path, line, "time_end", row["time_end"], f"lie after time_start ({start:g})", "correct this row"
            )
        label = row["label"].strip().strip('"').strip() if "label" in row else None
        if label == "":
            raise error(path, line, "label", "", "not be empty", "remove the column or correct this row")
        told = row.get("split", "").strip().lower()
        if told and told not in SPLITS:
            raise error(path, line, "split", told, "be train, val, validate or test", "correct this row")
        yield Clip(label, youtube_id, start, end, SPLITS[told] if told else split_of_name(path), path, line)


def _rows_of_clips(
    clips: Sequence[Clip],
    index: VideoIndex,
    names: Sequence[str],
    untrimmed: bool,
    keep: frozenset[str] | None,
    report: ReportBuilder,
) -> list[Row]:
    report.layout("official CSV")
    label_of = {name: label for label, name in enumerate(names)}
    seen: dict[tuple[str, str], str | None] = {}
    by_id: dict[str, str] = {}
    rows: list[Row] = []
    for clip in clips:
        if keep is not None and clip.label not in keep:
            report.drop(OTHER_CLASS)
            continue
        sample = _unique_id(clip, seen, report)
        if sample is None:
            continue
        known = by_id.setdefault(clip.youtube_id, clip.name)
        if known != clip.name:
            report.oddity("YouTube id with several clips", place(clip.path, clip.line, clip.youtube_id))
        if clip.label is not None and clip.label not in label_of:
            raise error(
                clip.path, clip.line, "label", clip.label, "be in the class list", "give the list of this version"
            )
        labels = {"action": (label_of[clip.label],)} if clip.label is not None else {}
        video = _find(clip, index, untrimmed, report)
        if video is None:
            report.missing(clip.name)
        elif untrimmed:
            rows.append(Row(sample, clip.split, video, clip.start_s, clip.end_s, labels))
        else:
            rows.append(Row(sample, clip.split, video, labels=labels))
    return rows


def _unique_id(clip: Clip, seen: dict[tuple[str, str], str | None], report: ReportBuilder) -> str | None:
    """Return an id unique in its split, or None for a row that repeats another one exactly."""
    sample, copy = clip.name, 1
    while (clip.split, sample) in seen:
        if seen[clip.split, sample] == clip.label:
            report.oddity("row repeated", place(clip.path, clip.line, clip.name))
            report.drop("row repeated")
            return None
        copy += 1
        sample = f"{clip.name}#{copy}"
    if copy > 1:
        report.oddity("clip with two labels, both kept", place(clip.path, clip.line, clip.name))
    seen[clip.split, sample] = clip.label
    return sample


def _find(clip: Clip, index: VideoIndex, untrimmed: bool, report: ReportBuilder) -> str | None:
    folder = (clip.label or "").replace("_", " ")

    def rank(path: str) -> int:
        """Rank replacements first, then the folder of the label, then that of the split."""
        parts = path.split("/")[:-1]
        if any(part.startswith("replacement") for part in parts):
            return 0
        if any(part.replace("_", " ") == folder for part in parts):
            return 1
        return 2 if clip.split in parts else 3

    video = index.find(clip.youtube_id if untrimmed else clip.name, rank)
    if video is None:
        if not untrimmed and clip.youtube_id in index:
            kind = "file named by id alone (whole videos? then say untrimmed=true; else rename)"
            report.oddity(kind, place(clip.path, clip.line, clip.youtube_id))
        return None
    parts = video.split("/")[:-1]
    if any(part.startswith("replacement") for part in parts):
        report.layout("replacements of corrupted clips")
    elif clip.label in parts:
        report.layout("class folders")
    elif any(part.replace("_", " ") == folder for part in parts):
        report.layout("class folders with underscores")
    else:
        report.layout("whole videos" if untrimmed else "flat folders")
    return video
