"""Training on a real GPU with DropPathway: every precision, captured or not, from the start, continued, evaluated."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.records.checkpoint import newest_valid
from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_metrics
from experiments.train import main

WRITE = Callable[..., Path]
# The clips of the test data are 32 px wide, which no GPU decodes: PyAV reads them.
ON_GPU = ("runtime.device=cuda", "data.decoder=cpu", "model.drop_pathway_rate=0.5", "optim.lr=0.01")


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Put back what `runtime.deterministic` sets for the whole process."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.needs_cuda
@pytest.mark.integration
@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_evaluates_and_continues(precision: str, graph: str, write_config: WRITE, tmp_path: Path) -> None:
    """Seed 0 drops the audio of some steps and keeps that of others, so momentum of both kinds meets."""
    settings = [f"runtime.precision={precision}", f"runtime.cuda_graph={graph}"]
    config = [str(write_config()), *ON_GPU, *settings, "train.steps=24", "eval.interval_steps=12"]
    assert run_command(main, config) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert sorted(read_evaluations(run_dir)) == [12, 24]
    losses = read_metrics(run_dir / "metrics.jsonl")["train/loss"][1]
    assert len(losses) == 24
    assert all(math.isfinite(loss) for loss in losses)
    assert (run_dir / "log.txt").read_text().count("captured as a CUDA graph") == (2 if graph == "on" else 0)
    newest = run_dir / "checkpoints" / "step-00000024"
    newest.rename(tmp_path / "put-aside")
    assert run_command(main, config) == 0
    assert newest.is_dir()
    assert json.loads((run_dir / "summary.json").read_text())["resumed_from_step"] == 22


@pytest.mark.needs_cuda
@pytest.mark.integration
def test_captured_run_is_the_eager_run(write_config: WRITE, tmp_path: Path) -> None:
    """The whole command, on one random batch: every tensor of the checkpoints is equal."""
    states = []
    for graph in ("on", "off"):
        settings = [f"runtime.cuda_graph={graph}", "runtime.deterministic=true", "debug.synthetic_input=true"]
        more = ["train.steps=30", "eval.interval_steps=30", "runtime.precision=bf16", "model.dropout_rate=0.5"]
        assert run_command(main, [str(write_config(f"graph-{graph}")), *ON_GPU, *settings, *more]) == 0
        found = newest_valid(tmp_path / "runs" / f"graph-{graph}" / "checkpoints")
        assert found is not None
        states.append(found.load())
    captured, eager = states
    for name, tensor in eager["model"].items():
        assert torch.equal(captured["model"][name], tensor), name
    for index, state in eager["optimizer"]["state"].items():
        assert torch.equal(captured["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    assert captured["optimizer"]["param_groups"] == eager["optimizer"]["param_groups"]
