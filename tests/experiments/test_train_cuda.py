"""Training on a real GPU with DropPathway: every precision, from the start, continued, evaluated."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli.command_line import run_command
from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_metrics
from experiments.train import main

WRITE = Callable[..., Path]
# The clips of the test data are 32 px wide, which no GPU decodes: PyAV reads them.
ON_GPU = ("runtime.device=cuda", "data.decoder=pyav", "model.drop_pathway_rate=0.5", "optim.lr=0.01")


@pytest.mark.needs_cuda
@pytest.mark.integration
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_evaluates_and_continues(precision: str, write_config: WRITE, tmp_path: Path) -> None:
    """Seed 0 drops the first steps' audio in some and not in others, so momentum of both kinds meets."""
    config = [
        str(write_config()),
        *ON_GPU,
        f"runtime.precision={precision}",
        "train.steps=24",
        "eval.interval_steps=12",
    ]
    assert run_command(main, config) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert sorted(read_evaluations(run_dir)) == [12, 24]
    losses = read_metrics(run_dir / "metrics.jsonl")["train/loss"][1]
    assert len(losses) == 24
    assert all(math.isfinite(loss) for loss in losses)
    for folder in sorted((run_dir / "checkpoints").glob("*24*")):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert run_command(main, config) == 0
    assert json.loads((run_dir / "summary.json").read_text())["resumed_from_step"] == 22
