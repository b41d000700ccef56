"""Write a store: bounded shards in the order of the calls, one index, one sample table a split; all or nothing.

Everything goes to a folder beside the target, is flushed to the disk and renamed: the target is whole or absent.
The same calls give the same bytes.
"""

import hashlib
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import FLAG_SILENT
from pipeline.media.fragments import FragmentedVideo
from pipeline.store.durable import put_folder, sync, sync_tree
from pipeline.store.format import (
    AUDIO_BLOCK_SAMPLES,
    CODECS,
    FILE_RULE,
    INDEX_NAME,
    INFO_NAME,
    LABEL_PREFIX,
    SET_RULE,
    SHARD_FOLDER,
    SPLIT_RULE,
    Encoding,
    FileDigest,
    StoreError,
    StoreInfo,
    parse_info,
    sample_file,
    shard_file,
)
from pipeline.store.reader import Store
from pipeline.store.rows import AudioRef, GrowingTable, SampleRow, VideoRef, media_columns, sample_columns
from pipeline.store.rules import (
    MEDIA_LISTS,
    Checked,
    check_media,
    check_samples,
    media_table,
    sample_table,
)
from pipeline.store.schemas import index_schema, sample_schema, write_arrow

__all__ = ["AudioRef", "SampleRow", "StoreWriter", "VideoRef", "check_target"]

_COUNTER = itertools.count()
_REMEDY = "correct what is added"


def check_target(path: Path, overwrite: bool) -> None:
    """Raise StoreError unless a store can be put at `path`: nothing or an empty folder, or a store to be replaced."""
    if not path.exists():
        return
    is_store = (path / INFO_NAME).is_file()
    is_empty = path.is_dir() and not any(path.iterdir())
    if is_empty or (is_store and overwrite):
        return
    remedy = "pass overwrite=True or choose another path" if is_store else "choose another path"
    raise StoreError(f"{path}: target ({'a store' if is_store else 'no store'}) must not exist; {remedy}")


def _append_row(table: GrowingTable, where: str, row: Mapping[str, Any]) -> None:
    try:
        table.append(row)
    except (OverflowError, TypeError) as error:
        raise StoreError(f"{where}: {error}; numbers must fit in their columns (docs/store.md); {_REMEDY}") from error


class StoreWriter:
    """Writes one store; use as a context manager (an exception inside leaves nothing behind).

    Args:
        path: folder to make. video_codec: "h264", "vp9" or "mjpeg". gop: frames per fragment.
        short_side_px: of the videos. encoding: how they were encoded; None makes a store of version 1 (not mjpeg).
        dataset: name. classes: label set -> class names; timed labels and box labels belong to set "action".
        shard_bytes: upper bound of a shard's size, 1..2**31 - 1.
        overwrite: replace a store that is there (anything else there is an error always).

    Raises:
        StoreError: the target exists, or an argument breaks its rule.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        video_codec: str,
        gop: int,
        short_side_px: int,
        dataset: str,
        classes: Mapping[str, Sequence[str]],
        encoding: Encoding | None = None,
        shard_bytes: int = 256 << 20,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path).absolute()
        if video_codec not in CODECS:
            raise StoreError(f"video_codec ({video_codec}) must be one of {CODECS}; transcode to one of them")
        if not 1 <= shard_bytes < 2**31:
            raise StoreError(f"shard_bytes ({shard_bytes}) must be in 1..{2**31 - 1}; the default is {256 << 20}")
        for name in classes:
            if not SET_RULE.fullmatch(name):
                raise StoreError(f"label set ({name!r}) must match {SET_RULE.pattern}; rename it")
        self._overwrite, self._shard_bytes = overwrite, shard_bytes
        check_target(self.path, overwrite)
        named = {k: tuple(v) for k, v in classes.items()}
        self._info = StoreInfo(video_codec, gop, short_side_px, dataset, named, encoding=encoding)
        self._check_info()
        self._files: dict[str, FileDigest] = {}
        self._index_schema = index_schema()
        self._index = GrowingTable(self._index_schema)
        self._media_ids: set[str] = set()
        self._samples: dict[str, GrowingTable] = {}
        self._sample_ids: dict[str, set[str]] = {}
        self._shard: BinaryIO | None = None
        self._shard_digest, self._shard_size, self._shard_count = hashlib.sha256(), 0, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self.path.parent / f".{self.path.name}.{os.getpid()}-{next(_COUNTER)}.partial"
        (self._folder / SHARD_FOLDER).mkdir(parents=True)

    def _check_info(self) -> None:
        """Raise StoreError where store.json could not be read again."""
        try:
            parse_info(replace(self._info, files={INDEX_NAME: FileDigest(0, "")}).to_bytes(), self.path / INFO_NAME)
        except (StoreError, UnicodeEncodeError, TypeError) as error:
            numbers = f"gop ({self._info.gop!r}), short_side_px ({self._info.short_side_px!r})"
            raise StoreError(
                f"{numbers}, dataset ({self._info.dataset!r}) and class names must be whole numbers >= 0 and text in "
                f"UTF-8; correct them ({error})"
            ) from error

    def _append(self, pieces: Sequence[bytes | memoryview], what: str) -> tuple[int, int]:
        """Write pieces one after the other into one shard; returns shard and offset."""
        size = sum(len(piece) for piece in pieces)
        if size > self._shard_bytes:
            raise StoreError(
                f"{what} ({size} bytes) must fit in a shard of {self._shard_bytes}; raise shard_bytes or cut the medium"
            )
        if self._shard is None or self._shard_size + size > self._shard_bytes:
            self._finish_shard()
            if not FILE_RULE.fullmatch(shard_file(self._shard_count)):
                raise StoreError(f"shards ({self._shard_count + 1}) must be at most 100000; raise shard_bytes")
            self._shard = (self._folder / shard_file(self._shard_count)).open("wb")
            self._shard_digest, self._shard_size = hashlib.sha256(), 0
            self._shard_count += 1
        offset = self._shard_size
        for piece in pieces:
            self._shard.write(piece)
            self._shard_digest.update(piece)
        self._shard_size += size
        return self._shard_count - 1, offset

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.close()
        name = shard_file(self._shard_count - 1)
        sync(self._folder / name)
        self._files[name] = FileDigest(self._shard_size, self._shard_digest.hexdigest())
        self._shard = None

    def add_video(self, video: FragmentedVideo) -> VideoRef:
        """Append a video's bytes; raises StoreError if it does not fit in one shard or its frame numbers are off."""
        first, sizes = video.first_frames, tuple(len(piece) for piece in video.fragments)
        rising = all(a < b for a, b in itertools.pairwise((*first, video.num_frames)))
        if not sizes or len(first) != len(sizes) or first[0] != 0 or not rising or min(sizes) < 1 or not video.init:
            raise StoreError(
                f"first_frames ({first[:4]}.. of {video.num_frames}, {len(sizes)} fragments) must start at 0 and rise, "
                "one per fragment, all fragments and the init segment with bytes; cut it with parse_fragments"
            )
        shard, offset = self._append((video.init, *video.fragments), "video")
        starts = itertools.accumulate(sizes[:-1], initial=offset + len(video.init))
        return VideoRef(
            shard=shard,
            offset=offset,
            init_bytes=len(video.init),
            init_crc32=zlib.crc32(video.init),
            fragment_offset=tuple(starts),
            fragment_bytes=sizes,
            fragment_first_frame=tuple(first),
            fragment_crc32=tuple(zlib.crc32(piece) for piece in video.fragments),
            num_frames=video.num_frames,
            fps_num=video.fps_num,
            fps_den=video.fps_den,
            width=video.width,
            height=video.height,
        )

    def add_audio(self, samples: NDArray[np.int16]) -> AudioRef:
        """Append a 16 kHz mono track, int16 (count,); an empty one is silence and takes no bytes."""
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise StoreError(f"audio ({samples.dtype}, {samples.ndim}-D) must be int16, 1-D, 16 kHz mono; resample it")
        if not len(samples):
            return AudioRef(0, 0, 0, ())
        data = np.ascontiguousarray(samples, dtype="<i2").data.cast("B")
        shard, offset = self._append((data,), "audio")
        step = 2 * AUDIO_BLOCK_SAMPLES
        return AudioRef(
            shard, offset, len(samples), tuple(zlib.crc32(data[i : i + step]) for i in range(0, len(data), step))
        )

    def add_media(
        self,
        id: str,
        video: VideoRef,
        audio: AudioRef | None = None,
        *,
        display_width: int | None = None,
        display_height: int | None = None,
        source: str = "",
        source_start_s: float = 0.0,
        source_end_s: float | None = None,
        flags: int = 0,
        note: str = "",
    ) -> int:
        """Add a row to the index; returns its number.

        Args:
            id: unique. video, audio: where the bytes are; no audio or an empty one sets FLAG_SILENT.
            display_width, display_height: px, the true aspect ratio; default the stored size.
            source: path as the annotations name it. source_start_s, source_end_s: the part of it, in its own time.
            flags: FLAG_* bits. note: what was repaired, in words.

        Raises:
            StoreError: an id that is there already, or a number that no reader would take (pipeline/store/rules.py).
        """
        if id in self._media_ids or not id:
            raise StoreError(
                f"media id ({id!r}) must be unique and not empty; it is row {self._row_of(id)} already; rename"
            )
        audio = audio if audio is not None else AudioRef(0, 0, 0, ())
        end_s = (
            source_start_s + video.num_frames * video.fps_den / video.fps_num if source_end_s is None else source_end_s
        )
        row = GrowingTable(self._index_schema)
        _append_row(
            row,
            f"media {id!r}",
            {
                "id": id,
                **media_columns(video, audio),
                "display_width": display_width or video.width,
                "display_height": display_height or video.height,
                "source": source,
                "source_start_s": source_start_s,
                "source_end_s": end_s,
                "flags": flags | (0 if audio.num_samples else FLAG_SILENT),
                "note": note,
            },
        )
        lists = {name: row.ragged(name) for name in MEDIA_LISTS}
        check_media(media_table(row), lists, self._shard_count, Checked("index", _REMEDY, self._index.rows))
        self._index.extend(row)
        self._media_ids.add(id)
        return self._index.rows - 1

    def _row_of(self, id: str) -> int:
        return self._index.columns["id"].index(id) if id in self._media_ids else -1

    def add_samples(self, split: str, rows: Iterable[SampleRow]) -> int:
        """Append samples to a split (made by its first call, also by an empty one); returns how many it has now.

        Raises:
            StoreError: a duplicate id, a medium or label that does not exist, times that do not rise, or another value
                that no reader would take (pipeline/store/rules.py). None of the rows is added then.
        """
        if not SPLIT_RULE.fullmatch(split):
            raise StoreError(f"split ({split!r}) must match {SPLIT_RULE.pattern}; rename it")
        table = self._samples.setdefault(split, GrowingTable(sample_schema(())))
        ids, added = self._sample_ids.setdefault(split, set()), set[str]()
        rows = list(rows)
        names = sorted({name for row in rows for name in row.labels})
        batch = GrowingTable(sample_schema(names))
        for row in rows:
            where = f"split {split}, sample {row.id!r}"
            self._check_sample(where, row, row.id in ids or row.id in added)
            _append_row(batch, where, sample_columns(row))
            added.add(row.id)
        how = Checked(f"split {split}", _REMEDY, table.rows)
        check_samples(sample_table(batch), self._index.rows, self._info.classes, how)
        for name in names:
            if f"{LABEL_PREFIX}{name}" not in table.columns:
                table.add_column(f"{LABEL_PREFIX}{name}", pa.list_(pa.int32()))
        table.extend(batch)
        ids |= added
        return table.rows

    def _check_sample(self, where: str, row: SampleRow, is_double: bool) -> None:
        if is_double or not row.id:
            raise StoreError(f"{where}: id must be unique in its split and not empty; it is listed twice, remove one")
        unknown = sorted(row.labels.keys() - self._info.classes.keys())
        if unknown:
            raise StoreError(
                f"{where}: label sets ({unknown}) must be in {sorted(self._info.classes)}; pass all classes"
            )

    def close(self, announce: Callable[[str], None] | None = None) -> Path:
        """Write the tables and store.json, flush, and rename to the target; returns its path.

        Args:
            announce: called with the SHA-256 (hex) of store.json when all is flushed, just before the renaming.

        Raises:
            StoreError: no medium was added, the target appeared in the meantime, or what was written does not open.
        """
        if not self._index.rows:
            raise StoreError(f"{self.path}: media (0) must be at least one; nothing was ingested, see the report")
        self._finish_shard()
        schema = index_schema()
        self._files[INDEX_NAME] = write_arrow(self._folder / INDEX_NAME, schema, self._index.arrays(schema))
        for split, table in self._samples.items():
            schema = sample_schema(n.removeprefix(LABEL_PREFIX) for n in table.columns if n.startswith(LABEL_PREFIX))
            name = sample_file(split)
            self._files[name] = write_arrow(self._folder / name, schema, table.arrays(schema))
        info = replace(self._info, files=self._files).to_bytes()
        (self._folder / INFO_NAME).write_bytes(info)
        written = Store(self._folder, check_tables=False)  # nothing gets the name of a store that cannot be opened
        for split in written.splits:
            written.split(split)
        sync_tree(self._folder)
        check_target(self.path, self._overwrite)
        if announce is not None:
            announce(hashlib.sha256(info).hexdigest())
        put_folder(self._folder, self.path, self._folder.with_suffix(".old"))
        return self.path

    def abort(self) -> None:
        """Drop everything written so far."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise
