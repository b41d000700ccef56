"""A loader whose process is forked: the fork is told, harms nobody and ends; the parent goes on."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
from nvidia.dali.pipeline import _shutdown_pipelines

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.recorded import digest, picture
from tests.pipeline.support.stores import noise, write_store

pytestmark = pytest.mark.integration

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=48, jitter_min_px=56, jitter_max_px=72, decoder="cpu", num_threads=2)
FORK_LIMIT_S = 60


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Six media."""
    media = [(f"m{i}", [picture(i, f) for f in range(40)], noise(1.5, seed=i)) for i in range(6)]
    return write_store(tmp_path_factory.mktemp("store") / "s", media, codec="h264")


def in_fork(work: Callable[[], str]) -> tuple[int, str]:
    """What a fork of this process returns or raises, and its status; one that hangs is ended by a signal."""
    end, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FORK_LIMIT_S)
        try:
            said = work()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(begin, said.encode())
        os._exit(0)
    os.close(begin)
    with open(end, encoding="utf-8") as file:
        said = file.read()
    return os.waitpid(pid, 0)[1], said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fork_is_told_and_costs_its_parent_nothing(split: StoreSplit, workers: int) -> None:
    loader = TrainLoader(split, SPEC, replace(CONFIG, num_workers=workers), LoaderOptions(4), seed=3)
    wanted = [digest(batch) for batch in islice(loader.batches(), 4)]
    batches = loader.batches()
    found = [digest(next(batches))]
    source = loader._source
    pids = getattr(source, "pids", [])
    assert len(pids) == workers

    status, said = in_fork(lambda: digest(next(batches)))
    assert status == 0
    assert said.startswith(f"RuntimeError: batches that process {os.getpid()} began to take must not be taken in its")
    assert said.endswith("begin anew there: loader.batches(start_step)")

    def close() -> str:
        batches.close()
        _shutdown_pipelines()  # what DALI has the interpreter do at its end
        return "closed"

    assert in_fork(close) == (0, "closed")
    assert in_fork(lambda: digest(next(loader.batches()))) == (0, wanted[0])
    assert getattr(source, "pids", []) == pids
    found += [digest(batch) for batch in islice(batches, 3)]
    batches.close()
    assert found == wanted
