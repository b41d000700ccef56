"""Mapped Arrow files and shared descriptors: the parts of a store that are opened once and read by many."""

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import Ragged
from pipeline.store_format import StoreError

_LARGE_BYTES = 16 << 20


class StringColumn(Sequence[str]):
    """A mapped column of strings; makes one only when asked, and stays inside its buffer whatever the offsets say."""

    def __init__(self, offsets: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._offsets, self._data = offsets, data

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        begin, end = int(self._offsets[i]), int(self._offsets[i + 1])
        return self._data[max(begin, 0) : max(end, 0)].tobytes().decode("utf-8", "replace")


class MappedTable:
    """One Arrow file, mapped; columns as numpy views."""

    def __init__(self, path: Path, schema_of: Callable[[Sequence[str]], pa.Schema]) -> None:
        self.path, self._file = path, SharedFile(path)
        try:
            self.map = mmap.mmap(self._file.descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise StoreError(f"{path}: {error}; it must be an Arrow IPC file; restore it or make it again") from error
        try:
            reader = pa.ipc.open_file(pa.py_buffer(self.map))
            if reader.num_record_batches != 1:
                raise StoreError(
                    f"{path}: record batches ({reader.num_record_batches}) must be 1; make the store again"
                )
            self.batch = reader.get_batch(0)
            self.batch.validate()
            self.names: tuple[str, ...] = tuple(self.batch.schema.names)
            found = {item.name: str(item.type) for item in self.batch.schema}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{path}: {error}; it must be an Arrow IPC file; restore it or make it again") from error
        expected = schema_of(self.names)
        if not self.batch.schema.equals(expected):
            wanted = {item.name: str(item.type) for item in expected}
            differ = sorted(k for k in found | wanted if found.get(k) != wanted.get(k)) or "order or nullability"
            raise StoreError(f"{path}: columns ({differ}) must be those of the format's version; make the store again")

    @property
    def is_large(self) -> bool:
        """Whether it would be felt if all of it stayed in memory."""
        return len(self.map) > _LARGE_BYTES

    def drop_pages(self) -> None:
        """Take this process's hands off the mapped pages; what is touched next is mapped again from the page cache.

        A random access maps 64 KiB around it and keeps them: without this, an epoch maps every column it looks at.
        """
        self.map.madvise(mmap.MADV_DONTNEED)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers as a view."""
        return self._view(self.batch.column(name))

    def strings(self, name: str) -> StringColumn:
        """A column of strings."""
        _, offsets, data = self.batch.column(name).buffers()
        values = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        return StringColumn(_numbers(self.path, offsets, np.dtype(np.int32), len(self.batch.column(name)) + 1), values)

    def ragged(self, name: str) -> Ragged:
        """A list column as views of its values and offsets."""
        column = self.batch.column(name)
        offsets = _numbers(self.path, column.buffers()[1], np.dtype(np.int32), len(column) + 1)
        return Ragged(self._view(column.values), offsets)

    def _view(self, column: pa.Array) -> NDArray[Any]:
        dtype = np.dtype({"float": "float32", "double": "float64"}.get(str(column.type), str(column.type)))
        return _numbers(self.path, column.buffers()[1], dtype, len(column), column.offset)

    def unmapped(self, name: str, offsets_of: str | None = None) -> "UnmappedRagged":
        """A list column whose rows are read from the file: touching all of them leaves nothing in memory.

        Args:
            offsets_of: column of the same row lengths whose offsets are used, so that several touch the same pages.
        """
        values, offsets = self.ragged(name).values, self.ragged(offsets_of or name).offsets
        begin = values.__array_interface__["data"][0] - pa.py_buffer(self.map).address if len(values) else 0
        return UnmappedRagged(self._file, begin, values.dtype, offsets, len(values))


def _numbers(path: Path, buffer: pa.Buffer | None, dtype: np.dtype[Any], count: int, offset: int = 0) -> NDArray[Any]:
    """A buffer as numpy, no copy (`to_numpy` would import pandas: 40 MiB a process)."""
    if not count:
        return np.empty(0, dtype)
    if buffer is None or buffer.size < (offset + count) * dtype.itemsize:
        size = 0 if buffer is None else buffer.size
        raise StoreError(f"{path}: a column ({size} bytes) must hold {count} {dtype}; restore the file")
    return np.frombuffer(buffer, dtype, count, offset * dtype.itemsize)


def mapped_bytes() -> int:
    """Pages of files that this process has mapped and touched, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


class SharedFile:
    """An open file that closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class UnmappedRagged:
    """A list column in a file: offsets mapped, each row one small read (a mapped page fault would keep 64 KiB)."""

    def __init__(
        self, file: SharedFile, begin: int, dtype: np.dtype[Any], offsets: NDArray[np.int32], num_values: int
    ) -> None:
        self._file, self._begin, self._dtype = file, begin, dtype
        self._offsets, self._num_values = offsets, num_values

    def row(self, i: int) -> NDArray[Any]:
        """Values of row i; fewer where the file ends early, none where its offsets make no sense."""
        low, high = int(self._offsets[i]), int(self._offsets[i + 1])
        size = self._dtype.itemsize
        if not 0 <= low <= high <= self._num_values:
            return np.empty(0, self._dtype)
        data = os.pread(self._file.descriptor, (high - low) * size, self._begin + low * size)
        return np.frombuffer(data, self._dtype, len(data) // size)
