"""What a data set looks like to the rest of the pipeline: tables of media and samples, reads by frame and sample.

The splits of a store (`pipeline/store/reader.py`) and of a folder (`pipeline/folder/dataset.py`) are each a `Dataset`,
and so is a share of one (`pipeline/subset.py`).
Legend: N media, S samples, R boxes, L labels, F frames, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
FLAG_SILENT, FLAG_SHORT, FLAG_REPAIRED = 1, 2, 4  # bits of MediaTable.flags
_CLIP_NAME = re.compile(r"(?:^|/)([A-Za-z0-9_-]{11})_[0-9]{6}_[0-9]{6}\.[^./]+$")  # Kinetics

# FFmpeg on the CPU; NVDEC with decoders that live on; DALI from encoded cuts (VP9 on a CPU, NVDEC on a GPU)
Decoder = Literal["cpu", "nvdec", "dali"]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]


def source_video(path: str) -> str:
    """Return what tells a file's video from others: its path, or the YouTube id of clips called <id>_<start>_<end>."""
    match = _CLIP_NAME.search(path)
    return match[1] if match else path


class MediaError(ValueError):
    """Bytes or frames of one medium are not available: names the medium, the stream and the time.

    Args:
        where: id or path of the medium (and the file of the store, where there is one).
        stream: "video" or "audio".
        reason: what was found, what must hold, what to do.
        time_s: time in the medium in seconds, if one is known.
    """

    def __init__(self, where: str, stream: str, reason: str, *, time_s: float | None = None) -> None:
        at = "" if time_s is None else f" at {time_s:.3f} s"
        super().__init__(f"{where}: {stream}{at}: {reason}")
        self.where, self.stream, self.reason, self.time_s = where, stream, reason, time_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _media_error, (self.where, self.stream, self.reason, self.time_s)


def _media_error(where: str, stream: str, reason: str, time_s: float | None) -> MediaError:
    return MediaError(where, stream, reason, time_s=time_s)


class Numbers(Protocol):
    """A column of numbers, (N,): an array, or a column of a file, of which one number at a time is read.

    `column[i]` is one number, i from 0 to N - 1; `np.asarray(column)` is all of them, for slices and arithmetic.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...
    def __array__(self) -> NDArray[Any]: ...


class Lists(Protocol):
    """A column of lists: row i is values[offsets[i]:offsets[i + 1]], of `values` (V,) and `offsets` (N + 1,)."""

    @property
    def values(self) -> NDArray[Any]: ...
    @property
    def offsets(self) -> NDArray[Any]: ...

    def row(self, i: int) -> NDArray[Any]:
        """Values of row i."""
        ...


class Ragged(NamedTuple):
    """A column of lists in memory: row i is values[offsets[i]:offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[Any]

    def row(self, i: int) -> NDArray[Any]:
        """Values of row i, a view."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class MediaTable:
    """One row a medium; columns of length N. In a store they stay in its file (`Numbers`).

    Frame numbers and sample numbers count from 0 on one timeline: frame f is shown from f * fps_den / fps_num seconds,
    audio sample a is at a / 16000 seconds.

    Args:
        ids: N unique names.
        num_frames: (N,) int32. fps_num, fps_den: (N,) int32, frames per second as a ratio.
        width, height: (N,) int32 px as decoded (even; in a store multiples of 16).
        display_width, display_height: (N,) int32 px with the true aspect ratio.
        num_samples: (N,) int64 audio samples at 16 kHz, 0 = silent. flags: (N,) uint32 of FLAG_*.
        shard: (N,) int32 the file that holds the bytes (for reading shard by shard).
    """

    ids: Sequence[str]
    num_frames: Numbers
    fps_num: Numbers
    fps_den: Numbers
    width: Numbers
    height: Numbers
    display_width: Numbers
    display_height: Numbers
    num_samples: Numbers
    flags: Numbers
    shard: Numbers

    def __len__(self) -> int:
        return len(self.num_frames)

    def id(self, i: int) -> str:
        """Name of medium i."""
        return self.ids[i]

    def fps(self, i: int) -> float:
        """Frames per second of medium i."""
        return float(self.fps_num[i]) / float(self.fps_den[i])

    def duration_s(self, i: int) -> float:
        """Duration of medium i in seconds: its frames at its rate."""
        return int(self.num_frames[i]) * int(self.fps_den[i]) / int(self.fps_num[i])


class SampleActions(NamedTuple):
    """Timed labels of one sample: label (L,) int32, start_s and end_s (L,) float64 in the medium's time."""

    label: Int32
    start_s: Float64
    end_s: Float64


class SampleBoxes(NamedTuple):
    """Boxes of one sample: boxes (R, 4) float32 x1, y1, x2, y2 in [0, 1]; label_counts (R,) int32; labels (L,) int32,
    the labels of box 0, then box 1, ...; scores (R,) float32."""

    boxes: Float32
    label_counts: Int32
    labels: Int32
    scores: Float32

    def classes(self) -> list[tuple[int, ...]]:
        """Labels of each box."""
        ends = np.cumsum(self.label_counts).tolist()
        return [tuple(self.labels[e - n : e].tolist()) for e, n in zip(ends, self.label_counts.tolist(), strict=True)]


@dataclass(frozen=True)
class SampleTable:
    """One row a sample (what an annotation file lists); several samples may refer to one medium.

    Args:
        ids: S unique names.
        media: (S,) int64 row of the media table.
        start_s, end_s: (S,) float64 in the medium's time. key_time_s: (S,) float64, nan = none.
        label_sets: name -> lists of int32, e.g. "action", or "verb" and "noun".
        action_columns, box_columns: list columns of timed labels and boxes, None where the split has none.
    """

    ids: Sequence[str]
    media: Numbers
    start_s: Numbers
    end_s: Numbers
    key_time_s: Numbers
    label_sets: Mapping[str, Lists]
    action_columns: tuple[Lists, Lists, Lists] | None = None
    box_columns: tuple[Lists, Lists, Lists, Lists] | None = None

    def __len__(self) -> int:
        return len(self.media)

    def id(self, i: int) -> str:
        """Name of sample i."""
        return self.ids[i]

    def has(self, name: str) -> bool:
        """Whether the label set `name` exists."""
        return name in self.label_sets

    def labels(self, name: str) -> Lists:
        """Label set `name`: values (L,) int32, offsets (S + 1,); raises ValueError for an unknown set."""
        if name not in self.label_sets:
            raise ValueError(f"label set ({name}) must be one of {sorted(self.label_sets)}; choose one of these")
        return self.label_sets[name]

    def label_of(self, i: int, name: str) -> int:
        """The one label of sample i in set `name`; raises ValueError when it has none or several."""
        row = self.labels(name).row(i)
        if len(row) != 1:
            raise ValueError(
                f"sample {self.id(i)}: labels in {name} ({row.tolist()}) must be exactly one; use labels()"
            )
        return int(row[0])

    def actions(self, i: int) -> SampleActions:
        """Timed labels of sample i (empty where it has none)."""
        if self.action_columns is None:
            return SampleActions(np.empty(0, np.int32), np.empty(0, np.float64), np.empty(0, np.float64))
        return SampleActions(*(column.row(i) for column in self.action_columns))

    def boxes(self, i: int) -> SampleBoxes:
        """Boxes of sample i (empty where it has none)."""
        if self.box_columns is None:
            none = np.empty(0, np.int32)
            return SampleBoxes(np.empty((0, 4), np.float32), none, none, np.empty(0, np.float32))
        boxes, counts, labels, scores = (column.row(i) for column in self.box_columns)
        return SampleBoxes(boxes.reshape(-1, 4), counts, labels, scores)


@dataclass(frozen=True)
class VideoCut:
    """A decodable cut of a stored video.

    Args:
        data: (B,) uint8, the init segment followed by the fragments that cover the wanted frames.
        first_frame: number in the medium of the first frame that `data` decodes to.
        num_frames: frames that `data` decodes to.
    """

    data: UInt8
    first_frame: int
    num_frames: int


class Dataset(Protocol):
    """A split of a data set. Threads may share one; it can be pickled and opens itself again in the other process."""

    @property
    def media(self) -> MediaTable: ...
    @property
    def samples(self) -> SampleTable: ...
    @property
    def classes(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def split(self) -> str: ...

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """How clips can be decoded: "cpu" by `read_frames`; "dali" as well where `read_video` gives cuts."""
        ...

    @property
    def video_codec(self) -> str:
        """Codec of a store ("h264", "vp9", "mjpeg"); "" of plain files, each of which has its own."""
        ...

    def same_video(self, media: int, other: int) -> bool:
        """Whether two media belong to one source video or share their sound: never an easy negative of each other."""
        ...

    def sound_range(self, media: int) -> tuple[int, int]:
        """First sample of the sound and the one after its last, without the silence that was put before it; (0, 0) if
        there is none. A store knows it to the second, from its index alone."""
        ...

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """Bytes that cover frames first..last, both included.

        Raises:
            MediaError: bytes missing or with a wrong checksum. ValueError: frames outside the medium.
        """
        ...

    def read_frames(
        self, media: int, frames: NDArray[Any], out: tuple[UInt8, UInt8] | None = None
    ) -> tuple[UInt8, UInt8]:
        """Decoded frames by number, in the order asked (ascending is fastest; repeats are allowed).

        Args:
            frames: (F,) integers in 0..num_frames - 1.
            out: memory for the result, of its shapes; None takes new memory.

        Returns:
            y (F, H, W, 1) and uv (F, H/2, W/2, 2) uint8, BT.601 limited range; `out` where it was given.

        Raises:
            MediaError: undecodable. ValueError: frames outside the medium.
        """
        ...

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """Samples start..start + count - 1, 16 kHz mono int16 (count,); zeros outside the medium (start may be < 0)."""
        ...


def sample_shards(dataset: Dataset) -> Int32:
    """Shard of each sample's video, (S,) int32, for plans that shuffle shard by shard."""
    return np.asarray(dataset.media.shard)[np.asarray(dataset.samples.media)]


def used_media(dataset: Dataset) -> NDArray[np.int64]:
    """Media that samples of a split are of, (n,) int64, rising; in one pass: to sort millions takes seconds."""
    is_used = np.zeros(len(dataset.media), np.bool_)
    is_used[np.asarray(dataset.samples.media)] = True
    return np.flatnonzero(is_used)
