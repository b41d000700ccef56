"""Files of an opened store: descriptors that are given up while threads read, and reads that fail."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.format import shard_file
from pipeline.store.mapped import SharedFile
from pipeline.store.shards import Shards


def test_a_shard_that_gives_way_to_another_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread opens one shard too many between two reads of this one, which is then the oldest."""
    contents = [bytes(range(256)), bytes(reversed(range(256)))]
    for number, content in enumerate(contents):
        path = tmp_path / shard_file(number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    shards, read = Shards(tmp_path, ["clip"]), os.preadv
    monkeypatch.setattr("pipeline.store.shards._MAX_OPEN_SHARDS", 1)
    other = bytearray(256)

    def interrupted(descriptor: int, buffers: list[memoryview], offset: int) -> Any:
        """A read that gives 10 bytes, and during which the other shard is read."""
        monkeypatch.setattr(os, "preadv", read)
        shards.read(0, "video", 1, 0, memoryview(other))
        return read(descriptor, [buffers[0][:10]], offset)

    monkeypatch.setattr(os, "preadv", interrupted)
    found = bytearray(200)
    shards.read(0, "video", 0, 16, memoryview(found))
    assert found == contents[0][16:216]
    assert other == contents[1]


def test_a_column_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says what is wrong, and of no file."""

    def fail(descriptor: int, count: int, offset: int) -> bytes:
        raise OSError(errno.EACCES, "Permission denied")

    path = tmp_path / "index.arrow"
    path.write_bytes(bytes(64))
    file = SharedFile(path)
    assert file.read(8, 4) == bytes(4)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Permission denied") as caught:
        file.read(8, 4)
    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.EACCES
