"""What the folders of one's own videos say: split and class of each file, and the validation part that is drawn.

Shared by the reader ``folder`` and by plain folders as a data set, so that both see the same data set.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.annotations.rows import AnnotationError

#: Folder name in lower case -> split.
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
VAL_SHARE = 0.1  # of the videos, where folders name no splits


class Entry(NamedTuple):
    """A video: relative path, class name (None: without a label), split (None: to be drawn)."""

    path: str
    label: str | None
    split: str | None


def sort_by_folders(root: Path, paths: Sequence[str]) -> tuple[str, list[Entry]]:
    """Give each video the split and the class that its folders name.

    Layouts: ``<class>/<file>``, ``<split>/<class>/<file>``, ``<split>/<file>`` and ``<file>``, the last two without
    labels; deeper folders do not matter. A data set has one of them.

    Args:
        root: the folder of videos, for the errors.
        paths: paths relative to it, ``/`` between parts.
    Returns:
        (layout in words, one entry a path in the same order)
    Raises:
        AnnotationError: a video beside the split folders or beside the class folders; the error names it.
    """
    splits = sorted({top for path in paths if (top := path.split("/")[0]).lower() in SPLIT_FOLDERS and "/" in path})
    entries: list[Entry] = []
    for path in paths:
        folders = path.split("/")[:-1]
        split = None
        if splits:
            if not folders or folders[0].lower() not in SPLIT_FOLDERS:
                raise AnnotationError(
                    f"{root / path}: a video beside the split folder {splits[0]} must be in one of "
                    f"{', '.join(SPLIT_FOLDERS)}; move it, or rename {splits[0]} if that is a class"
                )
            split = SPLIT_FOLDERS[folders.pop(0).lower()]
        label = unicodedata.normalize("NFC", folders[0]) if folders else None  # macOS writes accents apart
        entries.append(Entry(path, label, split))
    loose = next((entry.path for entry in entries if entry.label is None), None)
    if loose is not None and any(entry.label is not None for entry in entries):
        raise AnnotationError(
            f"{root / loose}: a video beside class folders must be in one of them; move it, or leave no class folders "
            "at all for videos without labels"
        )
    if splits:
        return "split folders without labels" if loose is not None else "split folders with class folders", entries
    return "files without labels" if loose is not None else "class folders", entries


def empty_class_folders(paths: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return the folders that look like classes and hold no video.

    Args:
        paths: of the videos, relative, ``/`` between parts.
        folders: relative, in the same folder of videos.
    """
    held = {path.rpartition("/")[0] for path in paths} - {""}
    if not held:
        return []  # videos without classes
    above = {"/".join(folder.split("/")[:depth]) for folder in held for depth in range(1, folder.count("/") + 2)}
    splits = {folder for folder in above if folder.lower() in SPLIT_FOLDERS}
    level = 1 if splits else 0
    if not any(folder.count("/") >= level for folder in held):
        return []
    candidates = [folder for folder in folders if folder and folder.count("/") == level and folder not in above]
    return [folder for folder in candidates if not splits or folder.split("/")[0].lower() in SPLIT_FOLDERS]


def is_val(path: str, fraction: float, seed: int = 0) -> bool:
    """Return whether a video is drawn for validation: SHA-256 of seed and path, as a share of 2^256, below fraction.

    It depends on nothing else, so that further videos move no other one; a class of few videos may get none.

    Args:
        path: path relative to the folder of videos.
        fraction: share that is drawn, in [0, 1]; a larger one only adds videos.
        seed: another number draws another part.
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest, "big") < fraction * 2**256
