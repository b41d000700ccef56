"""Training samples scored as validation is: the same numbers as `experiments.evaluate`, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.run_data import RunData
from experiments.evaluate import main as evaluate
from experiments.records.spool import read_metrics
from experiments.runtime import init_runtime
from experiments.train import main as train
from tests.experiments.support.forked import run_ranks
from tests.experiments.support.processes import digest, final_state

WRITE = Callable[..., Path]
pytestmark = pytest.mark.integration
# Without dropout, whose mask depends on the number of ranks.
STEPS = ["train.steps=4", "eval.interval_steps=2", "eval.precise_bn_batches=2", "model.dropout_rate=0.0"]


def scores(run_dir: Path) -> dict[str, Any]:
    """The metrics of both splits."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return {name: values for name, values in found.items() if name.startswith(("train_eval/", "val/"))}


def test_scores_are_those_of_the_evaluate_command(write_config: WRITE, tmp_path: Path) -> None:
    config, run = write_config(), tmp_path / "runs" / "tiny"
    assert run_command(train, [str(config), *STEPS, "eval.train_samples=200"]) == 0
    found = scores(run)
    assert found["train_eval/top1"][0] == found["train_eval/loss"][0] == found["val/top1"][0] == [2, 4]
    command = [str(run), "--checkpoint", "last", "--split", "train", "--output", str(tmp_path / "report")]
    assert run_command(evaluate, command) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["samples"]["manifest"] == 16
    for name, value in report["metrics"].items():
        assert found[f"train_eval/{name}"][1][-1] == value
    assert "16 samples of 'train' scored alike: top1" in (run / "log.txt").read_text()


def test_ranks_score_the_same_and_without_it_the_training_is_the_same(write_config: WRITE, tmp_path: Path) -> None:
    one, two, none = (write_config(name) for name in ("one", "two", "none"))
    assert run_command(train, [str(one), *STEPS, "train.clips_per_step=16", "eval.train_samples=5"]) == 0
    assert run_command(train, [str(none), *STEPS, "train.clips_per_step=16", "eval.train_samples=0"]) == 0
    code, output = run_ranks(
        "experiments.train", [str(two), *STEPS, "train.clips_per_step=16", "eval.train_samples=5"], 2, timeout_s=240
    )
    assert code == 0, output[-3000:]
    runs = tmp_path / "runs"
    alone, ranks = scores(runs / "one"), scores(runs / "two")
    assert alone.keys() == ranks.keys()
    assert alone["train_eval/top1"] == ranks["train_eval/top1"]
    assert ranks["train_eval/loss"][1] == pytest.approx(alone["train_eval/loss"][1], abs=1e-3)
    assert digest(final_state(runs / "none")) == digest(final_state(runs / "one"))
    assert scores(runs / "none") == {k: v for k, v in alone.items() if k.startswith("val/")}


def test_as_many_samples_as_validation_has_at_most(write_config: WRITE) -> None:
    def drawn(*settings: str) -> Any:
        config = load_config(write_config(), settings)
        return RunData(config, init_runtime(config.runtime)).scored_train_set

    few = drawn("eval.train_samples=5")
    assert len(few.samples) == 5
    assert few.fingerprint == drawn("eval.train_samples=5").fingerprint
    assert few.fingerprint != drawn("eval.train_samples=5", "train.seed=1").fingerprint
    assert len(drawn("eval.train_samples=17").samples) == 16
    assert drawn("eval.train_samples=0") is None
