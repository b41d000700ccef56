"""Trainings as processes of their own, and what they leave."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.records.checkpoint import newest_valid
from experiments.records.spool import read_metrics
from tests.experiments.support.forked import Forked

ROOT = Path(__file__).parents[3]
TRAIN = "experiments.train"
FAULTS = "tests.experiments.support.faults"  # the same with faults
PLANTED = "tests.experiments.support.planted"  # the same with something wrong in the numbers
AGENT = "tests.experiments.support.agent"  # torchrun's agent with forked ranks
FORKED = (TRAIN, "experiments.evaluate", FAULTS, PLANTED, AGENT)


def torchrun(ranks: int, restarts: int = 0) -> list[str]:
    """The arguments of Python that start a module on several ranks of this machine."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]


def agent(ranks: int, restarts: int = 0) -> list[str]:
    """The same with torchrun's agent in a forked process, whose ranks are forked (support/agent.py)."""
    return ["-m", AGENT, str(ranks), str(restarts)]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str] | Forked:
    """Start Python with arguments in the checkout, one thread per process; its output is kept.

    A training that is started alone is forked, so that torch and DALI are imported once (support/forked.py).
    """
    if command[0] == "-m" and command[1] in FORKED:
        return fork(command[1], command[2:], **environment)
    return start_python(command, **environment)


def fork(module: str, arguments: Sequence[str], **environment: str) -> Forked:
    """Start a training or an evaluation from a process that has imported what it needs."""
    return Forked(module, arguments, {**os.environ, "OMP_NUM_THREADS": "1", **environment})


def start_python(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start Python as a user does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(command: Sequence[str], timeout_s: float = 240, **environment: str) -> tuple[int, str]:
    """Run Python with arguments to its end; returns exit code and output. One that hangs fails the test."""
    process = start(command, **environment)
    try:
        output = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {timeout_s} s: {process.communicate()[0][-3000:]}")
    return process.returncode, output


def wait_for_step(process: subprocess.Popen[str] | Forked, run_dir: Path, step: int) -> None:
    """Return when the run has recorded `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if read_metrics(run_dir / "metrics.jsonl").get("train/loss", ([0], []))[0][-1] >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}: {process.communicate()[0][-2000:]}")
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[0][-2000:]}")


def final_state(run_dir: Path) -> dict[str, Any]:
    """Return the newest checkpoint's state."""
    found = newest_valid(run_dir / "checkpoints")
    assert found is not None
    return found.load()


def digest(state: dict[str, Any]) -> str:
    """Return a digest of weights, buffers and momentum, bit by bit."""
    sha = hashlib.sha256()
    momentum = {f"momentum{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    for name, tensor in sorted({**state["model"], **momentum}.items()):
        sha.update(name.encode() + (b"none" if tensor is None else tensor.contiguous().numpy().tobytes()))
    return sha.hexdigest()
