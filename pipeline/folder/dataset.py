"""A folder of plain videos as a data set: no ingest, any codec with sound, slower than a store (docs/datasets).

Splits: the folders train, val and test, if there is at least one; else a split by the hash of each name.
Classes: the first folder level below (train/<class>/<file> or <class>/<file>); files without one have no label.
The rules are those of `prepare folder` (pipeline/annotations/layout.py).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.annotations.files import VIDEO_SUFFIXES, is_picture, list_videos
from pipeline.annotations.layout import SPLIT_FOLDERS, VAL_SHARE, empty_class_folders, is_val, sort_by_folders
from pipeline.annotations.rows import AnnotationError
from pipeline.dataset import (
    SAMPLE_RATE_HZ,
    Decoder,
    MediaError,
    MediaTable,
    Ragged,
    SampleTable,
    VideoCut,
    source_video,
)
from pipeline.folder.describe import PlainFile, describe
from pipeline.folder.read import read_planes
from pipeline.folder.sound import read_samples
from pipeline.media.probe import RefusedError
from pipeline.media.reading import folder_problem
from pipeline.media.yuv import Planes, in_order_asked, is_rising


class FolderError(ValueError):
    """A folder that cannot be read as a data set; `refused`: (relative path, reason) of files, where these are why."""

    refused: tuple[tuple[str, str], ...] = ()


_THREADS = 2  # that look at files where no child processes do
DescribeFiles = Callable[[Sequence[Path]], Iterable[PlainFile | Exception]]


@dataclass(frozen=True)
class _Item:
    name: str  # relative path, POSIX
    split: str  # "" = by hash
    label: str  # "" = none


class PlainFolder:
    """All videos below a folder; `split(name)` gives a Dataset.

    Attributes:
        path: folder. refused: (relative path, reason) of every file that is not used. classes: {"action": names} or {}.
        warnings: (relative path, what may not be what was wanted) of files that are used.
        splits: names; "all" holds every video.
    """

    def __init__(self, path: str | Path, *, describe_files: DescribeFiles | None = None) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise FolderError(f"{self.path}: folder (missing) must exist; check the path")
        items, refused = _list(self.path)
        paths = [self.path / item.name for item in items]
        results = describe_files(paths) if describe_files is not None else _describe_here(paths)
        self.files: dict[str, PlainFile] = {}
        for item, result in zip(items, results, strict=True):
            if isinstance(result, PlainFile):
                self.files[item.name] = result
            elif isinstance(result, ValueError | OSError):
                refused.append((item.name, str(result)))
            else:
                raise result
        self.refused: tuple[tuple[str, str], ...] = tuple(sorted(refused))
        if not self.files:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.refused[:5]) or "the folder is empty"
            none = FolderError(f"{self.path}: playable videos (0 of {len(items)}) must be at least one; {why}")
            none.refused = self.refused
            raise none
        self._items = [item for item in items if item.name in self.files]
        self.warnings = tuple((name, file.warning) for name, file in self.files.items() if file.warning)
        names = sorted({item.label for item in items if item.label})
        self.classes: Mapping[str, Sequence[str]] = {"action": tuple(names)} if names else {}
        self._members = _members(self._items)
        self.splits: tuple[str, ...] = tuple(sorted(self._members))

    @classmethod
    def open(cls, path: str | Path, *, describe_files: DescribeFiles | None = None) -> "PlainFolder":
        """List and probe a folder; every file is opened once.

        Args:
            path: folder. describe_files: who looks at the files, as
                `pipeline.open.describe_confined` does it in child processes; None: threads of this process.

        Raises:
            FolderError: no folder, no playable video, or files beside the split or class folders.
        """
        return cls(path, describe_files=describe_files)

    def split(self, name: str) -> "FolderSplit":
        """One split as a Dataset; raises FolderError for one that has no video."""
        if name not in self._members:
            folders = ", ".join(dict.fromkeys(SPLIT_FOLDERS.values()))
            raise FolderError(
                f"{self.path}: split ({name}) must be one of {list(self.splits)}; put videos into the folders "
                f"{folders}, or add some ({VAL_SHARE:g} of them are drawn for val, each by its name)"
            )
        members = self._members[name]
        return FolderSplit(name, [self.files[item.name] for item in members], members, self.classes, self.path)


class FolderSplit:
    """One split of a folder: a Dataset that gives frames only."""

    decoders: tuple[Decoder, ...] = ("cpu",)
    video_codec = ""

    def __init__(
        self,
        split: str,
        files: Sequence[PlainFile],
        items: Sequence[_Item],
        classes: Mapping[str, Sequence[str]],
        folder: Path,
    ) -> None:
        self.split, self.files, self.classes, self._folder = split, tuple(files), classes, folder
        self.media = _media_table(files, [item.name for item in items])
        self.samples = _sample_table(self.media, items, classes)
        lines = [f"{item.name}\0{item.label}\0{file.digest}" for item, file in zip(items, files, strict=True)]
        self.fingerprint = hashlib.sha256("\n".join([split, *lines]).encode("utf-8", "surrogateescape")).hexdigest()

    @classmethod
    def of_files(cls, files: Sequence[PlainFile], names: Sequence[str]) -> "FolderSplit":
        """Return files that somebody else chose as the split "all", without labels.

        Args:
            files: described, at least one, wherever they lie. names: of their samples, unique.
        """
        folder = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file in files]))
        return cls("all", files, [_Item(name, "", "") for name in names], {}, folder)

    def __len__(self) -> int:
        return len(self.samples)

    def same_video(self, media: int, other: int) -> bool:
        """See Dataset.same_video."""
        one, two = self.files[media], self.files[other]
        return one.digest == two.digest or source_video(one.path) == source_video(two.path)

    def sound_range(self, media: int) -> tuple[int, int]:
        """See Dataset.sound_range."""
        file = self.files[media]
        first = max(0, round((file.audio_start_s - file.start_s) * SAMPLE_RATE_HZ))
        return (first, file.num_samples) if first < file.num_samples else (0, 0)

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """Plain files cannot be cut by bytes: always raises MediaError; use read_frames (`decoders` is ("cpu",))."""
        raise MediaError(
            self.files[media].path, "video", "plain files cannot be cut by bytes; use read_frames, or ingest"
        )

    def read_frames(self, media: int, frames: NDArray[Any], out: Planes | None = None) -> Planes:
        """See Dataset.read_frames."""
        file = self.files[media]
        numbers, inverse = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        if not len(numbers) or numbers[0] < 0 or numbers[-1] >= file.num_frames:
            raise FolderError(f"{file.path}: frames ({frames}) must be in 0..{file.num_frames - 1}; fix the plan")
        with self._there():
            planes = read_planes(file, numbers, out if is_rising(inverse) else None)
        return in_order_asked(planes, inverse, out)

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """See Dataset.read_audio."""
        file = self.files[media]
        if count < 0:
            raise FolderError(f"{file.path}: count ({count}) must be >= 0; fix the plan")
        out = np.zeros(count, np.int16)
        begin, end = max(start, 0), min(start + count, file.num_samples)
        if begin < end:
            with self._there():
                out[begin - start : end - start] = read_samples(file, begin, end - begin)
        return out

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Have it said of the whole folder, not of one file after the other, where that is gone."""
        try:
            yield
        except MediaError as error:
            gone = folder_problem(self._folder)
            if gone:
                raise FolderError(gone) from error
            raise


def _list(root: Path) -> tuple[list[_Item], list[tuple[str, str]]]:
    """Files below root with split and class, sorted by name; what is not used comes back with a reason."""
    try:
        listing = list_videos(root)
        _, entries = sort_by_folders(root, sorted([*listing.paths, *listing.unstorable]))
    except AnnotationError as problem:
        raise FolderError(str(problem)) from problem
    refused = list(listing.left_out)
    refused += [
        (f"{name}/", "class folder without videos") for name in empty_class_folders(listing.paths, listing.folders)
    ]
    for name in listing.others:
        if not name.rpartition("/")[2].startswith("."):
            rule = f"suffix ({Path(name).suffix}) must be one of {' '.join(sorted(VIDEO_SUFFIXES))}"
            refused.append((name, "a picture, not a video" if is_picture(name) else rule))
    return [_Item(entry.path, entry.split or "", entry.label or "") for entry in entries], refused


def _describe_here(paths: Sequence[Path]) -> list[PlainFile | Exception]:
    """What is known of each file, or why it is not used; looked at by threads."""

    def one(path: Path) -> PlainFile | Exception:
        """Look at one file."""
        try:
            return describe(path)
        except (RefusedError, OSError) as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, paths))


def _members(items: Sequence[_Item]) -> dict[str, list[_Item]]:
    """Split -> its items, in order of their names. Without split folders each file is drawn by its own name."""
    members: dict[str, list[_Item]] = {"all": list(items)}
    for item in items:
        split = item.split or ("val" if is_val(item.name, VAL_SHARE) else "train")
        members.setdefault(split, []).append(item)
    return members


def _media_table(files: Sequence[PlainFile], names: Sequence[str]) -> MediaTable:
    def int32(values: Iterator[int]) -> NDArray[np.int32]:
        return np.fromiter(values, np.int32, len(files))

    return MediaTable(
        ids=tuple(names),
        num_frames=int32(f.num_frames for f in files),
        fps_num=int32(f.fps.numerator for f in files),
        fps_den=int32(f.fps.denominator for f in files),
        width=int32(f.width for f in files),
        height=int32(f.height for f in files),
        display_width=int32(f.display_width for f in files),
        display_height=int32(f.display_height for f in files),
        num_samples=np.fromiter((f.num_samples for f in files), np.int64, len(files)),
        flags=np.fromiter((f.flags for f in files), np.uint32, len(files)),
        shard=np.arange(len(files), dtype=np.int32),
    )


def _sample_table(media: MediaTable, items: Sequence[_Item], classes: Mapping[str, Sequence[str]]) -> SampleTable:
    count = len(media)
    number = {name: i for i, name in enumerate(classes.get("action", ()))}
    labels = np.fromiter((number[item.label] for item in items if item.label), np.int32)
    return SampleTable(
        ids=media.ids,
        media=np.arange(count, dtype=np.int64),
        start_s=np.zeros(count),
        end_s=np.array([media.duration_s(i) for i in range(count)]),
        key_time_s=np.full(count, np.nan),
        label_sets={"action": Ragged(labels, np.arange(count + 1, dtype=np.int64))} if number else {},
    )
