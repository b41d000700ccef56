"""Gradients averaged between two captured halves of a step, against DDP; two ranks with DropPathway."""

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from experiments.engine.accumulation import weights_by_count
from experiments.engine.gradients import GradientAverage
from experiments.engine.graphs import CapturedStep
from experiments.engine.optim import build_optimizer, learning_rate, set_learning_rate
from experiments.engine.precision import autocast
from experiments.engine.replicas import SharedStatistics, data_parallel, pair_count
from experiments.engine.step import TrainingStep, task_loss
from experiments.runtime import Runtime, seed_step
from experiments.tasks import make_task
from tests.experiments.engine.test_graphs import OPTIM, Training, clips
from tests.experiments.support.forked import call_on_ranks
from tests.experiments.support.recording import RecordingCapturer

STEPS = 9  # three of each kind warm up
WAYS = ("ddp", "eager", "captured")


def rank_of_two(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    runtime = Runtime(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    results = {way: train(way, runtime) for way in WAYS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train(way: str, runtime: Runtime) -> dict[str, object]:
    """Train on halves of batches of eight clips; returns losses and weights."""
    model = Training("cpu", "fp32", None).model
    if runtime.rank == 1:
        nn.init.normal_(model.head.classifier.visual.weight)  # type: ignore[union-attr, arg-type]
    optimizer = build_optimizer(model, OPTIM, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    average = None if way == "ddp" else GradientAverage(model.parameters(), 2)
    module: nn.Module = model
    if average is None:
        module = data_parallel(model, runtime, find_unused_parameters=True)
    else:
        average.share(model)
    task = make_task("classification", ("a", "b", "c", "d"))
    context = lambda: autocast(torch.device("cpu"), "fp32")  # noqa: E731
    step = TrainingStep(module, optimizer, scaler, task_loss(task), context, max_grad_norm=1.0, average=average)
    captures = RecordingCapturer()
    take = CapturedStep(step, captures, required=True) if way == "captured" else step
    statistics = SharedStatistics(model, runtime)
    losses = []
    for number in range(STEPS):
        seed_step(3, number, runtime.rank)
        set_learning_rate(optimizer, learning_rate(OPTIM, number, STEPS))
        inputs = clips(model.config, "cpu", 2 * number + runtime.rank, 4)
        assert inputs.log_mel is not None
        assert inputs.negative_log_mel is not None
        inputs.negative_log_mel[: runtime.rank + 1] = 0.0  # silence is no pair: the ranks have different numbers
        weight = weights_by_count([pair_count(inputs.log_mel, inputs.negative_log_mel)], 2)[0]
        inputs = dataclasses.replace(inputs, pair_weight=weight)
        loss = take(inputs, drop_audio=number % 2 == 0)
        statistics.synchronize()
        losses.append(loss.total.item())
    return {"losses": losses, "model": model.state_dict(), "captures": captures.captures, "replays": captures.replays}


@pytest.mark.integration
def test_average_between_captured_halves_is_ddps(tmp_path: Path) -> None:
    call_on_ranks(rank_of_two, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["captured"]["captures"] == 4  # two halves of two kinds
        assert rank["captured"]["replays"] == 2 * (STEPS - 6)
        assert rank["captured"]["losses"] == rank["eager"]["losses"]
        assert rank["captured"]["losses"] == pytest.approx(rank["ddp"]["losses"], abs=1e-6)
        for name, tensor in rank["ddp"]["model"].items():
            torch.testing.assert_close(rank["captured"]["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(rank["captured"]["model"][name], rank["eager"]["model"][name]), name
    for name, tensor in ranks[0]["captured"]["model"].items():
        assert torch.equal(ranks[1]["captured"]["model"][name], tensor), name
    assert ranks[0]["ddp"]["losses"] != ranks[1]["ddp"]["losses"]
