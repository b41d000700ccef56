"""Opening the tables of a store: sizes and digests of its files, compared before they are read or in threads beside."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.store.format import INDEX_NAME, LABEL_PREFIX, StoreError, StoreInfo, sample_file
from pipeline.store.mapped import MappedTable
from pipeline.store.schemas import index_schema, sample_schema

_CHECK_AT_ONCE_BYTES = 64 << 20


class Tables:
    """The index and the sample tables of a store, mapped.

    Args:
        path: the store. info: its store.json. check_digests: compare the digest of each table that is opened, before it
            is returned, or in a thread where it is larger than 64 MiB.
    Raises:
        StoreError: a file is missing or of a wrong size.
    """

    def __init__(self, path: Path, info: StoreInfo, *, check_digests: bool) -> None:
        self._path, self._info, self._check_digests = path, info, check_digests
        self._checks: list[threading.Thread] = []
        self._damage: list[str] = []
        for name, digest in info.files.items():
            try:
                size = os.stat(path / name).st_size
            except FileNotFoundError as error:
                raise StoreError(f"{path / name}: file (missing) must exist; copy the whole store again") from error
            if size != digest.bytes:
                raise StoreError(f"{path / name}: size ({size} bytes) must be {digest.bytes}; copy the file again")

    def index(self) -> MappedTable:
        """Open the index; raises StoreError for a wrong digest or schema."""
        return self._open(INDEX_NAME, lambda names: index_schema())

    def samples(self, split: str) -> MappedTable:
        """Open the table of a split; raises StoreError as `index`, and for a split that is not there."""
        if split not in self._info.splits:
            known = list(self._info.splits)
            raise StoreError(f"{self._path}: split ({split}) must be one of {known}; choose one of these")

        def schema(names: Sequence[str]) -> pa.Schema:
            """Schema of a sample table with the label sets that are there."""
            return sample_schema(n.removeprefix(LABEL_PREFIX) for n in names if n.startswith(LABEL_PREFIX))

        return self._open(sample_file(split), schema)

    def wait_for_checks(self) -> None:
        """Wait until large tables are checked as well; raises StoreError if one is damaged."""
        for check in self._checks:
            check.join()
        self.raise_damage()

    def raise_damage(self) -> None:
        """Raise StoreError if a table that is checked in a thread was found damaged so far."""
        if self._damage:
            raise StoreError("; ".join(self._damage))

    def _open(self, name: str, schema_of: Callable[[Sequence[str]], pa.Schema]) -> MappedTable:
        if self._check_digests and self._info.files[name].bytes <= _CHECK_AT_ONCE_BYTES:
            self._check_digest(name)
        elif self._check_digests:
            check = threading.Thread(target=self._check_later, args=(name,), daemon=True)
            self._checks.append(check)
            check.start()
        return MappedTable(self._path / name, schema_of)

    def _check_digest(self, name: str) -> None:
        with (self._path / name).open("rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = self._info.files[name].sha256
        if found != wanted:
            raise StoreError(f"{self._path / name}: sha256 ({found}) must be {wanted}; copy the file again")

    def _check_later(self, name: str) -> None:
        try:
            self._check_digest(name)
        except (StoreError, OSError) as error:
            self._damage.append(str(error))
