"""What goes into a store: references to written bytes, rows of the sample tables, and the columns they become."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import Ragged

_TYPECODES = {"int32": "i", "int64": "q", "uint32": "I", "float32": "f", "float64": "d"}


@dataclass(frozen=True)
class VideoRef:
    """Where a video's bytes are in the shards; several media may use one."""

    shard: int
    offset: int
    init_bytes: int
    init_crc32: int
    fragment_offset: tuple[int, ...]
    fragment_bytes: tuple[int, ...]
    fragment_first_frame: tuple[int, ...]
    fragment_crc32: tuple[int, ...]
    num_frames: int
    fps_num: int
    fps_den: int
    width: int
    height: int


@dataclass(frozen=True)
class AudioRef:
    """Where a track's samples are in the shards; crc32 one per block of 16 000 samples."""

    shard: int
    offset: int
    num_samples: int
    crc32: tuple[int, ...]


def media_columns(video: VideoRef, audio: AudioRef) -> dict[str, Any]:
    """Values of a row of the index that say where its bytes are and what they hold, by column."""
    return {
        "video_shard": video.shard,
        "video_offset": video.offset,
        "init_bytes": video.init_bytes,
        "init_crc32": video.init_crc32,
        "fragment_offset": video.fragment_offset,
        "fragment_bytes": video.fragment_bytes,
        "fragment_first_frame": video.fragment_first_frame,
        "fragment_crc32": video.fragment_crc32,
        "num_frames": video.num_frames,
        "fps_num": video.fps_num,
        "fps_den": video.fps_den,
        "width": video.width,
        "height": video.height,
        "audio_shard": audio.shard,
        "audio_offset": audio.offset,
        "num_samples": audio.num_samples,
        "audio_crc32": audio.crc32,
    }


class TimedLabelLike(Protocol):
    """A label with times in the medium (pipeline/annotations/rows.py: TimedLabel)."""

    @property
    def label(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...


class BoxLike(Protocol):
    """A box in [0, 1] with labels (pipeline/annotations/rows.py: Box)."""

    @property
    def x1(self) -> float: ...
    @property
    def y1(self) -> float: ...
    @property
    def x2(self) -> float: ...
    @property
    def y2(self) -> float: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def score(self) -> float: ...


@dataclass(frozen=True)
class SampleRow:
    """One sample of a split.

    Args:
        id: unique in the split. media: what add_media returned.
        start_s, end_s: seconds in the medium. labels: set -> class ids (may be empty).
        actions: labels with times. key_time_s: second of the key frame, None = none. boxes: of the key frame.
    """

    id: str
    media: int
    start_s: float
    end_s: float
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    actions: Sequence[TimedLabelLike] = ()
    key_time_s: float | None = None
    boxes: Sequence[BoxLike] = ()


def sample_columns(row: SampleRow) -> dict[str, Any]:
    """Values of one row of a sample table by column."""
    columns = {
        "id": row.id,
        "media": row.media,
        "start_s": row.start_s,
        "end_s": row.end_s,
        "key_time_s": float("nan") if row.key_time_s is None else row.key_time_s,
        "actions_label": [a.label for a in row.actions],
        "actions_start_s": [a.start_s for a in row.actions],
        "actions_end_s": [a.end_s for a in row.actions],
        "boxes": [value for box in row.boxes for value in (box.x1, box.y1, box.x2, box.y2)],
        "box_label_counts": [len(box.labels) for box in row.boxes],
        "box_labels": [label for box in row.boxes for label in box.labels],
        "box_scores": [box.score for box in row.boxes],
    }
    return columns | {f"labels_{name}": list(labels) for name, labels in row.labels.items()}


class GrowingTable:
    """Columns of one Arrow table, grown row by row in typed arrays (no Python object per value)."""

    def __init__(self, schema: pa.Schema) -> None:
        self.columns: dict[str, Any] = {}
        self.offsets: dict[str, Any] = {}
        self.rows = 0
        for item in schema:
            self.add_column(item.name, item.type)

    def add_column(self, name: str, kind: pa.DataType) -> None:
        """Add a column; a list column may come late, earlier rows are empty."""
        if pa.types.is_list(kind):
            self.offsets[name] = array("i", [0] * (self.rows + 1))
            kind = kind.value_type
        self.columns[name] = [] if pa.types.is_string(kind) else array(_TYPECODES[_kind_name(kind)])

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row; list columns take sequences."""
        for name, column in self.columns.items():
            if name in self.offsets:
                column.extend(row.get(name, ()))
                self.offsets[name].append(len(column))
            else:
                column.append(row[name])
        self.rows += 1

    def extend(self, other: "GrowingTable") -> None:
        """Append the rows of another table, whose columns are all here; list columns it does not have are empty."""
        for name, column in self.columns.items():
            if name in self.offsets:
                begin = len(column)
                ends = other.offsets.get(name, [0] * (other.rows + 1))[1:]
                column.extend(other.columns.get(name, ()))
                self.offsets[name].extend(begin + end for end in ends)
            else:
                column.extend(other.columns[name])
        self.rows += other.rows

    @property
    def names(self) -> tuple[str, ...]:
        """Its columns."""
        return tuple(self.columns)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers as a view; the table must not grow while it is used."""
        return _numpy(self.columns[name])

    def strings(self, name: str) -> Sequence[str]:
        """A column of strings."""
        return list(self.columns[name])

    def ragged(self, name: str) -> Ragged:
        """A list column as views, as `column`."""
        return Ragged(_numpy(self.columns[name]), _numpy(self.offsets[name]))

    def arrays(self, schema: pa.Schema) -> list[pa.Array]:
        """Columns as Arrow arrays in the order of the schema."""
        out = []
        for item in schema:
            is_list = item.name in self.offsets
            kind = item.type.value_type if is_list else item.type
            values = pa.array(
                self.columns[item.name] if pa.types.is_string(kind) else _numpy(self.columns[item.name]), kind
            )
            out.append(pa.ListArray.from_arrays(_numpy(self.offsets[item.name]), values) if is_list else values)
        return out


def _kind_name(kind: pa.DataType) -> str:
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _numpy(values: Any) -> NDArray[Any]:
    return np.frombuffer(values, dtype=values.typecode) if len(values) else np.empty(0, values.typecode)
