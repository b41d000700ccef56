"""Workers that take no job, and what a loader holds after its end."""

import gc
import logging
import os
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.store.reader import Store, StoreSplit
from pipeline.workers import pool
from pipeline.workers.pool import WorkerError, WorkerSource
from tests.pipeline.support.recorded import digest, picture
from tests.pipeline.support.stores import noise, write_store

pytestmark = pytest.mark.integration

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=48, jitter_min_px=56, jitter_max_px=72, decoder="cpu", num_threads=2, num_workers=2)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Six media."""
    media = [(f"m{i}", [picture(i, f) for f in range(40)], noise(1.5, seed=i)) for i in range(6)]
    return write_store(tmp_path_factory.mktemp("store") / "s", media, codec="h264")


def loader_of(split: StoreSplit, **keys: object) -> TrainLoader:
    """A loader of four clips a batch."""
    return TrainLoader(split, SPEC, replace(CONFIG, **keys), LoaderOptions(4), seed=3)  # type: ignore[arg-type]


def test_idle_workers_that_are_stopped_are_replaced(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [digest(batch) for batch in islice(loader_of(split, num_workers=0).batches(), 8)]
    loader = loader_of(split)
    batches = loader.batches()
    found = [digest(next(batches))]
    source = loader._source
    assert isinstance(source, WorkerSource)
    while source.ready() < 2:  # all is read that there is memory for: both wait for a job
        time.sleep(0.01)
    stopped = set(source.pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(pool, "START_DEADLINE_S", 5.0)
    with caplog.at_level(logging.WARNING):
        found += [digest(batch) for batch in islice(batches, 7)]
    assert len(source.pids) == 2
    assert not stopped & set(source.pids)
    batches.close()
    assert found == wanted
    assert loader.stats.quarantined == 0
    assert "no worker process took a clip for 5 s: all are replaced" in caplog.text


def test_workers_that_never_take_a_job_end_the_run(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_DEADLINE_S", 1.0)
    monkeypatch.setattr(pool, "CHILD_MODULE", "tests.pipeline.support.idle_worker")
    with pytest.raises(
        WorkerError, match=r"must take a clip within 1 s, and fresh ones did not either; is the storage"
    ):
        next(loader_of(split).batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_closed_with_the_loader(split: StoreSplit, workers: int) -> None:
    """At once, not when Python next collects circles: evaluations open their data again and again."""
    gc.collect()
    gc.disable()
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(2):
            loader = loader_of(Store.open(Path(split.store.path)).split("train"), num_workers=workers)
            batches = loader.batches()
            next(batches)
            batches.close()
            del loader, batches
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
