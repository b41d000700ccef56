"""Mapped Arrow files and shared descriptors: the parts of a store that are opened once and read by many."""

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import Ragged
from pipeline.store.format import StoreError

_INTEGERS = (int, np.integer)
_PAIR = struct.Struct("<ii")
_STRUCT_CODES = {"<i4": "<i", "<i8": "<q", "<u4": "<I", "<u8": "<Q", "<f4": "<f", "<f8": "<d"}


class Column(np.lib.mixins.NDArrayOperatorsMixin):
    """Numbers of one column: a single one is read from the file, slices and the whole are views of the map.

    It serves where an array (N,) is wanted. A random access to the map keeps 64 KiB and more of it in memory: an epoch
    would map every column. A read takes as long and keeps nothing.
    """

    def __init__(self, file: "SharedFile", begin: int, values: NDArray[Any]) -> None:
        self._file, self._begin, self._values, self._count = file, begin, values, len(values)
        self._last: tuple[int, Any] = (-1 << 62, 0)
        self._size, self._unpack = values.itemsize, struct.Struct(_STRUCT_CODES[values.dtype.str]).unpack

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if not isinstance(i, _INTEGERS):
            return self._values[i]
        place, value = self._last  # what makes a clip asks several times for the same row
        if i == place:
            return value
        place = i + self._count if i < 0 else int(i)
        if not 0 <= place < self._count:
            raise IndexError(f"row {i} of {self._count}")
        (value,) = self._unpack(self._file.read(self._begin + self._size * place, self._size))
        self._last = place, value
        return value

    def pair(self, i: int) -> tuple[int, int]:
        """Values i and i + 1, of offsets: where row i begins and ends."""
        place = i + self._count - 1 if i < 0 else i
        if not 0 <= place < self._count - 1:
            raise IndexError(f"row {i} of {self._count - 1}")
        begin, end = _PAIR.unpack(self._file.read(self._begin + 4 * int(place), 8))
        return begin, end

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Column) else x for x in inputs), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._values, name)


class StringColumn(Sequence[str]):
    """A column of strings, read one at a time; stays inside its buffer whatever the offsets say."""

    def __init__(self, file: "SharedFile", offsets: Column, begin: int, num_bytes: int) -> None:
        self._file, self._offsets, self._begin, self._num_bytes = file, offsets, begin, num_bytes

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        begin, end = self._offsets.pair(i)
        begin, end = max(begin, 0), min(max(end, 0), self._num_bytes)
        return self._file.read(self._begin + begin, max(end - begin, 0)).decode("utf-8", "replace")


class RaggedColumn:
    """A list column whose rows are read from the file; `values` and `offsets` are views of the map, as in `Ragged`."""

    def __init__(self, file: "SharedFile", begin: int, values: NDArray[Any], offsets: Column) -> None:
        self._file, self._begin, self.values, self._offsets = file, begin, values, offsets

    @property
    def offsets(self) -> NDArray[np.int32]:
        """Where rows begin and end, (N + 1,)."""
        return np.asarray(self._offsets)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter((self.values, self.offsets))

    def row(self, i: int) -> NDArray[Any]:
        """Values of row i, read-only; none where its offsets make no sense."""
        low, high = self._offsets.pair(i)
        if not 0 <= low <= high <= len(self.values):
            return np.empty(0, self.values.dtype)
        size = self.values.itemsize
        return np.frombuffer(self._file.read(self._begin + low * size, (high - low) * size), self.values.dtype)


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

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers: a `Column`, which serves as an array of one dimension."""
        return cast(NDArray[Any], self._column(self._view(self.batch.column(name))))

    def strings(self, name: str) -> StringColumn:
        """A column of strings."""
        _, _, data = self.batch.column(name).buffers()
        begin, num_bytes = (0, 0) if data is None or not data.size else (data.address - self._address, data.size)
        return StringColumn(self._file, self._offsets(name), begin, num_bytes)

    def ragged(self, name: str) -> Ragged:
        """A list column: a `RaggedColumn`, which serves as a `Ragged`."""
        values = self._view(self.batch.column(name).values)
        return cast(Ragged, RaggedColumn(self._file, self._begin(values), values, self._offsets(name)))

    def _offsets(self, name: str) -> Column:
        column = self.batch.column(name)
        return self._column(_numbers(self.path, column.buffers()[1], np.dtype(np.int32), len(column) + 1))

    def _column(self, values: NDArray[Any]) -> Column:
        return Column(self._file, self._begin(values), values)

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
        """Return `count` bytes from `begin`; raises StoreError if the file was cut."""
        data = os.pread(self.descriptor, count, begin)
        if len(data) != count:
            raise StoreError(f"{self.path}: bytes ({len(data)}) at {begin} must be {count}; it was cut, copy it again")
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
