"""Read a store: a memory-mapped index, and clips as byte ranges that cost the same wherever they start.

Nothing here makes a Python object per clip: columns are views into the mapped index, reads are `pread` on cached
descriptors, so that threads and processes share one store (docs/store.md has the format).
"""

import functools
import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import Decoder, MediaError, Ragged, UInt8, VideoCut, source_video
from pipeline.media.yuv import decode_cut
from pipeline.store.format import (
    AUDIO_BLOCK_SAMPLES,
    INDEX_NAME,
    INFO_NAME,
    SHARD_FOLDER,
    StoreError,
    StoreInfo,
    index_schema,
    parse_info,
    sample_file,
    sample_schema,
    shard_file,
)
from pipeline.store.mapped import MappedTable, SharedFile
from pipeline.store.rules import (
    LABEL_PREFIX,
    MEDIA_LISTS,
    Checked,
    check_media,
    check_samples,
    media_table,
    sample_table,
)

_MAX_OPEN_SHARDS = 128
_CHECK_AT_ONCE_BYTES = 64 << 20
_SILENT_SECOND_CRC = zlib.crc32(bytes(2 * AUDIO_BLOCK_SAMPLES))


class Store:
    """An opened store; make it with `Store.open`. Threads may share it; pickling opens it again by its path.

    Attributes:
        path: folder. info: contents of store.json. digest: sha256 (hex) of store.json, which covers every file.
        media: the media table. check_crc: compare the CRC32 of everything that is read (on by default).
    """

    def __init__(self, path: str | Path, *, check_tables: bool = True, check_crc: bool = True) -> None:
        self.path, self.check_crc = Path(path).absolute(), check_crc
        info_path = self.path / INFO_NAME
        if not info_path.is_file():
            raise StoreError(
                f"{info_path}: file (missing) must exist; {self.path} is no store, or its writing never ended"
            )
        raw = info_path.read_bytes()
        self.info: StoreInfo = parse_info(raw, info_path)
        self.digest = hashlib.sha256(raw).hexdigest()
        self._check_sizes()
        self._check_tables = check_tables
        self._checks: list[threading.Thread] = []
        self._damage: list[str] = []
        self._index = self._table(INDEX_NAME, lambda names: index_schema())
        self._read_columns()
        self._shards: OrderedDict[int, SharedFile] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, *, check_tables: bool = True, check_crc: bool = True) -> Self:
        """Open a store.

        Args:
            path: its folder.
            check_tables: compare the digests of the index and the sample tables: before returning, or in a thread for
                tables above 64 MiB (then a damaged one fails the next read; `wait_for_checks` waits for it).
            check_crc: compare the CRC32 of every byte that is read.

        Raises:
            StoreError: no store, another version, a missing file, a wrong size, digest or schema.
        """
        return cls(path, check_tables=check_tables, check_crc=check_crc)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.check_crc)

    def _check_sizes(self) -> None:
        for name, digest in self.info.files.items():
            try:
                size = os.stat(self.path / name).st_size
            except FileNotFoundError as error:
                raise StoreError(
                    f"{self.path / name}: file (missing) must exist; copy the whole store again"
                ) from error
            if size != digest.bytes:
                raise StoreError(f"{self.path / name}: size ({size} bytes) must be {digest.bytes}; copy the file again")

    def _table(self, name: str, schema_of: Callable[[Sequence[str]], pa.Schema]) -> MappedTable:
        if self._check_tables and self.info.files[name].bytes <= _CHECK_AT_ONCE_BYTES:
            self._check_digest(name)
        elif self._check_tables:
            check = threading.Thread(target=self._check_later, args=(name,), daemon=True)
            self._checks.append(check)
            check.start()
        return MappedTable(self.path / name, schema_of)

    def _check_digest(self, name: str) -> None:
        with (self.path / name).open("rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = self.info.files[name].sha256
        if found != wanted:
            raise StoreError(f"{self.path / name}: sha256 ({found}) must be {wanted}; copy the file again")

    def _check_later(self, name: str) -> None:
        try:
            self._check_digest(name)
        except (StoreError, OSError) as error:
            self._damage.append(str(error))

    def wait_for_checks(self) -> None:
        """Wait until large tables are checked as well; raises StoreError if one is damaged."""
        for check in self._checks:
            check.join()
        self._raise_damage()

    def _raise_damage(self) -> None:
        if self._damage:
            raise StoreError("; ".join(self._damage))

    def _read_columns(self) -> None:
        index = self._index
        self._video = {n: index.column(n) for n in ("video_shard", "video_offset", "init_bytes", "init_crc32")}
        self._fragment = {n: index.ragged(f"fragment_{n}") for n in ("offset", "bytes", "first_frame", "crc32")}
        self._audio_shard, self._audio_offset = index.column("audio_shard"), index.column("audio_offset")
        self._audio_crc = index.ragged("audio_crc32")
        self._source = index.strings("source")
        self.media = media_table(index)
        if not len(self.media):
            raise StoreError(f"{self.path / INDEX_NAME}: media (0) must be at least one; make the store again")
        lists = {name: index.ragged(name) for name in MEDIA_LISTS}
        num_shards = sum(name.startswith(f"{SHARD_FOLDER}/") for name in self.info.files)
        check_media(self.media, lists, num_shards, Checked(index.path, after_slice=index.drop_pages))

    def index_columns(self) -> dict[str, Any]:
        """Columns of the index that say where bytes are: numpy views, Ragged for lists."""
        names = ("fragment_offset", "fragment_bytes", "fragment_first_frame", "fragment_crc32", "audio_crc32")
        scalars = self._video | {"audio_shard": self._audio_shard, "audio_offset": self._audio_offset}
        views = {name: np.asarray(column) for name, column in scalars.items()}
        lists = {name: self._index.ragged(name) for name in names}
        return views | {name: Ragged(column.values, column.offsets) for name, column in lists.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return self.info.splits

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Label set -> class names."""
        return self.info.classes

    def split(self, name: str) -> "StoreSplit":
        """One split as a Dataset; raises StoreError for an unknown name or a table that does not fit the index."""
        return StoreSplit(self, name)

    def sample_table(self, split: str) -> MappedTable:
        """The mapped Arrow file of a split."""
        if split not in self.splits:
            raise StoreError(f"{self.path}: split ({split}) must be one of {list(self.splits)}; choose one of these")
        return self._table(
            sample_file(split),
            lambda names: sample_schema(n.removeprefix(LABEL_PREFIX) for n in names if n.startswith(LABEL_PREFIX)),
        )

    def _shard(self, number: int) -> SharedFile:
        file = self._shards.get(number)
        if file is None:
            file = self._shards.setdefault(number, SharedFile(self.path / shard_file(number)))
            while len(self._shards) > _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return file

    def _error(self, media: int, stream: str, reason: str, time_s: float | None = None) -> MediaError:
        return MediaError(f"{self.media.id(media)} in {self.path}", stream, reason, time_s=time_s)

    def _read(self, media: int, stream: str, shard: int, offset: int, target: memoryview) -> None:
        """Fill target from a shard."""
        try:
            file = self._shard(shard)
            count = os.preadv(file.descriptor, [target], offset)
        except (OSError, OverflowError) as error:
            raise self._error(
                media, stream, f"{shard_file(max(shard, 0))} byte {offset}: {error}; verify the store"
            ) from error
        if count != len(target):
            reason = (
                f"{shard_file(shard)}: bytes ({count}) at {offset} must be {len(target)}; it was cut, copy it again"
            )
            raise self._error(media, stream, reason)

    def _check_media(self, media: int) -> None:
        self._raise_damage()
        if not 0 <= media < len(self.media):
            raise StoreError(
                f"{self.path}: media ({media}) must be in 0..{len(self.media) - 1}; take it from samples.media"
            )

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """Bytes that cover frames first..last, both included; O(1) in first. See Dataset.read_video."""
        self._check_media(media)
        total = int(self.media.num_frames[media])
        if not 0 <= first <= last < total:
            raise StoreError(
                f"{self.media.id(media)}: frames ({first}..{last}) must rise within 0..{total - 1}; fix the plan"
            )
        rows = {name: column.row(media) for name, column in self._fragment.items()}
        starts = rows["first_frame"]
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        end = int(np.searchsorted(starts, last, side="right"))
        offsets, sizes = rows["offset"][begin:end].tolist(), rows["bytes"][begin:end].tolist()
        init_bytes, shard = int(self._video["init_bytes"][media]), int(self._video["video_shard"][media])
        size = init_bytes + sum(sizes)
        limit = self.info.files.get(shard_file(shard)) if shard >= 0 else None
        whole = len({len(column) for column in rows.values()}) == 1 and begin >= 0 and offsets
        if not whole or min(init_bytes, *sizes) < 1 or limit is None or size > limit.bytes:
            raise self._error(
                media, "video", f"index row (shard {shard}, {size} bytes) must lie in a shard; verify the store"
            )
        data: UInt8 = np.empty(size, np.uint8)
        view = data.data
        self._read(media, "video", shard, int(self._video["video_offset"][media]), view[:init_bytes])
        self._read_runs(media, shard, offsets, sizes, view[init_bytes:])
        if self.check_crc:
            crcs = [int(self._video["init_crc32"][media]), *rows["crc32"][begin:end].tolist()]
            self._check_video(media, view, [init_bytes, *sizes], crcs, starts[begin:end])
        after = int(starts[end]) if end < len(starts) else total
        return VideoCut(data, int(starts[begin]), after - int(starts[begin]))

    def _read_runs(self, media: int, shard: int, offsets: list[int], sizes: list[int], target: memoryview) -> None:
        """Read fragments with one call for each run of adjacent ones (usually one in all)."""
        begin, done = 0, 0
        for i in range(1, len(offsets) + 1):
            if i == len(offsets) or offsets[i] != offsets[i - 1] + sizes[i - 1]:
                size = sum(sizes[begin:i])
                self._read(media, "video", shard, offsets[begin], target[done : done + size])
                begin, done = i, done + size

    def _check_video(
        self, media: int, view: memoryview, sizes: list[int], crcs: list[int], starts: NDArray[np.int32]
    ) -> None:
        done = 0
        for i, (size, crc) in enumerate(zip(sizes, crcs, strict=True)):
            found = zlib.crc32(view[done : done + size])
            done += size
            if found != crc:
                part = "init segment" if i == 0 else f"fragment from frame {starts[i - 1]}"
                time_s = 0.0 if i == 0 else int(starts[i - 1]) / self.media.fps(media)
                raise self._error(
                    media, "video", f"{part}: crc32 ({found:08x}) must be {crc:08x}; verify the store", time_s
                )

    def read_frames(self, media: int, frames: NDArray[Any]) -> tuple[UInt8, UInt8]:
        """Decoded frames by number, with PyAV. See Dataset.read_frames."""
        numbers, inverse = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        if not len(numbers):
            raise StoreError(f"{self.media.id(media)}: frames ([]) must be at least one; fix the plan")
        cut = self.read_video(media, int(numbers[0]), int(numbers[-1]))
        width, height = int(self.media.width[media]), int(self.media.height[media])
        try:
            y, uv = decode_cut(cut.data, numbers - cut.first_frame, width, height)
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            time_s = float(numbers[0]) / self.media.fps(media)
            raise self._error(media, "video", f"{error}; ingest it again", time_s) from error
        if len(inverse) == len(numbers) and (inverse[1:] > inverse[:-1]).all():
            return y, uv
        return y[inverse], uv[inverse]

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """Samples start..start + count - 1, zeros outside the medium. See Dataset.read_audio."""
        self._check_media(media)
        if count < 0:
            raise StoreError(f"{self.media.id(media)}: count ({count}) must be >= 0; fix the plan")
        out = np.zeros(count, np.int16)
        total = int(self.media.num_samples[media])
        begin, end = max(start, 0), min(start + count, total)
        if begin >= end:
            return out
        first, last = begin // AUDIO_BLOCK_SAMPLES, -(-end // AUDIO_BLOCK_SAMPLES)
        block_begin, block_end = first * AUDIO_BLOCK_SAMPLES, min(last * AUDIO_BLOCK_SAMPLES, total)
        if not self.check_crc:
            block_begin, block_end = begin, end
        data = np.empty(block_end - block_begin, "<i2")
        view = data.data.cast("B")
        shard, offset = int(self._audio_shard[media]), int(self._audio_offset[media])
        self._read(media, "audio", shard, offset + 2 * block_begin, view)
        if self.check_crc:
            self._check_audio(media, view, self._audio_crc.row(media)[first:last].tolist(), first)
        out[begin - start : end - start] = data[begin - block_begin : end - block_begin]
        return out

    def _check_audio(self, media: int, view: memoryview, crcs: list[int], first: int) -> None:
        step = 2 * AUDIO_BLOCK_SAMPLES
        found = [zlib.crc32(view[i : i + step]) for i in range(0, len(view), step)]
        if found != crcs:
            bad = next((i for i, pair in enumerate(zip(found, crcs, strict=False)) if pair[0] != pair[1]), len(crcs))
            raise self._error(
                media, "audio", f"crc32 of second {first + bad} must match; verify the store", float(first + bad)
            )

    def sound_range(self, media: int) -> tuple[int, int]:
        """Seconds that are not all zeros, by their checksums. See Dataset.sound_range."""
        self._check_media(media)
        total = int(self.media.num_samples[media])
        found = self._audio_crc.row(media)
        last_second = _silence_crc(total - AUDIO_BLOCK_SAMPLES * max(len(found) - 1, 0))
        if len(found) > 1 and found[0] != _SILENT_SECOND_CRC and found[-1] != last_second:
            return 0, total
        silence = np.full(len(found), _SILENT_SECOND_CRC, np.uint32)
        silence[-1:] = last_second
        heard = np.flatnonzero(found != silence)
        if not len(heard):
            return 0, 0
        return int(heard[0]) * AUDIO_BLOCK_SAMPLES, min(int(heard[-1] + 1) * AUDIO_BLOCK_SAMPLES, total)

    def same_video(self, media: int, other: int) -> bool:
        """Whether two media are of one source video or share their sound's bytes. See Dataset.same_video."""
        if media == other:
            return True
        offset = int(self._audio_offset[media])
        same_place = offset == self._audio_offset[other] and self._audio_shard[media] == self._audio_shard[other]
        if same_place and self.media.num_samples[media] > 0 and self.media.num_samples[other] > 0:
            return True
        source = self._source[media]
        return bool(source) and source_video(source) == source_video(self._source[other])


@functools.lru_cache(maxsize=AUDIO_BLOCK_SAMPLES + 1)
def _silence_crc(samples: int) -> int:
    """CRC32 of so many samples of silence."""
    return zlib.crc32(bytes(2 * samples))


def _reopen(path: Path, check_crc: bool) -> Store:
    return Store(path, check_tables=False, check_crc=check_crc)


class StoreSplit:
    """One split of a store: a Dataset that gives encoded cuts as well as frames."""

    decoders: tuple[Decoder, ...] = ("dali", "pyav")

    def __init__(self, store: Store, split: str) -> None:
        self.store, self.split = store, split
        self.video_codec = store.info.video_codec
        self.media, self.classes = store.media, store.classes
        self.fingerprint = hashlib.sha256(f"{split}\n{store.digest}".encode()).hexdigest()
        table = store.sample_table(split)
        self.samples = sample_table(table)
        how = Checked(table.path, after_slice=table.drop_pages)
        check_samples(self.samples, len(self.media), self.classes, how)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreSplit, (self.store, self.split)

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """See Dataset.read_video."""
        return self.store.read_video(media, first, last)

    def read_frames(self, media: int, frames: NDArray[Any]) -> tuple[UInt8, UInt8]:
        """See Dataset.read_frames."""
        return self.store.read_frames(media, frames)

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """See Dataset.read_audio."""
        return self.store.read_audio(media, start, count)

    def sound_range(self, media: int) -> tuple[int, int]:
        """See Dataset.sound_range."""
        return self.store.sound_range(media)

    def same_video(self, media: int, other: int) -> bool:
        """See Dataset.same_video."""
        return self.store.same_video(media, other)
