"""Finding of video and annotation files: each folder is listed once, no file is touched a second time."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.annotations.report import UNUSED_FILE, ReportBuilder
from pipeline.annotations.rows import AnnotationError, confine

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".mpe", ".flv", ".f4v", ".ts", ".mts", ".m2ts"}
    | {".wmv", ".asf", ".3gp", ".3g2", ".qt", ".ogv", ".ogg", ".vob", ".mxf", ".nut", ".gif", ".mjpeg", ".mjpg"}
)
#: Suffixes of videos that are not read (raw streams, rare containers, downloads that did not end): always reported.
OTHER_MEDIA = frozenset(
    {".rm", ".rmvb", ".divx", ".dv", ".m1v", ".m2v", ".m2p", ".mpv", ".mp4v", ".mod", ".tod", ".wtv", ".amv", ".swf"}
    | {".y4m", ".yuv", ".h264", ".264", ".h265", ".265", ".hevc", ".ivf", ".part", ".crdownload", ".download"}
)
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".avif"})
MAX_DEPTH = 8


_FORMAT_PART = re.compile(r"\.f[0-9]{1,4}(-[0-9a-z]{1,8})?")  # what yt-dlp puts before the suffix of one format


def is_picture(name: str) -> bool:
    """Return whether a file is a still picture, by its suffix."""
    return os.path.splitext(name)[1].lower() in PICTURES


def strip_suffix(name: str) -> str:
    """Return a file name without its video suffix; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in VIDEO_SUFFIXES else name


def downloaded_name(name: str) -> str:
    """Return the name that a downloader was told: it writes `id.mp4` as `id.mp4.webm`, `id.mp4.mkv`, `id.f137.mp4`."""
    while (stem := strip_suffix(name)) != name:
        before, part = os.path.splitext(stem)
        name = before if _FORMAT_PART.fullmatch(part) else stem
    return name


class VideoIndex:
    """The video files below a folder, by name without suffix.

    Args:
        root: the folder of videos.
        report: what lies below the folder and is not used is noted there.
        ignore_case: names that differ only in case are the same.
    Raises:
        AnnotationError: the folder is missing.
    """

    def __init__(self, root: Path, report: ReportBuilder, *, ignore_case: bool = False) -> None:
        self.root = root
        self.ignore_case = ignore_case
        self._report = report
        self._told: set[str] = set()
        self._taken: set[str] = set()
        listing = list_videos(root)
        self.paths, self.folders = listing.paths, listing.folders
        self.pictures = tuple(name for name in listing.others if is_picture(name))
        for path in listing.unstorable:
            report.oddity("video file with a name that no store can hold", ascii(path))
        for path, reason in listing.left_out:
            report.oddity(f"not used: {reason}", path if path.isprintable() else ascii(path))
        self._by_name: dict[str, list[str]] = {}
        for path in self.paths:
            self._by_name.setdefault(self._key(path.rpartition("/")[2]), []).append(path)
        self._by_download: dict[str, list[str]] = {}
        for path in self.paths:
            name = path.rpartition("/")[2]
            if (told := downloaded_name(name)) != strip_suffix(name):
                self._by_download.setdefault(self._key(told), []).append(path)

    def _key(self, name: str) -> str:
        stem = unicodedata.normalize("NFC", strip_suffix(name))
        return stem.casefold() if self.ignore_case else stem

    def _candidates(self, name: str) -> list[str]:
        """Files of this name; where there is none, those that a downloader made of it."""
        key = self._key(name)
        return self._by_name.get(key) or self._by_download.get(key, [])

    def __contains__(self, name: str) -> bool:
        return bool(self._candidates(name))

    def find(self, name: str, prefer: Callable[[str], int] | None = None) -> str | None:
        """Return the relative path of the video of this name, or None.

        Args:
            name: file name without folders, with or without suffix (a converted copy has another one).
            prefer: rank of a path where several have the name, the lowest is taken; ties go by path and are noted.
        """
        candidates = self._candidates(name)
        if not candidates:
            return None
        ranks = [0 if prefer is None else prefer(path) for path in candidates]
        lowest = min(ranks)
        best = [path for path, rank in zip(candidates, ranks, strict=True) if rank == lowest]
        if len(best) > 1 and best[0] not in self._told:
            self._told.add(best[0])
            self._report.oddity("several files of this name, the first taken", ", ".join(best[:3]))
        self._taken.add(best[0])
        return best[0]

    def find_path(self, listed: str) -> str | None:
        """Return the file of a listed path: that file, or the only one whose path ends alike (another suffix, folders
        more or fewer in front); never a file of the same name in another folder."""
        candidates = self._candidates(listed.rpartition("/")[2])
        alike = [listed] if listed in candidates else [path for path in candidates if _agree(listed, path)]
        if len(alike) != 1:
            return None
        self._taken.add(alike[0])
        return alike[0]

    def note_unused(self) -> None:
        """Count the files that no row took, and name the first ones in the report."""
        for path in self.paths:
            if path not in self._taken:
                self._report.oddity(UNUSED_FILE, path)


def _agree(listed: str, path: str) -> bool:
    """Return whether the shorter of two paths is the end of the longer one, whatever the suffixes."""
    ours, theirs = (unicodedata.normalize("NFC", downloaded_name(name)).split("/") for name in (listed, path))
    shorter = min(len(ours), len(theirs))
    return ours[-shorter:] == theirs[-shorter:]


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies below a folder, by relative path, each list sorted.

    Args:
        paths: video files.
        unstorable: video files with a name that no store can hold: control characters, backslashes, not UTF-8.
        left_out: (path, reason) of what may be video and is not used; folders end with ``/``.
        others: files whose suffix is no video's.
        folders: that were listed.
    """

    paths: tuple[str, ...]
    unstorable: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    folders: tuple[str, ...] = ()


def list_videos(root: Path) -> Listing:
    """List the video files below a folder, symbolic links followed, at most 8 levels deep.

    Raises:
        AnnotationError: the folder is missing or cannot be listed.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    others: list[str] = []
    pending: list[tuple[str, int]] = [("", 0)]
    links = {os.path.realpath(root)}
    folders: list[str] = []
    while pending:
        folder, depth = pending.pop()
        folders.append(folder)
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    relative = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        reason = _why_not(entry, depth, links)
                        if reason:
                            left_out.append((relative + "/", reason))
                        else:
                            pending.append((relative, depth + 1))
                        continue
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if suffix not in VIDEO_SUFFIXES and suffix not in OTHER_MEDIA:
                        others.append(relative)
                    elif entry.name.startswith("."):
                        left_out.append((relative, "hidden file"))
                    elif suffix in OTHER_MEDIA:
                        left_out.append((relative, f"suffix {suffix}; convert or rename it"))
                    else:
                        found.append(relative)
        except OSError as problem:
            shown = os.path.join(root, folder)
            raise AnnotationError(
                f"videos ({shown}: {problem.strerror}) must be a readable folder; check --videos"
            ) from (problem)
    found.sort()
    plain = tuple(path for path in found if _is_storable(path))
    unstorable = tuple(path for path in found if not _is_storable(path)) if len(plain) < len(found) else ()
    return Listing(plain, unstorable, tuple(sorted(left_out)), tuple(sorted(others)), tuple(sorted(folders)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry leads to a folder; a link to itself leads nowhere, like one whose target is gone."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _why_not(entry: os.DirEntry[str], depth: int, links: set[str]) -> str | None:
    """Return why a folder is not listed, or None; a link that is followed is added to ``links``."""
    if entry.name.startswith("."):
        return "hidden folder"
    if depth >= MAX_DEPTH:
        return f"folder more than {MAX_DEPTH} levels deep"
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if target in links:
            return "link to a folder that is listed already"
        links.add(target)
    return None


def _is_storable(relative: str) -> bool:
    try:
        return confine(relative) == relative
    except AnnotationError:
        return False


def files_beside(annotations: Path | None, files: list[Path], suffixes: Iterable[str]) -> list[Path]:
    """Return where to look for class lists: the files, and where one file was given also those of its folder."""
    if annotations is None or not annotations.is_file():
        return files
    return annotation_files(annotations.absolute().parent, suffixes, depth=0)


def annotation_files(annotations: Path | None, suffixes: Iterable[str], depth: int = 2) -> list[Path]:
    """List the annotation files of a folder (sorted by name), or the one file given.

    Args:
        annotations: a file, or a folder that is searched ``depth`` levels deep.
        suffixes: the accepted endings in lower case, for example ``.csv``.
    Returns:
        The files; never a pickle. Hidden ones only if given by name.
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
                    if entry.name.startswith("."):
                        continue  # macOS puts ._<name> beside <name>
                    if _is_folder(entry) and level < depth:
                        pending.append((Path(entry.path), level + 1))
                    elif entry.name.lower().endswith(wanted) and os.path.isfile(entry.path):
                        found.append(Path(entry.path))
        except OSError as problem:
            raise AnnotationError(
                f"annotations ({folder}: {problem.strerror}) must be a file or folder; check --annotations"
            ) from problem
    return sorted(found)
