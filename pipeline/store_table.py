"""Mapped Arrow files and shared descriptors: the parts of a store that are opened once and read by many."""

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset import Ragged
from pipeline.store_format import StoreError


class StringColumn(Sequence[str]):
    """A memory-mapped column of strings; makes one only when asked."""

    def __init__(self, column: pa.StringArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, i: Any) -> Any:
        return self._column[int(i)].as_py()


class MappedTable:
    """One Arrow file, mapped; columns as numpy views."""

    def __init__(self, path: Path, schema_of: Callable[[Sequence[str]], pa.Schema]) -> None:
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            reader = pa.ipc.open_file(pa.py_buffer(self.map))
            if reader.num_record_batches != 1:
                raise StoreError(
                    f"{path}: record batches ({reader.num_record_batches}) must be 1; make the store again"
                )
            self.batch = reader.get_batch(0)
            self.batch.validate()
        except pa.ArrowException as error:
            raise StoreError(f"{path}: {error}; it must be an Arrow IPC file; restore it or make it again") from error
        expected = schema_of(self.batch.schema.names)
        if not self.batch.schema.equals(expected):
            found = {item.name: str(item.type) for item in self.batch.schema}
            wanted = {item.name: str(item.type) for item in expected}
            differ = sorted(k for k in found | wanted if found.get(k) != wanted.get(k)) or "order or nullability"
            raise StoreError(f"{path}: columns ({differ}) must be those of the format's version; make the store again")
        self._address = pa.py_buffer(self.map).address
        self._ranges: list[tuple[int, int]] = []

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers as a view."""
        return self.batch.column(name).to_numpy(zero_copy_only=True)

    def strings(self, name: str) -> StringColumn:
        """A column of strings."""
        return StringColumn(self.batch.column(name))

    def ragged(self, name: str, *, releasable: bool = False) -> Ragged:
        """A list column as views of its values and offsets."""
        column = self.batch.column(name)
        values = column.values.to_numpy(zero_copy_only=True)
        if releasable and values.nbytes >= 2 * mmap.PAGESIZE:
            begin = values.__array_interface__["data"][0] - self._address
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (begin + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._ranges.append((first, last - first))
        return Ragged(values, column.offsets.to_numpy(zero_copy_only=True))

    def release(self) -> None:
        """Drop resident pages of the releasable columns; they stay in the page cache and come back when touched."""
        for begin, size in self._ranges:
            self.map.madvise(mmap.MADV_DONTNEED, begin, size)


class SharedFile:
    """An open file that closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
