"""Running statistics of two ranks against one process with all clips; agreement and signals of the ranks."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.cli.command_line import run_command
from experiments.config import Config, load_config
from experiments.engine.data import DataSetupError, clips_per_rank, small_group_warning
from experiments.engine.replicas import SharedStatistics
from experiments.runtime import (
    Runtime,
    RuntimeSetupError,
    StopSignal,
    broadcast_bytes,
    require_agreement,
    seed_step,
)
from experiments.train import main
from kernels.modules import GhostBatchNorm, joint_statistics_update
from tests.experiments.support.forked import call_on_ranks

STEPS = 3
ROOT = Path(__file__).parents[3]


def make_norm() -> GhostBatchNorm:
    return GhostBatchNorm(4, clips_per_group=2)


def clips(step: int) -> torch.Tensor:
    """(4, 4, 2, 6, 6), clips that differ in mean and spread."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 4, 2, 6, 6, generator=generator)
    x = (
        x * torch.tensor([1.0, 2, 3, 4])[:, None, None, None, None]
        + torch.tensor([0.0, 1, 5, -3])[:, None, None, None, None]
    )
    return x.contiguous(memory_format=torch.channels_last_3d)


def two_ranks(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    runtime = Runtime(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    norm = make_norm()
    shared = SharedStatistics(norm, runtime)
    for step in range(STEPS):
        norm(clips(step)[2 * rank : 2 * rank + 2])
        shared.synchronize()
    stop = StopSignal(runtime)
    answers = []
    for step in range(4):
        if rank == 1 and step == 1:
            stop.received = int(signal.SIGTERM)  # as the handler does
        answers.append(stop.agreed())
    stop.finish()
    problems = []
    try:
        require_agreement(runtime, {"data": "same", "code": f"version {rank}"})
    except RuntimeSetupError as error:
        problems.append(str(error))
    sent = broadcast_bytes(runtime, b"from rank 0" if rank == 0 else None)
    state = {"mean": norm.running_mean, "var": norm.running_var, "answers": answers, "problems": problems, "sent": sent}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_twice(norm: GhostBatchNorm, step: int, own: slice) -> None:
    """A step of the synchronization task: audio in step and, with other statistics, out of step."""
    with joint_statistics_update():
        norm(clips(step)[own])
        norm((2 * clips(step + 100)[own] + torch.arange(4.0)[own, None, None, None, None]).contiguous(
            memory_format=torch.channels_last_3d))  # fmt: skip


def two_ranks_twice(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    norm = make_norm()
    shared = SharedStatistics(norm, Runtime(rank, 2, rank, torch.device("cpu")))
    for step in range(STEPS):
        run_twice(norm, step, slice(2 * rank, 2 * rank + 2))
        shared.synchronize()
    torch.save({"mean": norm.running_mean, "var": norm.running_var}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.integration
def test_a_norm_that_runs_twice_a_step_has_the_statistics_of_one_process(tmp_path: Path) -> None:
    call_on_ranks(two_ranks_twice, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    norm = make_norm()
    for step in range(STEPS):
        run_twice(norm, step, slice(0, 4))
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["var"], second["var"])
    torch.testing.assert_close(first["mean"], norm.running_mean, atol=1e-5, rtol=1e-5)
    values = 2 * 2 * 2 * 6 * 6  # per channel and rank, both runs; only the unbiased variance differs, by 1 / values
    torch.testing.assert_close(first["var"], norm.running_var, atol=1e-5, rtol=1.0 / values)


@pytest.mark.integration
def test_two_ranks_agree_with_one_process_and_each_other(tmp_path: Path) -> None:
    call_on_ranks(two_ranks, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    norm = make_norm()
    for step in range(STEPS):
        norm(clips(step))
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["var"], second["var"])
    torch.testing.assert_close(first["mean"], norm.running_mean, atol=1e-5, rtol=1e-5)
    values = 2 * 2 * 6 * 6  # per channel and rank: the unbiased variance differs by 1 / values
    torch.testing.assert_close(first["var"], norm.running_var, atol=1e-5, rtol=1.0 / values)
    assert first["answers"] == second["answers"] == [False, False, True, True]  # one step later, on both
    for state in (first, second):
        assert len(state["problems"]) == 1
        assert (
            "code must be equal on all ranks but is not (rank 0: version 0, rank 1: version 1)" in state["problems"][0]
        )
        assert state["sent"] == b"from rank 0"


def test_alone_a_signal_counts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopSignal(Runtime(0, 1, 0, torch.device("cpu"))).install()
    try:
        assert stop.agreed() is False
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() is True
        assert stop.received == signal.SIGUSR1
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) is before


def draw(*key: int) -> list[float]:
    seed_step(*key)
    return torch.rand(4).tolist()


def test_step_seed_is_a_function_of_seed_step_and_rank() -> None:
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3))}) == 4


def test_batch_that_does_not_divide(write_config: Callable[..., Path]) -> None:
    def share(clips: int, world_size: int) -> int:
        config: Config = load_config(write_config(), [f"train.clips_per_step={clips}"])
        return clips_per_rank(config, world_size)

    assert share(16, 2) == 8
    assert share(32, 2) == 16
    for (total, world_size), message in {
        (1024, 24): "(1024) must be a multiple of the world size (24); use a world size of 8, 16, 32",
        (24, 2): "clips per rank (24 / 2 = 12) must be at most model.clips_per_bn_group (8) or a multiple of it; "
        "use train.clips_per_step=32",
    }.items():
        with pytest.raises(DataSetupError, match=re.escape(message)):
            share(total, world_size)
    assert share(8, 2) == 4


def test_share_below_one_group_is_said_where_it_matters(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config())
    assert small_group_warning(config, 8) == ""
    assert small_group_warning(config, 3).startswith(
        "BN statistics are over 3 clips, not model.clips_per_bn_group (8): there are no more together; "
    )
    frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze="bn_statistics"))
    assert small_group_warning(frozen, 3) == ""


@pytest.mark.integration
def test_share_below_one_group_is_logged_once(write_config: Callable[..., Path], tmp_path: Path) -> None:
    command = [str(write_config()), "train.clips_per_step=3", "train.steps=2", "optim.warmup_steps=0"]
    assert run_command(main, [*command, "eval.precise_bn_batches=1"]) == 0
    text = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert text.count("WARNING BN statistics are over 3 clips") == 1
    assert "step 1/2  loss" in text
    assert " 0.0 clips/s" not in text


@pytest.mark.slow
def test_second_ctrl_c_ends_at_once() -> None:
    code = (
        "import time, torch; from experiments.runtime import Runtime, StopSignal; "
        "StopSignal(Runtime(0, 1, 0, torch.device('cpu'))).install(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for pause_s in (0.2, 1.5):  # the second one comes at once: torchrun's repetition of the first
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
