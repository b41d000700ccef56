"""Read a store: a memory-mapped index, and clips as byte ranges that cost the same wherever they start.

Threads and processes share one store (docs/store_format.md): columns are views into the mapped index, reads are
`pread` on shared descriptors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Decoder, Ragged, UInt8, VideoCut, source_video
from pipeline.media.cut_decoder import CutDecoders
from pipeline.media.yuv import Planes, in_order_asked, is_rising
from pipeline.store.format import INDEX_NAME, INFO_NAME, SHARD_FOLDER, StoreError, StoreInfo, parse_info
from pipeline.store.mapped import MappedTable
from pipeline.store.rules import MEDIA_LISTS, Checked, check_media, check_samples, media_table, sample_table
from pipeline.store.shards import Shards
from pipeline.store.streams import AudioStreams, VideoStreams
from pipeline.store.tables import Tables


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
        self._tables = Tables(self.path, self.info, check_digests=check_tables)
        self._index = self._tables.index()
        self.media = media_table(self._index)
        if not len(self.media):
            raise StoreError(f"{self.path / INDEX_NAME}: media (0) must be at least one; make the store again")
        lists = {name: self._index.ragged(name) for name in MEDIA_LISTS}
        num_shards = sum(name.startswith(f"{SHARD_FOLDER}/") for name in self.info.files)
        check_media(self.media, lists, num_shards, Checked(self._index.path, after_slice=self._index.drop_pages))
        self._source = self._index.strings("source")
        self._shards = Shards(self.path, self.media.ids)
        self._videos = VideoStreams(self._index, self.media, self.info, self._shards, check_crc=check_crc)
        self._decoders = CutDecoders()
        self._sounds = AudioStreams(self._index, self.media, self._shards, check_crc=check_crc)

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

    def wait_for_checks(self) -> None:
        """Wait until large tables are checked as well; raises StoreError if one is damaged."""
        self._tables.wait_for_checks()

    def index_columns(self) -> dict[str, Any]:
        """Columns of the index that say where bytes are: numpy views, Ragged for lists."""
        names = ("video_shard", "video_offset", "init_bytes", "init_crc32", "audio_shard", "audio_offset")
        lists = {name: self._index.ragged(name) for name in MEDIA_LISTS}
        views: dict[str, Any] = {name: np.asarray(self._index.column(name)) for name in names}
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
        """The mapped Arrow file of a split; raises StoreError as `split`."""
        return self._tables.samples(split)

    def _check_media(self, media: int) -> None:
        self._tables.raise_damage()
        if not 0 <= media < len(self.media):
            raise StoreError(
                f"{self.path}: media ({media}) must be in 0..{len(self.media) - 1}; take it from samples.media"
            )

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """Bytes that cover frames first..last, both included; O(1) in first. See Dataset.read_video."""
        self._check_media(media)
        return self._videos.read(media, first, last)

    def read_frames(self, media: int, frames: NDArray[Any], out: Planes | None = None) -> Planes:
        """Decoded frames by number, with PyAV; each thread has decoders that live on. See Dataset.read_frames."""
        numbers, inverse = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        if not len(numbers):
            raise StoreError(f"{self.media.id(media)}: frames ([]) must be at least one; fix the plan")
        data, wanted = self._encoded(media, numbers)
        width, height = int(self.media.width[media]), int(self.media.height[media])
        decoder = self._decoders.of_this_thread()
        try:
            planes = decoder.decode(data, wanted, width, height, out if is_rising(inverse) else None)
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            time_s = float(numbers[0]) / self.media.fps(media)
            raise self._shards.error(media, "video", f"{error}; ingest it again", time_s) from error
        return in_order_asked(planes, inverse, out)

    def _encoded(self, media: int, numbers: NDArray[np.int64]) -> tuple[UInt8, NDArray[np.int64]]:
        """Bytes that hold some frames, and which of the frames in them they are."""
        if self.info.video_codec == "mjpeg":
            self._check_media(media)
            return self._videos.read_pictures(media, numbers), np.arange(len(numbers))
        cut = self.read_video(media, int(numbers[0]), int(numbers[-1]))
        return cut.data, numbers - cut.first_frame

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """Samples start..start + count - 1, zeros outside the medium. See Dataset.read_audio."""
        self._check_media(media)
        return self._sounds.read(media, start, count)

    def sound_range(self, media: int) -> tuple[int, int]:
        """Seconds that are not all zeros, by their checksums. See Dataset.sound_range."""
        self._check_media(media)
        return self._sounds.sound_range(media)

    def same_video(self, media: int, other: int) -> bool:
        """Whether two media are of one source video or share their sound's bytes. See Dataset.same_video."""
        if media == other or self._sounds.are_shared(media, other):
            return True
        source = self._source[media]
        return bool(source) and source_video(source) == source_video(self._source[other])


def _reopen(path: Path, check_crc: bool) -> Store:
    return Store(path, check_tables=False, check_crc=check_crc)


class StoreSplit:
    """One split of a store: a Dataset that gives encoded cuts as well as frames."""

    def __init__(self, store: Store, split: str) -> None:
        self.store, self.split = store, split
        self.video_codec = store.info.video_codec
        # DALI decodes no sequence of JPEG pictures that belong to one clip.
        self.decoders: tuple[Decoder, ...] = ("cpu",) if self.video_codec == "mjpeg" else ("cpu", "dali")
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

    def read_frames(self, media: int, frames: NDArray[Any], out: Planes | None = None) -> Planes:
        """See Dataset.read_frames."""
        return self.store.read_frames(media, frames, out)

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """See Dataset.read_audio."""
        return self.store.read_audio(media, start, count)

    def sound_range(self, media: int) -> tuple[int, int]:
        """See Dataset.sound_range."""
        return self.store.sound_range(media)

    def same_video(self, media: int, other: int) -> bool:
        """See Dataset.same_video."""
        return self.store.same_video(media, other)
