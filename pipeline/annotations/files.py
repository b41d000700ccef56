"""Finding of video and annotation files: each folder is listed once, no file is touched a second time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.annotations.rows import AnnotationError, confine

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".ts"}
    | {".mts", ".m2ts", ".wmv", ".3gp", ".ogv", ".vob", ".mxf", ".mjpeg", ".mjpg"}
)
MAX_DEPTH = 8


def strip_suffix(name: str) -> str:
    """Return a file name without its video suffix; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in VIDEO_SUFFIXES else name


class VideoIndex:
    """The video files below a folder, by name without suffix.

    Args:
        root: the folder of videos.
        ignore_case: names that differ only in case are the same.
    Raises:
        AnnotationError: the folder is missing.
    """

    def __init__(self, root: Path, *, ignore_case: bool = False) -> None:
        self.root = root
        self.ignore_case = ignore_case
        self.paths, self.refused = list_videos(root)
        self._by_name: dict[str, list[str]] = {}
        for path in self.paths:
            self._by_name.setdefault(self._key(path.rpartition("/")[2]), []).append(path)

    def _key(self, name: str) -> str:
        stem = strip_suffix(name)
        return stem.casefold() if self.ignore_case else stem

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._by_name

    def find(self, name: str, prefer: Callable[[str], int] | None = None) -> str | None:
        """Return the relative path of the video of this name, or None.

        Args:
            name: file name without folders, with or without suffix (a converted copy has another one).
            prefer: rank of a path where several have the name, the lowest is taken; ties go by path.
        """
        candidates = self._by_name.get(self._key(name))
        if not candidates:
            return None
        if len(candidates) == 1 or prefer is None:
            return candidates[0]
        return min(candidates, key=lambda path: (prefer(path), path))

    def find_path(self, listed: str) -> str | None:
        """Return the file of a listed path: that file, or the only one whose path ends alike (another suffix, folders
        more or fewer in front); never a file of the same name in another folder."""
        candidates = self._by_name.get(self._key(listed.rpartition("/")[2]), [])
        if listed in candidates:
            return listed
        alike = [path for path in candidates if _agree(listed, path)]
        return alike[0] if len(alike) == 1 else None


def _agree(listed: str, path: str) -> bool:
    """Return whether the shorter of two paths is the end of the longer one, whatever the suffixes."""
    ours, theirs = strip_suffix(listed).split("/"), strip_suffix(path).split("/")
    shorter = min(len(ours), len(theirs))
    return ours[-shorter:] == theirs[-shorter:]


def list_videos(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the video files below a folder, sorted, symbolic links followed, at most 8 levels deep.

    Returns:
        (relative paths, names that no store can hold: control characters, backslashes, not UTF-8)
    Raises:
        AnnotationError: the folder is missing or cannot be listed.
    """
    found: list[str] = []
    refused: list[str] = []
    pending: list[tuple[str, int]] = [("", 0)]
    links = {os.path.realpath(root)}
    while pending:
        folder, depth = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    relative = f"{folder}/{entry.name}" if folder else entry.name
                    if os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES and not entry.is_dir():
                        _sort_in(relative, found, refused)
                    elif depth < MAX_DEPTH and entry.is_dir() and not entry.name.startswith("."):
                        if entry.is_symlink():
                            target = os.path.realpath(entry.path)
                            if target in links:
                                continue
                            links.add(target)
                        pending.append((relative, depth + 1))
        except OSError as problem:
            shown = os.path.join(root, folder)
            raise AnnotationError(
                f"videos ({shown}: {problem.strerror}) must be a readable folder; check --videos"
            ) from (problem)
    return tuple(sorted(found)), tuple(sorted(refused))


def _sort_in(relative: str, found: list[str], refused: list[str]) -> None:
    try:
        accepted = confine(relative) == relative
    except AnnotationError:
        accepted = False
    if accepted:
        found.append(relative)
    else:
        refused.append(ascii(relative))


def annotation_files(annotations: Path | None, suffixes: Iterable[str], depth: int = 2) -> list[Path]:
    """List the annotation files of a folder (sorted by name), or the one file given.

    Args:
        annotations: a file, or a folder that is searched ``depth`` levels deep.
        suffixes: the accepted endings in lower case, for example ``.csv``.
    Returns:
        The files; never a pickle.
    Raises:
        AnnotationError: nothing is there.
    """
    if annotations is None:
        raise AnnotationError("annotations (None) must name the official file or its folder; give --annotations")
    wanted = tuple(suffixes)
    if annotations.is_file():
        return [annotations]
    found: list[Path] = []
    pending = [(annotations, 0)]
    while pending:
        folder, level = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir() and level < depth and not entry.name.startswith("."):
                        pending.append((Path(entry.path), level + 1))
                    elif entry.name.lower().endswith(wanted) and entry.is_file():
                        found.append(Path(entry.path))
        except OSError as problem:
            raise AnnotationError(
                f"annotations ({folder}: {problem.strerror}) must be a file or folder; check --annotations"
            ) from problem
    return sorted(found)
