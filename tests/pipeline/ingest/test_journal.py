"""The journal keeps what it was told: over kills, damage, a full disk, and from the lines that it was kept before."""

import json
import signal
import sqlite3
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.ingest.item import IngestError, Item
from pipeline.ingest.journal import Journal, has_journal

ADDING = """
import os, sys
from pathlib import Path
from pipeline.ingest.item import Item
from pipeline.ingest.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(10_000):
    journal.add(f"key{number}", Item(refused=f"reason {number}"))
    os.write(1, b"%d\\n" % number)
"""


def stored(journal: Journal, key: str, data: bytes) -> Item:
    """An item with its payload."""
    journal.payload(key).write_bytes(data)
    return Item(num_frames=3, repairs=("é", "b"), origin_s=0.1, bytes=len(data))


def test_items_are_there_again_in_their_order(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        items = {key: stored(journal, key, key.encode()) for key in ("bb", "aa", "cc")}
        for key, item in items.items():
            journal.add(key, item)
    with Journal(tmp_path) as journal:
        assert list(journal.items.items()) == list(items.items())
        journal.forget(["bb", "none"])
        assert list(journal.items) == ["aa", "cc"]
        journal.add("aa", Item(refused="x"))
    with Journal(tmp_path) as journal:
        assert list(journal.items) == ["bb", "cc", "aa"], "what was forgotten and not done again is still there"
        assert journal.items["aa"] == Item(refused="x")


def test_an_item_without_its_payload_is_done_again(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for key in ("aa", "bb", "cc"):
            journal.add(key, stored(journal, key, b"12345"))
        journal.payload("aa").unlink()
        journal.payload("cc").write_bytes(b"1234")
    with Journal(tmp_path) as journal:
        assert list(journal.items) == ["bb"]


@pytest.mark.parametrize("count", [1, 7, 400])
def test_what_was_added_survives_a_kill(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-c", ADDING, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(count):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in process.stdout if line.endswith(b"\n"))])
    with Journal(tmp_path) as journal:
        assert last + 1 <= len(journal.items) <= last + 2  # one may be added that nobody was told of
        assert [item.refused for item in journal.items.values()][: last + 1] == [f"reason {n}" for n in range(last + 1)]


def test_every_row_is_flushed(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        database = journal._database
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: the log is flushed at each commit


def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add("first", Item(refused="x"))
        journal._database.execute("PRAGMA max_page_count = 3")
        with pytest.raises(IngestError, match=r"journal must be writable \(database or disk is full\); make room"):
            journal.add("second", Item(refused="y" * 100_000))
        assert list(journal.items) == ["first"]
    with Journal(tmp_path) as journal:
        assert list(journal.items) == ["first"]


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add("first", Item(refused="x"))
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"nonsense" * 600)
    with pytest.raises(IngestError, match=r"journal\.sqlite: journal must be as it was written .*; delete it and run"):
        Journal(tmp_path)
    path.unlink()
    with Journal(tmp_path) as journal:
        assert journal.items == {}


def test_a_changed_row_is_done_again(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for key in ("a", "b"):
            journal.add(key, Item(refused=f"reason {key}"))
    path = tmp_path / "journal.sqlite"
    content = path.read_bytes()
    assert content.count(b"reason b") == 1
    path.write_bytes(content.replace(b"reason b", b"reason c"))
    with Journal(tmp_path) as journal:
        assert list(journal.items) == ["a"]


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(IngestError, match=r"version \(7\) must be 1; use the release that wrote it, or delete"):
        Journal(tmp_path)


def line_of(key: str, item: Item) -> bytes:
    """A line of the journal as it was kept before."""
    body = json.dumps([key, asdict(item)], separators=(",", ":")).encode()
    return b"%08x " % zlib.crc32(body) + body + b"\n"


@pytest.mark.parametrize("torn", [b"", b"0123", line_of("new", Item(refused="late"))[:-1], b"00000000 []\n"])
def test_a_journal_of_lines_is_taken_over(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "items" / "aa").mkdir(parents=True)
    (tmp_path / "items" / "aa" / "aa1").write_bytes(b"12345")
    whole = Item(num_frames=3, repairs=("é", "b"), bytes=5)
    lines = [("aa1", whole), ("bb", Item(refused="first")), ("cc", Item(bytes=9)), ("bb", Item(refused="second"))]
    (tmp_path / "journal.jsonl").write_bytes(b"".join(line_of(*line) for line in lines) + torn)
    assert has_journal(tmp_path)
    for _ in range(2):
        with Journal(tmp_path) as journal:
            assert journal.items == {"aa1": whole, "bb": Item(refused="second")}
        assert not (tmp_path / "journal.jsonl").exists()


def test_taking_over_again_keeps_what_came_later(tmp_path: Path) -> None:
    """Killed after the lines are in the database and before their file is deleted."""
    (tmp_path / "journal.jsonl").write_bytes(line_of("a", Item(refused="first")))
    with Journal(tmp_path) as journal:
        journal.add("a", Item(refused="later"))
    (tmp_path / "journal.jsonl").write_bytes(line_of("a", Item(refused="first")))
    with Journal(tmp_path) as journal:
        assert journal.items == {"a": Item(refused="later")}
