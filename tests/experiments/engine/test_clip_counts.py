"""What is counted over ranks: clips that were replaced, and sounds that were lost."""

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.engine.clip_counts import ClipCounts
from experiments.engine.robustness import Heard
from experiments.runtime import Runtime
from tests.experiments.support.forked import call_on_ranks


def loader(substituted: int, *names: str) -> Any:
    """A loader that has replaced some clips."""
    return SimpleNamespace(
        stats=SimpleNamespace(substituted=substituted), quarantine=[(name, "damaged") for name in names]
    )


def two_ranks(rank: int, folder: str) -> None:
    """Rank 1 has replaced two clips, then three; both have met the sample "both"."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    runtime = Runtime(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    own = loader(1, "both") if rank == 0 else loader(2, "both", "far")
    counts, found = ClipCounts(own, runtime), []
    for _ in range(2):
        counts.gather()
        found.append((counts.substituted, counts.unreadable))
        own.stats.substituted += rank
    own.stats.substituted += 1  # after the last report
    found.append((counts.substituted, counts.unreadable))
    heard = Heard("of another video", lost=3 + rank)
    heard.gather(runtime)
    Path(folder, f"{rank}.json").write_text(json.dumps([found, heard.lost]))
    dist.destroy_process_group()


@pytest.mark.integration
def test_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    call_on_ranks(two_ranks, str(tmp_path))
    found, lost = json.loads((tmp_path / "0.json").read_text())
    names = ["both: damaged", "far: damaged"]
    assert found == [[3, names], [4, names], [5, names]]
    assert lost == 7


def test_one_rank_counts_alone() -> None:
    counts = ClipCounts(loader(2, "b", "a"), Runtime(0, 1, 0, torch.device("cpu")))
    counts.gather()
    assert (counts.substituted, counts.unreadable) == (2, ["a: damaged", "b: damaged"])
