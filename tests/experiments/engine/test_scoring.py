"""What a report says of samples that could not be read, and when they are too many."""

import functools
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.engine.scoring import account_for, quarantine_notes
from experiments.runtime import Runtime
from pipeline.loader import EvalLoader, QuarantineError
from tests.experiments.support.forked import call_on_ranks


def test_ten_quarantined_samples_are_named_and_the_others_counted() -> None:
    found = [(f"clip {i}", "damaged") for i in range(13)]
    assert quarantine_notes([]) == ()
    assert quarantine_notes(found[:10]) == tuple(f"quarantined clip {i}: damaged" for i in range(10))
    assert quarantine_notes(found)[-2:] == ("quarantined clip 9: damaged", "and 3 more quarantined")


def half_of_a_split(names: list[str], share: float) -> Any:
    """The loader of a rank that has seen 50 of 100 samples, of which some cannot be read."""
    loader = SimpleNamespace(
        plan=SimpleNamespace(num_positions=100),
        stats=SimpleNamespace(yielded=50 - len(names), quarantined=len(names)),
        quarantine=[(name, "damaged") for name in names],
        dataset=SimpleNamespace(samples=range(100)),
        config=SimpleNamespace(max_quarantined_share=share),
    )
    loader.require_few = functools.partial(EvalLoader.require_few, loader)
    return loader


def two_ranks(rank: int, folder: str) -> None:
    """Three samples of each rank cannot be read: more than 5 % of all, less than 5 % as each rank sees it."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    runtime = Runtime(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    names = [f"{rank}-{i}" for i in range(3)]
    count = len(account_for(half_of_a_split(names, 0.06), runtime))
    try:
        account_for(half_of_a_split(names, 0.05), runtime)
    except QuarantineError as error:
        Path(folder, f"{rank}.txt").write_text(f"{count}; {error}")
    dist.destroy_process_group()


@pytest.mark.integration
def test_too_many_quarantined_over_all_ranks_end_an_evaluation_on_each(tmp_path: Path) -> None:
    call_on_ranks(two_ranks, str(tmp_path))
    for rank in range(2):
        found = (tmp_path / f"{rank}.txt").read_text()
        assert found.startswith("6; 6 of 100 samples cannot be read, more than data.max_quarantined_share (0.05); ")
