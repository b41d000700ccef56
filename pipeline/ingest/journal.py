"""What a run of ingest has finished: a checksummed line a file, flushed, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.ingest.item import Item

JOURNAL_NAME, ITEM_FOLDER = "journal.jsonl", "items"


class Journal:
    """The work folder of one run: payload files and the journal of finished items.

    Args:
        folder: made if it is not there; `STORE.work` beside the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ITEM_FOLDER).mkdir(parents=True, exist_ok=True)
        self.items: dict[str, Item] = {}
        self.dropped_lines = 0
        keep = self._load()
        self._file = (folder / JOURNAL_NAME).open("r+b" if keep else "wb")
        self._file.truncate(keep)
        self._file.seek(keep)

    def _load(self) -> int:
        """Read the lines; returns the length of the valid beginning (a kill can cut the last line)."""
        path, valid = self.folder / JOURNAL_NAME, 0
        if not path.exists():
            return 0
        for line in path.read_bytes().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                self.dropped_lines += 1
                break
            key, item = entry
            if item.refused or self._is_whole(key, item):
                self.items[key] = item
            valid += len(line)
        return valid

    def _is_whole(self, key: str, item: Item) -> bool:
        path = self.payload(key)
        return path.is_file() and path.stat().st_size == item.bytes

    def payload(self, key: str) -> Path:
        """Where the payload of an item is, or goes."""
        folder = self.folder / ITEM_FOLDER / key[:2]
        folder.mkdir(exist_ok=True)
        return folder / key

    def add(self, key: str, item: Item) -> None:
        """Note a finished item, flushed to the disk."""
        body = json.dumps([key, asdict(item)], separators=(",", ":")).encode()
        self._file.write(b"%08x " % zlib.crc32(body) + body + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.items[key] = item

    def forget(self, keys: list[str]) -> None:
        """Take items off the list (they are done again); the lines stay, later ones win."""
        for key in keys:
            self.items.pop(key, None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def remove(self) -> None:
        """Delete the folder and all payloads."""
        self.close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes) -> tuple[str, Item] | None:
    if not line.endswith(b"\n") or len(line) < 10:
        return None
    body = line[9:-1]
    try:
        if int(line[:8], 16) != zlib.crc32(body):
            return None
        key, values = json.loads(body)
    except ValueError:
        return None
    return str(key), Item.from_dict(values)
