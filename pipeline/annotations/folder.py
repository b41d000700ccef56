"""Any folder of videos: class folders, flat and without labels, or with a CSV ``path,label[,split]``."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Row, confine
from pipeline.annotations.text import error, place, read_table

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


def read_folder(annotations: Path | None, videos: Path, *, val_fraction: float = 0.1, seed: int = 0) -> Annotations:
    """Read a folder of videos of one's own.

    Without a CSV the folders decide: ``<class>/<file>``, or ``train/<class>/<file>`` and ``val/<class>/<file>``, or
    files without folders, which get no labels. Without a split column or split folders, the validation part is drawn
    per class by a hash of seed and path: the same on every machine, and stable when videos are added.

    Args:
        annotations: CSV with the columns ``path``, ``label`` and, if wanted, ``split``; None: the folders decide.
        videos: folder of the videos, which the paths are relative to.
        val_fraction: share of each class that goes to ``val``, in [0, 1); 0: everything is ``train``.
        seed: another number draws another validation part.
    Returns:
        Rows with the label set ``action`` (sorted class names; none where there are no labels).
    Raises:
        AnnotationError: a malformed line, a path outside ``videos``, or no videos.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise AnnotationError(f"val_fraction ({val_fraction}) must lie in [0, 1); 0.1 keeps a tenth for validation")
    report = ReportBuilder("folder")
    index = VideoIndex(videos)
    for name in index.refused:
        report.oddity("video file with a name that no store can hold", name)
    if annotations is None:
        entries = _of_folders(index, report)
    else:
        report.layout("CSV of paths and labels")
        files = annotation_files(annotations, (".csv",), depth=0)
        entries = _of_tables(files, videos, index, report)
    if not entries and not report.listed:
        raise AnnotationError(f"videos ({videos}) must hold video files or class folders with them; check --videos")
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


Entry = tuple[str, str | None, str | None]  # relative path, class name, split


def _of_folders(index: VideoIndex, report: ReportBuilder) -> list[Entry]:
    tops = {path.split("/")[0].lower() for path in index.paths}
    deep = all(path.count("/") >= 2 for path in index.paths)
    has_splits = bool(index.paths) and tops <= set(SPLIT_FOLDERS) and deep
    flat = all("/" not in path for path in index.paths)
    report.layout(
        "split folders with class folders" if has_splits else "files without labels" if flat else "class folders"
    )
    report.listed = len(index.paths)
    entries: list[Entry] = []
    for path in index.paths:
        parts = path.split("/")
        if has_splits:
            entries.append((path, parts[1], SPLIT_FOLDERS[parts[0].lower()]))
        elif flat:
            entries.append((path, None, None))
        elif len(parts) == 1:
            report.oddity("video beside the class folders, without a label", path)
            report.drop("video beside the class folders, without a label")
        else:
            entries.append((path, parts[0], None))
    return entries


def _of_tables(files: Sequence[Path], videos: Path, index: VideoIndex, report: ReportBuilder) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[str] = set()
    taken: dict[str, int] = {}
    for path in files:
        for line, video, label, split in read_paths(path, videos):
            report.listed += 1
            if video in seen:
                raise error(path, line, "path", video, "be listed once", "remove one of the two rows")
            seen.add(video)
            found = index.find_path(video)
            if found is None:
                report.missing(video)
            elif found in taken:
                raise error(path, line, "path", video, f"be another file than line {taken[found]}", "remove one row")
            else:
                taken[found] = line
                if found != video:
                    report.oddity("path not as listed, taken by its name", place(path, line, f"{video} -> {found}"))
                entries.append((found, label, split))
    return entries


def read_paths(path: Path, videos: Path) -> Iterator[tuple[int, str, str | None, str | None]]:
    """Yield (line, path relative to ``videos``, class name or None, split or None) of a CSV ``path,label[,split]``.

    Raises:
        AnnotationError: a malformed line or a path outside the folder of videos.
    """
    for line, row in read_table(path, ("path",)):
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
    """Return the split of each entry; those without one are drawn per class, lowest hashes first."""
    splits = [split or "train" for _, _, split in entries]
    if any(split is not None for _, _, split in entries):
        without = sum(split is None for _, _, split in entries)
        if without:
            report.oddity("rows without a split, taken as train", f"{without} rows")
        return splits
    groups: dict[str | None, list[int]] = defaultdict(list)
    for position, (_, label, _) in enumerate(entries):
        groups[label].append(position)
    for members in groups.values():
        members.sort(key=lambda position: _hash(seed, entries[position][0]))
        wanted = round(val_fraction * len(members))
        if val_fraction > 0 and wanted == 0 and len(members) > 1:
            wanted = 1
        for position in members[:wanted]:
            splits[position] = "val"
    report.layout(f"val drawn per class, {val_fraction:g} of it, seed {seed}")
    return splits


def _hash(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}:{path}".encode()).digest()
