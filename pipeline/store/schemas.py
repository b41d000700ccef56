"""The tables of a store, version 1: columns of the index and of the sample tables, and how they are written."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.store.durable import sync
from pipeline.store.format import LABEL_PREFIX, FileDigest, digest_file

_INDEX_COLUMNS: tuple[tuple[str, str], ...] = (
    ("id", "string"),
    ("video_shard", "int32"),
    ("video_offset", "int64"),
    ("init_bytes", "int32"),
    ("init_crc32", "uint32"),
    ("fragment_offset", "list<int64>"),
    ("fragment_bytes", "list<int32>"),
    ("fragment_first_frame", "list<int32>"),
    ("fragment_crc32", "list<uint32>"),
    ("num_frames", "int32"),
    ("fps_num", "int32"),
    ("fps_den", "int32"),
    ("width", "int32"),
    ("height", "int32"),
    ("display_width", "int32"),
    ("display_height", "int32"),
    ("audio_shard", "int32"),
    ("audio_offset", "int64"),
    ("num_samples", "int64"),
    ("audio_crc32", "list<uint32>"),
    ("source", "string"),
    ("source_start_s", "float64"),
    ("source_end_s", "float64"),
    ("flags", "uint32"),
    ("note", "string"),
)
_SAMPLE_COLUMNS: tuple[tuple[str, str], ...] = (
    ("id", "string"),
    ("media", "int64"),
    ("start_s", "float64"),
    ("end_s", "float64"),
    ("key_time_s", "float64"),
    ("actions_label", "list<int32>"),
    ("actions_start_s", "list<float64>"),
    ("actions_end_s", "list<float64>"),
    ("boxes", "list<float32>"),
    ("box_label_counts", "list<int32>"),
    ("box_labels", "list<int32>"),
    ("box_scores", "list<float32>"),
)
_PRIMITIVES: dict[str, Callable[[], Any]] = {
    "int32": pa.int32,
    "int64": pa.int64,
    "uint32": pa.uint32,
    "float32": pa.float32,
    "float64": pa.float64,
    "string": pa.string,
}


def _schema(columns: Iterable[tuple[str, str]]) -> pa.Schema:
    def arrow_type(name: str) -> pa.DataType:
        return pa.list_(_PRIMITIVES[name[5:-1]]()) if name.startswith("list<") else _PRIMITIVES[name]()

    return pa.schema([pa.field(column, arrow_type(kind), nullable=False) for column, kind in columns])


def index_schema() -> pa.Schema:
    """Arrow schema of index.arrow."""
    return _schema(_INDEX_COLUMNS)


def sample_schema(label_sets: Iterable[str]) -> pa.Schema:
    """Arrow schema of samples-<split>.arrow with one list<int32> column labels_<set> a label set."""
    return _schema(_SAMPLE_COLUMNS + tuple((f"{LABEL_PREFIX}{name}", "list<int32>") for name in sorted(label_sets)))


def write_arrow(path: Path, schema: pa.Schema, columns: Sequence[pa.Array]) -> FileDigest:
    """Write one record batch as an uncompressed Arrow IPC file, flushed to the disk; returns its digest."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns), schema=schema))
    sync(path)
    return digest_file(path)
