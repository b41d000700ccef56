"""The two streams of the media in a store: which bytes are theirs, read as ranges and compared with their checksums.

A range costs the same wherever it starts. Nothing here makes a Python object per medium.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import MediaTable, UInt8, VideoCut
from pipeline.store.format import AUDIO_BLOCK_SAMPLES, StoreError, StoreInfo, shard_file
from pipeline.store.mapped import MappedTable
from pipeline.store.shards import Shards

_SILENT_SECOND_CRC = zlib.crc32(bytes(2 * AUDIO_BLOCK_SAMPLES))


class VideoStreams:
    """Cuts of videos.

    Args:
        index: of the store. media: its columns that everybody needs. info: sizes of the shards. shards: the bytes.
        check_crc: compare the CRC32 of everything that is read.
    """

    def __init__(
        self, index: MappedTable, media: MediaTable, info: StoreInfo, shards: Shards, *, check_crc: bool
    ) -> None:
        self._media, self._info, self._shards, self._check_crc = media, info, shards, check_crc
        self._offset, self._init_bytes = index.column("video_offset"), index.column("init_bytes")
        self._init_crc32 = index.column("init_crc32")
        self._fragments = {
            name: index.ragged(f"fragment_{name}") for name in ("offset", "bytes", "first_frame", "crc32")
        }

    def read(self, media: int, first: int, last: int) -> VideoCut:
        """See Dataset.read_video."""
        total = int(self._media.num_frames[media])
        if not 0 <= first <= last < total:
            raise StoreError(
                f"{self._media.id(media)}: frames ({first}..{last}) must rise within 0..{total - 1}; fix the plan"
            )
        rows = {name: column.row(media) for name, column in self._fragments.items()}
        starts = rows["first_frame"]
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        end = int(np.searchsorted(starts, last, side="right"))
        whole = len({len(column) for column in rows.values()}) == 1 and 0 <= begin < end
        data = self._load(media, {name: row[begin:end] for name, row in rows.items()}, whole=whole)
        after = int(starts[end]) if end < len(starts) else total
        return VideoCut(data, int(starts[begin]), after - int(starts[begin]))

    def read_pictures(self, media: int, numbers: NDArray[np.int64]) -> UInt8:
        """Init segment and the fragments of single frames, for videos whose every frame is a fragment (MJPEG).

        Args:
            media: row of the index. numbers: (F,) rising, without repeats.

        Returns:
            (B,) bytes that decode to F frames; nothing between them is read.
        """
        total = int(self._media.num_frames[media])
        if not len(numbers) or numbers[0] < 0 or numbers[-1] >= total:
            span = f"{numbers[:1]}..{numbers[-1:]}"
            raise StoreError(f"{self._media.id(media)}: frames ({span}) must lie within 0..{total - 1}; fix the plan")
        rows = {name: column.row(media) for name, column in self._fragments.items()}
        if any(len(column) != total for column in rows.values()):
            shard = self._media.shard[media]
            reason = f"index row (shard {shard}) must have a fragment for each of {total} frames; verify the store"
            raise self._shards.error(media, "video", reason)
        return self._load(media, {name: row[numbers] for name, row in rows.items()}, whole=True)

    def _load(self, media: int, rows: Mapping[str, NDArray[Any]], *, whole: bool) -> UInt8:
        """Read the init segment and fragments, and check them.

        Args:
            media: row of the index. rows: of its fragments, those wanted. whole: whether they are all there.
        """
        offsets, sizes = rows["offset"].tolist(), rows["bytes"].tolist()
        init_bytes, shard = self._init_bytes[media], self._media.shard[media]
        size = init_bytes + sum(sizes)
        limit = self._info.files.get(shard_file(shard)) if shard >= 0 else None
        if not whole or min(init_bytes, *sizes) < 1 or limit is None or size > limit.bytes:
            reason = f"index row (shard {shard}, {size} bytes) must lie in a shard; verify the store"
            raise self._shards.error(media, "video", reason)
        data: UInt8 = np.empty(size, np.uint8)
        view = data.data
        self._shards.read(media, "video", shard, self._offset[media], view[:init_bytes])
        self._read_runs(media, shard, offsets, sizes, view[init_bytes:])
        if self._check_crc:
            crcs = [self._init_crc32[media], *rows["crc32"].tolist()]
            self._check(media, view, [init_bytes, *sizes], crcs, rows["first_frame"])
        return data

    def _read_runs(self, media: int, shard: int, offsets: list[int], sizes: list[int], target: memoryview) -> None:
        """Read fragments with one call for each run of adjacent ones (usually one in all)."""
        begin, done = 0, 0
        for i in range(1, len(offsets) + 1):
            if i == len(offsets) or offsets[i] != offsets[i - 1] + sizes[i - 1]:
                size = sum(sizes[begin:i])
                self._shards.read(media, "video", shard, offsets[begin], target[done : done + size])
                begin, done = i, done + size

    def _check(
        self, media: int, view: memoryview, sizes: list[int], crcs: list[int], starts: NDArray[np.int32]
    ) -> None:
        done = 0
        for i, (size, crc) in enumerate(zip(sizes, crcs, strict=True)):
            found = zlib.crc32(view[done : done + size])
            done += size
            if found != crc:
                part = "init segment" if i == 0 else f"fragment from frame {starts[i - 1]}"
                time_s = 0.0 if i == 0 else int(starts[i - 1]) / self._media.fps(media)
                reason = f"{part}: crc32 ({found:08x}) must be {crc:08x}; verify the store"
                raise self._shards.error(media, "video", reason, time_s)


class AudioStreams:
    """Windows of sound; arguments as in `VideoStreams`."""

    def __init__(self, index: MappedTable, media: MediaTable, shards: Shards, *, check_crc: bool) -> None:
        self._media, self._shards, self._check_crc = media, shards, check_crc
        self._shard, self._offset = index.column("audio_shard"), index.column("audio_offset")
        self._crc32 = index.ragged("audio_crc32")

    def read(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """See Dataset.read_audio."""
        if count < 0:
            raise StoreError(f"{self._media.id(media)}: count ({count}) must be >= 0; fix the plan")
        out = np.zeros(count, np.int16)
        total = int(self._media.num_samples[media])
        begin, end = max(start, 0), min(start + count, total)
        if begin >= end:
            return out
        first, last = begin // AUDIO_BLOCK_SAMPLES, -(-end // AUDIO_BLOCK_SAMPLES)
        block_begin, block_end = first * AUDIO_BLOCK_SAMPLES, min(last * AUDIO_BLOCK_SAMPLES, total)
        if not self._check_crc:
            block_begin, block_end = begin, end
        data = np.empty(block_end - block_begin, "<i2")
        view = data.data.cast("B")
        self._shards.read(media, "audio", self._shard[media], self._offset[media] + 2 * block_begin, view)
        if self._check_crc:
            self._check(media, view, self._crc32.row(media)[first:last].tolist(), first)
        out[begin - start : end - start] = data[begin - block_begin : end - block_begin]
        return out

    def _check(self, media: int, view: memoryview, crcs: list[int], first: int) -> None:
        step = 2 * AUDIO_BLOCK_SAMPLES
        found = [zlib.crc32(view[i : i + step]) for i in range(0, len(view), step)]
        if found != crcs:
            bad = next((i for i, pair in enumerate(zip(found, crcs, strict=False)) if pair[0] != pair[1]), len(crcs))
            reason = f"crc32 of second {first + bad} must match; verify the store"
            raise self._shards.error(media, "audio", reason, float(first + bad))

    def sound_range(self, media: int) -> tuple[int, int]:
        """Seconds that are not all zeros, by their checksums. See Dataset.sound_range."""
        total = int(self._media.num_samples[media])
        found = self._crc32.row(media)
        last_second = _silence_crc(total - AUDIO_BLOCK_SAMPLES * max(len(found) - 1, 0))
        if len(found) > 1 and found[0] != _SILENT_SECOND_CRC and found[-1] != last_second:
            return 0, total
        silence = np.full(len(found), _SILENT_SECOND_CRC, np.uint32)
        silence[-1:] = last_second
        heard = np.flatnonzero(found != silence)
        if not len(heard):
            return 0, 0
        return int(heard[0]) * AUDIO_BLOCK_SAMPLES, min(int(heard[-1] + 1) * AUDIO_BLOCK_SAMPLES, total)

    def are_shared(self, media: int, other: int) -> bool:
        """Whether two media that have sound share its bytes."""
        if self._offset[media] != self._offset[other] or self._shard[media] != self._shard[other]:
            return False
        return bool(self._media.num_samples[media] > 0 and self._media.num_samples[other] > 0)


@functools.lru_cache(maxsize=AUDIO_BLOCK_SAMPLES + 1)
def _silence_crc(samples: int) -> int:
    """CRC32 of so many samples of silence."""
    return zlib.crc32(bytes(2 * samples))
