"""What a run of ingest has finished: a row an item in an SQLite database, so that a killed run goes on where it was.

Each row is flushed to the disk before `add` returns (write-ahead log, one flush a row). The connection holds the
database alone, which needs no shared memory: it works on network file systems too.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.ingest.item import IngestError, Item
from pipeline.store.durable import sync

JOURNAL_NAME, ITEM_FOLDER = "journal.sqlite", "items"
LINES_NAME = "journal.jsonl"  # how the journal was kept before: a checksummed line an item
_SCHEMA_VERSION = 1
_SET_UP = f"""
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, item TEXT NOT NULL, crc32 INTEGER NOT NULL);
PRAGMA user_version = {_SCHEMA_VERSION};
"""


def has_journal(folder: Path) -> bool:
    """Whether a work folder holds what an interrupted run has finished."""
    return any((folder / name).exists() for name in (JOURNAL_NAME, LINES_NAME))


class Journal:
    """The work folder of one run: payload files and the journal of finished items.

    Args:
        folder: made if it is not there; `STORE.work` beside the store. A journal of lines in it is taken over.
    Raises:
        IngestError: the journal is damaged, of a later version, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL_NAME
        (folder / ITEM_FOLDER).mkdir(parents=True, exist_ok=True)
        self._database = self._open()
        try:
            self._take_over(folder / LINES_NAME)
            self.items = {key: item for key, item in self._rows() if item.refused or self._is_whole(key, item)}
        except BaseException:
            self.close()
            raise

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA_VERSION):
                raise IngestError(
                    f"{self.path}: version ({version}) must be {_SCHEMA_VERSION}; use the release that wrote it, "
                    f"or delete {self.folder} to begin anew"
                )
            database.executescript(_SET_UP)
        except sqlite3.Error as error:
            database.close()
            raise self._error(error) from error
        except BaseException:
            database.close()
            raise
        return database

    def _error(self, error: sqlite3.Error) -> IngestError:
        if isinstance(error, sqlite3.OperationalError):
            return IngestError(
                f"{self.path}: journal must be writable ({error}); make room and give write permission there, then run "
                "the same command again: finished files are kept"
            )
        return IngestError(
            f"{self.path}: journal must be as it was written ({error}); delete it and run the same command again, "
            "which does its files again"
        )

    def _take_over(self, lines: Path) -> None:
        """Put the items of a journal of lines into the database, all or none, and delete it."""
        if not lines.exists():
            return
        try:
            with self._database:
                self._database.execute("BEGIN")
                rows = [_row(key, item) for key, item in _items_of_lines(lines.read_bytes())]
                self._database.executemany("INSERT OR IGNORE INTO items VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error
        lines.unlink()
        sync(self.folder)

    def _rows(self) -> Iterator[tuple[str, Item]]:
        """Items in the order in which they were finished; one whose checksum is wrong is left out: it is done again."""
        try:
            for key, text, crc32 in self._database.execute("SELECT key, item, crc32 FROM items ORDER BY rowid"):
                if zlib.crc32(f"{key} {text}".encode()) == crc32:
                    yield key, Item.from_dict(json.loads(text))
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _is_whole(self, key: str, item: Item) -> bool:
        path = self.payload(key)
        return path.is_file() and path.stat().st_size == item.bytes

    def payload(self, key: str) -> Path:
        """Where the payload of an item is, or goes."""
        folder = self.folder / ITEM_FOLDER / key[:2]
        folder.mkdir(exist_ok=True)
        return folder / key

    def add(self, key: str, item: Item) -> None:
        """Note a finished item, flushed to the disk.

        Raises:
            IngestError: it cannot be written.
        """
        try:
            self._database.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", _row(key, item))
        except sqlite3.Error as error:
            raise self._error(error) from error
        self.items[key] = item

    def forget(self, keys: list[str]) -> None:
        """Take items off the list (they are done again); their rows stay until later ones replace them."""
        for key in keys:
            self.items.pop(key, None)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _row(key: str, item: Item) -> tuple[str, str, int]:
    text = json.dumps(asdict(item), separators=(",", ":"))
    return key, text, zlib.crc32(f"{key} {text}".encode())


def _items_of_lines(data: bytes) -> Iterator[tuple[str, Item]]:
    """Items of a journal of lines, later ones over earlier ones, up to the first line that is not whole (a kill)."""
    items: dict[str, Item] = {}
    for line in data.splitlines(keepends=True):
        body = line[9:-1]
        try:
            if not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(body):
                break
            key, values = json.loads(body)
            items[str(key)] = Item.from_dict(values)
        except ValueError:
            break
    yield from items.items()
