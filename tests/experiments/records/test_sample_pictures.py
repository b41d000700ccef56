"""Samples of an evaluation as a picture: which are kept, and what is shown of them."""

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from experiments.records.sample_pictures import SampleCollector, draw_samples
from experiments.records.tracking import page_tags
from experiments.runtime import Runtime
from tests.experiments.support.forked import call_on_ranks


def batch(rows: list[int], *, video: bool = True, multi: bool = False) -> Any:
    """A batch of these samples, whose frames are all white and whose sound rises."""
    count = len(rows)
    frames = torch.full((count, 3, 8, 6, 6), (1 - 0.45) / 0.225, dtype=torch.float16) if video else None
    labels = torch.nn.functional.one_hot(torch.tensor(rows) % 3, 3).float() if multi else torch.tensor(rows) % 3
    return SimpleNamespace(
        sample=torch.tensor(rows),
        ids=[f"clip {row}" for row in rows],
        frames=frames,
        log_mel=torch.arange(20.0).view(1, 1, 5, 4).expand(count, 1, 5, 4),
        has_audio=torch.tensor([row != 0 for row in rows]),
        labels=labels,
    )


def test_samples_are_spread_over_the_split_and_taken_once() -> None:
    collect = SampleCollector(101)
    for first in range(0, 101, 10):
        rows = [row for row in range(first, min(first + 10, 101)) for _ in range(2)]  # two views each
        collect(batch(rows), torch.full((len(rows), 3), 0.25))
    assert [sample.name for sample in collect.found] == [f"clip {row}" for row in (0, 20, 40, 60, 80, 100)]
    first, second = collect.found[:2]
    assert first.log_mel is None  # a clip without sound
    assert second.log_mel is not None
    assert second.log_mel.shape == (4, 5)
    assert second.frames is not None
    np.testing.assert_allclose(second.frames, 1.0, atol=1e-3)
    assert second.frames.shape == (4, 6, 6, 3)
    assert second.labels == (2,)
    few = SampleCollector(2)
    few(batch([0, 1], multi=True), torch.zeros(2, 3))
    assert [sample.labels for sample in few.found] == [(0,), (1,)]


def shares_of_two_ranks(rank: int, folder: str) -> None:
    """What rank 0 has of a split of which each rank scores a half."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    collect, rows = SampleCollector(101), list(range(51)) if rank == 0 else list(range(51, 101))
    collect(batch(rows), torch.full((len(rows), 3), 0.25))
    collect.gather(Runtime(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo")))
    Path(folder, f"{rank}.json").write_text(json.dumps([sample.name for sample in collect.found]))
    dist.destroy_process_group()


@pytest.mark.integration
def test_samples_of_all_ranks_come_to_the_first(tmp_path: Path) -> None:
    call_on_ranks(shares_of_two_ranks, str(tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    assert found == [f"clip {row}" for row in (0, 20, 40, 60, 80, 100)]


def test_picture_is_drawn_also_without_video(tmp_path: Path) -> None:
    for video in (True, False):
        collect = SampleCollector(3)
        collect(batch([0, 1, 2], video=video), torch.tensor([[0.7, 0.2, 0.1]] * 3))
        draw_samples(collect.found, ("run", "walk", "fly"), tmp_path / "plots" / "samples.png")
        assert (tmp_path / "plots" / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_of_a_run_is_filled() -> None:
    tags = page_tags(["device  cpu", "data    x"], "abc+changes", "classification", "cpu")
    assert tags["mlflow.note.content"].startswith("```\ndevice  cpu\ndata    x\n```\n")
    assert (tags["mlflow.source.git.commit"], tags["task"], tags["device"]) == ("abc", "classification", "cpu")
    assert len(page_tags(["x" * 9000], "a", "b", "c")["mlflow.note.content"]) == 4900
