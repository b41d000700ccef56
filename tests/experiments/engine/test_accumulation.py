"""Steps of several passes: those of one pass within rounding, on one rank and on two, and the same after a stop."""

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.accumulation import AccumulatedStep, weights_by_count
from experiments.engine.data import DataSetupError, passes_per_step
from experiments.engine.graph_rules import graph_obstacle
from experiments.engine.step import StepInputs, TrainingStep
from experiments.records.checkpoint import list_checkpoints
from experiments.records.spool import read_metrics
from experiments.tasks import StepLoss
from experiments.train import main
from tests.experiments.support.forked import run_ranks
from tests.experiments.support.processes import TRAIN, digest, final_state

WRITE = Callable[..., Path]
SAME = ["train.steps=4", "model.dropout_rate=0.0", "model.clips_per_bn_group=2", "checkpoint.interval_steps=0",
        "model.sync_loss=contrastive", "model.sync_levels=[res3]", "data.negatives=easy"]  # fmt: skip


def train(config: Path, *overrides: str) -> None:
    assert run_command(main, [str(config), *SAME, *overrides]) == 0


def largest_difference(one: dict[str, Any], other: dict[str, Any], without: str = "-") -> float:
    """Of weights and running statistics, relative to the largest value of each tensor; but for names that end so."""
    assert one["model"].keys() == other["model"].keys()
    shares = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3))
        for a, b in ((one["model"][key], other["model"][key]) for key in one["model"] if not key.endswith(without))
    ]
    return max(shares)


@pytest.mark.integration
def test_four_passes_of_two_clips_are_one_of_eight(write_config: WRITE, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    train(write_config("whole"))
    train(write_config("passes"), "train.max_clips_per_pass=2")
    train(write_config("fewer"), "train.clips_per_step=4")
    whole, passes, fewer = (final_state(runs / name) for name in ("whole", "passes", "fewer"))
    difference = largest_difference(passes, whole)
    print(f"\n4 x 2 against 8 clips: {difference:.1e}; 4 clips against 8: {largest_difference(fewer, whole):.1e}")
    assert difference < 1e-4
    assert largest_difference(fewer, whole) > 100 * difference  # the measure sees other steps
    loss, other = (read_metrics(runs / name / "metrics.jsonl")["train/loss"][1] for name in ("passes", "whole"))
    assert loss == pytest.approx(other, rel=1e-4)
    text = (runs / "passes" / "log.txt").read_text()
    assert "the step runs without CUDA graph: " in text


@pytest.mark.integration
def test_two_ranks_with_passes_are_one_process(write_config: WRITE, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    train(write_config("whole"))
    arguments = [str(write_config("two")), *SAME, "train.max_clips_per_pass=2"]
    code, output = run_ranks(TRAIN, arguments, 2, timeout_s=240)
    assert code == 0, output[-3000:]
    # The unbiased running variance of two ranks is 1/n apart (experiments/LOG.md).
    difference = largest_difference(final_state(runs / "two"), final_state(runs / "whole"), "running_var")
    print(f"\n2 ranks x 2 passes x 2 clips against 8: {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.integration
def test_run_with_passes_is_the_same_after_a_stop(write_config: WRITE, tmp_path: Path) -> None:
    runs, overrides = tmp_path / "runs", ["train.max_clips_per_pass=4", "model.dropout_rate=0.5"]
    overrides += ["checkpoint.interval_steps=2", "checkpoint.keep=9"]
    train(write_config("whole"), *overrides)
    shutil.copytree(runs / "whole", runs / "again")
    for step, path in list_checkpoints(runs / "again" / "checkpoints"):
        if step > 2:
            shutil.rmtree(path)
    train(write_config("again"), *overrides)
    assert "continuing from step 2 of 4" in (runs / "again" / "log.txt").read_text()
    assert digest(final_state(runs / "again")) == digest(final_state(runs / "whole"))


@pytest.mark.parametrize(
    ("clips", "most", "world", "passes"),
    [(1024, 0, 1, 1), (1024, 32, 1, 32), (1024, 32, 8, 4), (1024, 32, 128, 1), (1024, 30, 8, 8), (24, 16, 1, 3)],
)
def test_passes_follow_from_clips_ranks_and_limit(
    write_config: WRITE, clips: int, most: int, world: int, passes: int
) -> None:
    """Whole BN groups of 8, as few passes as the limit allows."""
    config = load_config(write_config(), [f"train.clips_per_step={clips}", f"train.max_clips_per_pass={most}"])
    assert passes_per_step(config, world) == passes


def test_pass_below_a_group_is_refused(write_config: WRITE) -> None:
    config = load_config(write_config(), ["train.clips_per_step=16", "train.max_clips_per_pass=4"])
    with pytest.raises(DataSetupError, match=r"max_clips_per_pass \(4\) must be at least the 8 clips that share BN"):
        passes_per_step(config, 1)
    frozen = load_config(write_config(), ["train.clips_per_step=16", "train.max_clips_per_pass=4", "model.freeze=bn"])
    assert passes_per_step(frozen, 1) == 4


def test_graphs_are_ruled_out_with_the_reason(write_config: WRITE, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(), ["train.clips_per_step=16", "train.max_clips_per_pass=8"])
    runtime: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    assert graph_obstacle(config, runtime) == "a step has 2 passes (train.max_clips_per_pass)"


def test_weights_make_means_over_unequal_numbers_the_mean_over_all() -> None:
    values = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0]), torch.tensor([])]
    weights = weights_by_count([torch.tensor(float(len(v))) for v in values], 1)
    parts = [w * (v.mean() if len(v) else torch.tensor(0.0)) for w, v in zip(weights, values, strict=True)]
    assert float(torch.stack(parts).mean()) == pytest.approx(13 / 4)
    assert [float(w) for w in weights_by_count([torch.tensor(0.0)] * 2, 1)] == [0.0, 0.0]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


class Probe(nn.Module):
    """A model that looks at the labels only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, frames: Tensor, log_mel: Any, **_: Any) -> Tensor:
        out: Tensor = self.fc(frames)
        return out


@pytest.mark.usefixtures("group")
def test_gradients_are_exchanged_once_a_step() -> None:
    module = DistributedDataParallel(Probe())
    exchanged: list[int] = []

    def count(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    module.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)

    def loss(out: Tensor, _: StepInputs) -> StepLoss:
        return StepLoss(out.mean(), out[:, 0], {"part": out.mean()})

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = TrainingStep(module, optimizer, scaler, loss, lambda: torch.autocast("cpu", enabled=False))
    before = module.module.fc.weight.detach().clone()
    frames = torch.arange(24.0).view(8, 3)
    labels = torch.zeros(2)
    found = AccumulatedStep(step)([StepInputs(f, None, None, labels) for f in frames.split(2)], drop_audio=False)
    assert exchanged == [0]  # one bucket, with the last of four passes
    assert found.per_clip.shape == (8,)
    assert float(found.total) == pytest.approx(float(found.per_clip.mean()))
    assert torch.allclose(before - module.module.fc.weight, 0.5 * frames.mean(0, keepdim=True))
