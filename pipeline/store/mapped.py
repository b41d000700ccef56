"""Mapped Arrow files and shared descriptors: the parts of a store that are opened once and read by many."""

import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.media.reading import OPEN_READS, patiently
from pipeline.store.format import StoreError

_PAIR = struct.Struct("<ii")
_CODES = {"<i4": "<i", "<i8": "<q", "<u4": "<I", "<u8": "<Q", "<f4": "<f", "<f8": "<d"}


class NumberColumn:
    """A column of numbers (N,) in a file: `column[i]` reads one of them, `np.asarray(column)` is a view of the map.

    A random access to the map keeps 64 KiB and more of it in memory: an epoch would map every column. A read takes as
    long and keeps nothing.
    """

    def __init__(self, file: "SharedFile", begin: int, values: NDArray[Any]) -> None:
        self._file, self._begin, self._values = file, begin, values
        self._size, self._unpack = values.itemsize, struct.Struct(_CODES[values.dtype.str]).unpack

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i: int) -> Any:
        (value,) = self._unpack(self._file.read(self._begin + self._size * _row(i, len(self)), self._size))
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype, copy=copy)


class _Offsets:
    """Where the N rows of strings or lists begin and end, (N + 1,) int32 in a file."""

    def __init__(self, file: "SharedFile", begin: int, values: NDArray[np.int32]) -> None:
        self._file, self._begin, self.values = file, begin, values

    def of(self, i: int) -> tuple[int, int]:
        """Where row i begins and ends, read from the file."""
        begin, end = _PAIR.unpack(self._file.read(self._begin + 4 * _row(i, len(self.values) - 1), 8))
        return begin, end


def _row(i: int, count: int) -> int:
    if not 0 <= i < count:
        raise IndexError(f"row {i} of {count}")
    return int(i)


class StringColumn(Sequence[str]):
    """A column of strings, read one at a time; stays inside its buffer whatever the offsets say."""

    def __init__(self, file: "SharedFile", offsets: _Offsets, begin: int, num_bytes: int) -> None:
        self._file, self._offsets, self._begin, self._num_bytes = file, offsets, begin, num_bytes

    def __len__(self) -> int:
        return len(self._offsets.values) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        begin, end = self._offsets.of(i)
        begin, end = max(begin, 0), min(max(end, 0), self._num_bytes)
        return self._file.read(self._begin + begin, max(end - begin, 0)).decode("utf-8", "replace")


class ListColumn:
    """A column of lists: `row` reads one from the file; `values` and `offsets` are views of the map."""

    def __init__(self, file: "SharedFile", begin: int, values: NDArray[Any], offsets: _Offsets) -> None:
        self._file, self._begin, self.values, self._offsets = file, begin, values, offsets

    @property
    def offsets(self) -> NDArray[np.int32]:
        """Where rows begin and end, (N + 1,)."""
        return self._offsets.values

    def row(self, i: int) -> NDArray[Any]:
        """Values of row i, read-only; none where its offsets make no sense."""
        low, high = self._offsets.of(i)
        if not 0 <= low <= high <= len(self.values):
            return np.empty(0, self.values.dtype)
        size = self.values.itemsize
        return np.frombuffer(self._file.read(self._begin + low * size, (high - low) * size), self.values.dtype)


class MappedTable:
    """One Arrow file, mapped: columns by name."""

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
            self._address = pa.py_buffer(self.map).address
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

    def drop_pages(self) -> None:
        """Take this process's hands off the mapped pages; what is touched next is mapped again from the page cache."""
        self.map.madvise(mmap.MADV_DONTNEED)

    def column(self, name: str) -> NumberColumn:
        """A column of numbers."""
        values = self._view(self.batch.column(name))
        return NumberColumn(self._file, self._begin(values), values)

    def strings(self, name: str) -> StringColumn:
        """A column of strings."""
        _, _, data = self.batch.column(name).buffers()
        begin, num_bytes = (0, 0) if data is None or not data.size else (data.address - self._address, data.size)
        return StringColumn(self._file, self._offsets(name), begin, num_bytes)

    def ragged(self, name: str) -> ListColumn:
        """A column of lists."""
        values = self._view(self.batch.column(name).values)
        return ListColumn(self._file, self._begin(values), values, self._offsets(name))

    def _offsets(self, name: str) -> _Offsets:
        column = self.batch.column(name)
        values = _numbers(self.path, column.buffers()[1], np.dtype(np.int32), len(column) + 1)
        return _Offsets(self._file, self._begin(values), values)

    def _begin(self, values: NDArray[Any]) -> int:
        """Where a view begins in the file."""
        return int(values.__array_interface__["data"][0]) - self._address if len(values) else 0

    def _view(self, column: pa.Array) -> NDArray[Any]:
        dtype = np.dtype({"float": "float32", "double": "float64"}.get(str(column.type), str(column.type)))
        return _numbers(self.path, column.buffers()[1], dtype, len(column), column.offset)


def _numbers(path: Path, buffer: pa.Buffer | None, dtype: np.dtype[Any], count: int, offset: int = 0) -> NDArray[Any]:
    """A buffer as numpy, no copy (`to_numpy` would import pandas: 40 MiB a process)."""
    if not count:
        return np.empty(0, dtype)
    if buffer is None or buffer.size < (offset + count) * dtype.itemsize:
        size = 0 if buffer is None else buffer.size
        raise StoreError(f"{path}: a column ({size} bytes) must hold {count} {dtype}; restore the file")
    return np.frombuffer(buffer, dtype, count, offset * dtype.itemsize)


class SharedFile:
    """An open file that closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, begin: int, count: int) -> bytes:
        """Return `count` bytes from `begin`; raises StoreError if the file was cut, OSError with its name otherwise."""
        with OPEN_READS.of(self.path, begin):
            data = patiently(lambda: self._read(begin, count))
        if len(data) != count:
            raise StoreError(f"{self.path}: bytes ({len(data)}) at {begin} must be {count}; it was cut, copy it again")
        return data

    def _read(self, begin: int, count: int) -> bytes:
        try:
            return os.pread(self.descriptor, count, begin)
        except OSError as error:  # of a descriptor: the system names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
