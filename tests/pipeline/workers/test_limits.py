"""What a machine may not have: descriptors, a large /dev/shm, as many slots as workers."""

import errno
import gc
import logging
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import feed
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.source import FreshMemory, HostClip, Wanted, read_clip
from pipeline.store.reader import Store, StoreSplit
from pipeline.workers import pool, ring
from pipeline.workers.confined import Confinement, call_confined
from pipeline.workers.slots import SlotSpec
from tests.pipeline.support.recorded import picture
from tests.pipeline.support.stores import noise, write_store
from tests.pipeline.workers.test_workers import CONFIG, SPEC, children, open_descriptors, train

pytestmark = pytest.mark.integration  # starts processes

SLOT = SlotSpec(picture_bytes=4096, num_audio_samples=50, with_negative=False)


@pytest.fixture(scope="module")
def h264(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Four media."""
    media = [(f"m{i}", [picture(i, f) for f in range(40)], noise(1.5, seed=i)) for i in range(4)]
    return write_store(tmp_path_factory.mktemp("store") / "s", media, codec="h264")


@contextmanager
def limit_of_files(more: int) -> Iterator[int]:
    """Allow this process so many descriptors beyond those that it has; gives the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name.split()[0]) for name in open_descriptors()}
    free = (number for number in range(soft) if number not in taken)
    limit = next(islice(free, more, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("more", [0, 1, 3, 10])
def test_too_few_descriptors_are_told_with_the_remedy(h264: StoreSplit, more: int) -> None:
    gc.collect()
    before, running = open_descriptors(), children()
    loader = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=3), LoaderOptions(4))
    words = (
        r"limit of open files \({}\) must be at least \d+: \d+ are open, decoding in 3 worker processes "
        r"\(data.num_workers\) needs \d+ more; raise it before the start, as with: ulimit -n \d{{4,}}"
    )
    with limit_of_files(more) as limit, pytest.raises(OSError, match=words.format(limit)):
        next(loader.batches())
    assert (open_descriptors(), children()) == (before, running)


def test_descriptors_that_run_out_while_workers_start_are_told(
    h264: StoreSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, running, workers = open_descriptors(), children(), list[object]()

    class Third(pool._Worker):
        def __init__(self, number: int, descriptors: tuple[int, ...]) -> None:
            workers.append(self)
            if len(workers) == 3:
                raise OSError(errno.EMFILE, "Too many open files")
            super().__init__(number, descriptors)

    monkeypatch.setattr(pool, "_Worker", Third)
    loader = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=3), LoaderOptions(4))
    with pytest.raises(OSError, match=r"limit of open files .* ulimit -n"):
        next(loader.batches())
    assert len(workers) == 3
    assert (open_descriptors(), children()) == (before, running)


def test_files_cannot_be_looked_at_without_descriptors(tmp_path: Path) -> None:
    before = open_descriptors()
    words = r"limit of open files .*, looking at files in a child process needs 8 more; .* ulimit -n"
    with limit_of_files(4), pytest.raises(OSError, match=words):
        list(call_confined(Path.read_text, [tmp_path / "a"], Confinement(), 1))
    assert open_descriptors() == before


def test_a_read_without_descriptors_quarantines_nothing(h264: StoreSplit) -> None:
    split = Store.open(h264.store.path).split("train")  # no shard is open yet
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(1))
    wanted = Wanted(SPEC.num_audio_samples, "cpu")
    with limit_of_files(0), pytest.raises(OSError, match=r"reading a clip needs \d+ more; .* ulimit -n"):
        read_clip(split, loader.plan.at(0, 0), wanted, FreshMemory())
    assert isinstance(read_clip(split, loader.plan.at(0, 0), wanted, FreshMemory()), HostClip)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_a_ring_that_cannot_be_mapped_leaves_no_descriptor(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> mmap.mmap:
        raise OSError(number, os.strerror(number))

    before = open_descriptors()
    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(ring.RingMemoryError if number == errno.ENOMEM else OSError, match=os.strerror(number)):
        ring.Ring(SLOT, 3)
    assert open_descriptors() == before


def test_no_more_workers_than_slots(
    h264: StoreSplit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed._at_most_slots.cache_clear()
    started: list[int] = []

    def start(*arguments: Any) -> None:
        started.append(arguments[-1].num_workers)
        raise KeyError("enough")

    monkeypatch.setattr(feed, "WorkerSource", start)
    monkeypatch.setattr(feed, "usable_cpus", lambda: 64)
    with caplog.at_level(logging.INFO, "pipeline.feed"):
        for workers in (12, 64, 64):
            loader = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=workers, prefetch_batches=2), LoaderOptions(3))
            with pytest.raises(KeyError, match="enough"):
                next(loader.batches())
    assert started == [12, 12, 12]
    assert [record.getMessage() for record in caplog.records if record.name == "pipeline.feed"] == [
        "12 worker processes, not 64: there are slots for 12 clips (clips of a batch x (data.prefetch_batches + 2))"
    ]


def test_more_workers_than_cpus_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    feed._note_more_than_cpus.cache_clear()
    with caplog.at_level(logging.INFO, "pipeline.feed"):
        for workers in (2, 8, 8, 1):
            feed._note_more_than_cpus(workers, 2)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("8 worker processes (data.num_workers, all ranks of this host) share 2 CPUs: ")


def test_nothing_lies_in_dev_shm(h264: StoreSplit, tmp_path: Path) -> None:
    """Slots are anonymous memory: a /dev/shm of 64 KiB, as small as no container's, changes nothing."""
    batches = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=1), LoaderOptions(4), seed=3).batches()
    next(batches)
    assert "memfd:clips" in Path("/proc/self/maps").read_text()
    for pid in {*children(), os.getpid()}:
        assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()
    batches.close()


def test_batches_are_the_same_with_a_tiny_dev_shm(h264: StoreSplit, tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k,mode=1777 tmpfs /dev/shm"
    if subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount in a namespace; test_nothing_lies_in_dev_shm holds without it")
    result = tmp_path / "result.txt"
    text = f"from tests.pipeline.workers.test_limits import read; read({str(h264.store.path)!r}, {str(result)!r})"
    done = subprocess.run(
        [*inside, f'{mount} && exec "$0" -c "$1"', sys.executable, text], timeout=120, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert result.read_text().split() == ["65536", "0", train(h264, 0, steps=1)[0][0]]


def read(store: str, result: str) -> None:
    """Write size and used bytes of /dev/shm and the digest of a batch of 2 MiB slots; run in a process of its own."""
    digest = train(Store.open(store).split("train"), 1, steps=1)[0][0]
    free = os.statvfs("/dev/shm")
    used = (free.f_blocks - free.f_bfree) * free.f_frsize
    Path(result).write_text(f"{free.f_blocks * free.f_frsize} {used} {digest}")


def test_a_map_larger_than_dev_shm_can_be_written() -> None:
    large = ring.Ring(SlotSpec(picture_bytes=1 << 20, num_audio_samples=1, with_negative=False), 96)
    assert large.memory.nbytes > 96 << 20
    large.memory[:: mmap.PAGESIZE] = 7
    assert np.count_nonzero(large.memory[:: mmap.PAGESIZE]) == -(-large.memory.nbytes // mmap.PAGESIZE)
    large.close()


@pytest.mark.parametrize(("workers", "refused"), [(0, "threading.Thread.start"), (2, "subprocess.Popen.__init__")])
def test_threads_and_processes_that_are_not_given_are_told(
    h264: StoreSplit, monkeypatch: pytest.MonkeyPatch, workers: int, refused: str
) -> None:
    gc.collect()
    before = (open_descriptors(), children())

    def refuse(*_: object, **__: object) -> None:
        if workers:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        raise RuntimeError("can't start new thread")

    loader = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=workers), LoaderOptions(4))
    words = r"limit of processes and threads \(.* by ulimit -u; .* pids.max\) must leave room .* lower data.num_workers"
    with monkeypatch.context() as patch:
        patch.setattr(refused, refuse)
        with pytest.raises(OSError, match=words):
            next(loader.batches())
    assert (open_descriptors(), children()) == before


def test_other_errors_keep_their_words(h264: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("of our own")

    monkeypatch.setattr("pipeline.source.ThreadSource.take", fail)
    with pytest.raises(RuntimeError, match="of our own"):
        next(TrainLoader(h264, SPEC, replace(CONFIG, num_workers=0), LoaderOptions(4)).batches())
