"""Trains like experiments.train, with something wrong in the numbers of one rank at one step, as AVSF_PLANT says.

python -m tests.experiments.support.planted CONFIG [section.key=value ...]; AVSF_PLANT is JSON: kind (frames: those of
clip 2 are nan; sound: its log-mel is; weight: one bit of one weight is flipped; statistic: one of a running mean;
momentum: one value is nan), step, rank.
"""

import json
import os
import sys
from typing import Any

import torch

from experiments.cli.command_line import run_command
from experiments.engine.learner import Learner
from experiments.train import main
from pipeline.batch import Batch


def change(learner: Learner, kind: str) -> None:
    """Do what is wrong outside the inputs."""
    if kind == "momentum":
        next(iter(learner.optimizer.state.values()))["momentum_buffer"][0] = float("nan")
        return
    name = "fast.stem.conv.weight" if kind == "weight" else "slow.stem.norm.running_mean"
    with torch.no_grad():
        learner.model.state_dict()[name].data.untyped_storage()[0] ^= 1


def plant() -> None:
    """Prepare what AVSF_PLANT names, if it is this rank's."""
    fault = json.loads(os.environ["AVSF_PLANT"])
    if int(os.environ.get("RANK", "0")) != fault.get("rank", 0):
        return
    begin, inputs = Learner.begin_step, Learner._unweighted
    now: list[int] = [-1]

    def begin_step(self: Learner, step: int) -> bool:
        now[0] = step
        if step == fault["step"] and fault["kind"] not in ("frames", "sound"):
            change(self, fault["kind"])
        return begin(self, step)

    def spoiled(self: Learner, batch: Batch) -> Any:
        if now[0] == fault["step"] and fault["kind"] in ("frames", "sound"):
            given = batch.frames if fault["kind"] == "frames" else batch.log_mel
            assert given is not None
            given[2] = float("nan")
        return inputs(self, batch)

    Learner.begin_step, Learner._unweighted = begin_step, spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    plant()
    sys.exit(run_command(main))
