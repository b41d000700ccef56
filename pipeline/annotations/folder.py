"""Any folder of videos: class folders, flat and without labels, or with a CSV ``path,label[,split]``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.layout import VAL_SHARE, Entry, empty_class_folders, is_val, sort_by_folders
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Row, confine
from pipeline.annotations.text import error, place, read_cells, read_table

COLUMNS = ("path", "label", "split")


def read_folder(
    annotations: Path | None, videos: Path, *, val_fraction: float = VAL_SHARE, seed: int = 0
) -> Annotations:
    """Read a folder of videos of one's own.

    Without a CSV the folders decide: ``<class>/<file>``, or ``train/<class>/<file>`` and ``val/<class>/<file>``, or
    files without class folders, which get no labels (``layout.sort_by_folders``). Without a split column or split
    folders, the validation part is drawn by a hash of seed and path: the same on every machine, and further videos move
    no other one. So a class of few videos may get none in ``val``, which the report says.

    Args:
        annotations: CSV with the columns ``path``, ``label`` and, if wanted, ``split``; None: the folders decide.
        videos: folder of the videos, which the paths are relative to.
        val_fraction: chance of each video to go to ``val``, in [0, 1); 0: everything is ``train``.
        seed: another number draws another validation part.
    Returns:
        Rows with the label set ``action`` (sorted class names; none where there are no labels).
    Raises:
        AnnotationError: a malformed line, a path outside ``videos``, mixed layouts, or no videos.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise AnnotationError(f"val_fraction ({val_fraction}) must lie in [0, 1); {VAL_SHARE:g} is the default")
    report = ReportBuilder("folder")
    index = VideoIndex(videos, report)
    for path in index.pictures:
        report.oddity("picture among the videos, not used", path)
    if annotations is None and index.paths:
        for path in empty_class_folders(index.paths, index.folders):
            report.oddity("class folder without videos", path)
        words, entries = sort_by_folders(videos, index.paths)
        report.layout(words)
        report.listed = len(entries)
    elif annotations is None:
        unused = "; ".join(kind for kind in report.build(0).oddities)
        raise AnnotationError(
            f"videos ({videos}) must hold video files or class folders with them{unused and f' ({unused})'}; "
            "check --videos"
        )
    else:
        report.layout("CSV of paths and labels")
        files = annotation_files(annotations, (".csv",), depth=0)
        entries = _of_tables(files, videos, index, report)
        if not report.listed:
            raise AnnotationError(f"annotations ({annotations}) must list videos; add rows path,label[,split]")
    names = sorted({label for _, label, _ in entries if label is not None})
    label_of = {name: label for label, name in enumerate(names)}
    splits = _draw(entries, val_fraction, seed, report)
    rows = [
        Row(video, split, video, labels={"action": (label_of[label],)} if label is not None else {})
        for (video, label, _), split in zip(entries, splits, strict=True)
    ]
    for split in sorted(set(splits)):
        report.count(f"videos of {split}", splits.count(split))
    report.count("classes", len(names))
    return Annotations("folder", tuple(rows), {"action": tuple(names)} if names else {}, report.build(len(rows)))


def _of_tables(files: Sequence[Path], videos: Path, index: VideoIndex, report: ReportBuilder) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[str] = set()
    taken: dict[str, int] = {}
    bare: list[str] = []
    for path in files:
        for line, video, label, split in read_paths(path, videos):
            report.listed += 1
            if video in seen:
                raise error(path, line, "path", video, "be listed once", "remove one of the two rows")
            seen.add(video)
            if label is None:
                bare.append(place(path, line, video))
            found = index.find_path(video)
            if found is None:
                report.missing(video)
            elif found in taken:
                raise error(path, line, "path", video, f"be another file than line {taken[found]}", "remove one row")
            else:
                taken[found] = line
                if found != video:
                    report.oddity("path not as listed, taken by its name", place(path, line, f"{video} -> {found}"))
                entries.append(Entry(found, label, split))
    if bare and len(bare) == report.listed:
        report.layout("no labels")
    else:
        for where in bare:
            report.oddity("row without a label", where)
    return entries


def read_paths(path: Path, videos: Path) -> Iterator[tuple[int, str, str | None, str | None]]:
    """Yield (line, path relative to ``videos``, class name or None, split or None) of a CSV ``path,label[,split]``.

    Raises:
        AnnotationError: a malformed line, an unknown column, or a path outside the folder of videos.
    """
    cells = read_cells(path)
    header = next(cells, (1, []))
    names = [name.strip() for name in header[1]]
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            close = difflib.get_close_matches(name.lower(), COLUMNS, 1)
            remedy = f"did you mean {close[0]}?" if close and name not in COLUMNS else "remove this column"
            raise error(path, header[0], "column", name, f"be one of {', '.join(COLUMNS)}, each once", remedy)
    for line, row in read_table(path, ("path",), chain([header], cells)):
        try:
            video = confine(row["path"].strip(), videos)
        except AnnotationError as problem:
            raise AnnotationError(f"{path}:{line}: {problem}") from problem
        label = row.get("label", "").strip() or None
        split = row.get("split", "").strip() or None
        if split is not None and split not in ("train", "val", "test"):
            raise error(path, line, "split", split, "be train, val or test", "correct this row")
        yield line, video, label, split


def _draw(entries: Sequence[Entry], val_fraction: float, seed: int, report: ReportBuilder) -> list[str]:
    """Return the split of each entry; where none has one, each is drawn by its own path."""
    if any(entry.split is not None for entry in entries):
        without = sum(entry.split is None for entry in entries)
        if without:
            report.oddity("rows without a split, taken as train", f"{without} rows")
        return [entry.split or "train" for entry in entries]
    splits = ["val" if is_val(entry.path, val_fraction, seed) else "train" for entry in entries]
    if val_fraction > 0:
        report.layout(f"val drawn by path, {val_fraction:g} of all, seed {seed}")
        drawn = {entry.label for entry, split in zip(entries, splits, strict=True) if split == "val"}
        for label in sorted({entry.label or "" for entry in entries} - {label or "" for label in drawn}):
            kind = "class without a video in val, left out by the draw: add videos, or set another seed or val_fraction"
            report.oddity(kind, label or "videos without a label")
    return splits
