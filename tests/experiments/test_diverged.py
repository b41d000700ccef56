"""A model that has diverged: no score of it counts, and no command uses it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.evaluate import main as evaluate
from experiments.export import main as export
from experiments.predict import main as predict
from experiments.records.checkpoint import list_checkpoints, mark_best, newest_valid, save_checkpoint
from experiments.records.finite import not_finite, tensors_of
from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_metrics
from experiments.train import main as train
from tests.experiments.support.forked import run_ranks
from tests.experiments.support.processes import PLANTED, digest, run
from tests.experiments.test_predict import write_video

WRITE = Callable[..., Path]


def spoil(run_dir: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Save the newest checkpoint's state again, changed, and mark it as the best one."""
    found = newest_valid(run_dir / "checkpoints")
    assert found is not None
    state = found.load()
    change(state["model"])
    mark_best(
        run_dir / "checkpoints", save_checkpoint(run_dir / "checkpoints", found.step, state, found.config, keep=9)
    )


def error_of(capsys: Any) -> str:
    """Return the one line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("error: "), lines[-1]
    return str(lines[-1])


@pytest.mark.integration
def test_scores_that_are_not_finite_are_no_result_and_never_best(
    write_config: WRITE, tmp_path: Path, capsys: Any
) -> None:
    """The learning rate is 100: two steps later the weights are finite, and what they compute is not."""
    assert run_command(train, [str(write_config()), "optim.lr=100", "optim.warmup_steps=0", "train.steps=4"]) == 1
    text = error_of(capsys)
    assert "must be finite" in text
    run_dir = tmp_path / "runs" / "tiny"
    assert read_evaluations(run_dir) == {}
    assert not (run_dir / "checkpoints" / "best").exists()
    assert json.loads((run_dir / "summary.json").read_text())["top1"] is None


@pytest.mark.integration
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_command(
    write_config: WRITE, tmp_path: Path, capsys: Any, value: float
) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    run_dir, video = tmp_path / "runs" / "tiny", tmp_path / "a.avi"
    write_video(video)
    spoil(run_dir, lambda weights: weights["slow.stem.conv.weight"][0].fill_(value))
    commands: list[tuple[Any, list[str]]] = [
        (evaluate, [str(run_dir)]),
        (predict, [str(run_dir), str(video)]),
        (export, [str(run_dir), "--out", str(tmp_path / "exported")]),
        (train, [str(write_config("next")), f"train.init_from={run_dir}"]),
    ]
    for command, arguments in commands:
        capsys.readouterr()
        assert run_command(command, arguments) == 2
        text = error_of(capsys)
        assert "must hold finite weights and statistics, but 1 of " in text
        assert "(slow.stem.conv.weight)" in text
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "runs" / "next").exists()


@pytest.mark.integration
def test_finite_weights_whose_scores_are_not_are_refused_by_every_command(
    write_config: WRITE, tmp_path: Path, capsys: Any
) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    run_dir, video = tmp_path / "runs" / "tiny", tmp_path / "a.avi"
    write_video(video)
    spoil(run_dir, lambda weights: weights["head.classifier.visual.weight"].fill_(3e38))
    capsys.readouterr()
    assert run_command(evaluate, [str(run_dir)]) == 1
    assert "scores of 16 of 16 views must be finite and are not (" in error_of(capsys)
    assert list(run_dir.glob("evaluations/*")) == []
    assert run_command(predict, [str(run_dir), str(video)]) == 2
    assert "not scored: the model's scores must be finite and are not" in capsys.readouterr().out
    assert run_command(export, [str(run_dir), "--out", str(tmp_path / "exported")]) == 2
    assert "must give finite scores" in error_of(capsys)
    assert not (tmp_path / "exported").exists()


def planted(config: Path, ranks: int, *overrides: str, **fault: Any) -> tuple[int, str]:
    """Train in processes of their own with something wrong in the numbers; returns exit code and output."""
    arguments, plant = [str(config), *overrides], json.dumps(fault)
    if ranks > 1:
        return run_ranks(PLANTED, arguments, ranks, timeout_s=240, AVSF_PLANT=plant)
    return run(["-m", PLANTED, *arguments], AVSF_PLANT=plant)


def one_line(output: str, start: str = "error: ") -> str:
    """Return the line of an error; there is no traceback."""
    assert not re.search(r"experiments/.*\.py\", line", output), output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return line


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["weight", "statistic"])
def test_a_rank_with_one_other_bit_ends_the_run(write_config: WRITE, tmp_path: Path, kind: str) -> None:
    """The statistics are pooled over the ranks at every step's end: it is the bit of a weight that would stay."""
    overrides = ["train.steps=9", "train.clips_per_step=16", "checkpoint.interval_steps=3", "eval.interval_steps=100"]
    code, output = planted(write_config(), 2, *overrides, kind=kind, step=4, rank=1)
    checkpoints = list_checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    if kind == "statistic":
        assert code == 0, output[-3000:]
        assert checkpoints[0][0] == 9
        return
    assert code == 1
    for start in ("error: ", "[rank 1] error: "):
        line = one_line(output, start)
        assert "after step 5 must be the same bits on all ranks and are not: not those of rank 0 are rank 1 in " in line
    assert [step for step, _ in checkpoints] == [3]


@pytest.mark.integration
# What is checked is the loss, whichever input spoiled it (engine/test_guard.py has the rules).
@pytest.mark.parametrize("kind", ["frames", pytest.param("sound", marks=pytest.mark.slow)])
def test_a_bad_step_of_one_rank_is_skipped_by_all(write_config: WRITE, tmp_path: Path, kind: str) -> None:
    """The replicas are compared at every log step; then the run that stops at it, and goes on when it is told to."""
    overrides = ["train.steps=6", "train.clips_per_step=16", "runtime.compare_ranks_steps=1", "optim.bad_step=skip"]
    overrides += ["model.drop_pathway_rate=0.0", "eval.interval_steps=100", "checkpoint.interval_steps=4"]
    code, output = planted(write_config(), 2, *overrides, kind=kind, step=5, rank=1)
    assert code == 0, output[-3000:]
    assert output.count("step 5 is left out: loss must be finite and is not, for the clips ") == 1
    run_dir = tmp_path / "runs" / "tiny"
    assert read_metrics(run_dir / "metrics.jsonl")["train/steps_skipped"] == ([6], [1.0])
    skipped = newest_valid(run_dir / "checkpoints")
    assert skipped is not None
    assert skipped.step == 6
    stop = [o for o in overrides if not o.startswith("optim.bad_step")]
    code, output = planted(write_config("stops"), 2, *stop, kind=kind, step=5, rank=1)
    assert code == 1
    line = one_line(output)
    assert "loss at step 5 must be finite and is not, for the clips " in line
    assert line.endswith("; the newest checkpoint is of step 4")
    code, output = planted(tmp_path / "stops.yaml", 2, *overrides, kind=kind, step=5, rank=1)
    assert code == 0, output[-3000:]
    continued = newest_valid(tmp_path / "runs" / "stops" / "checkpoints")
    assert continued is not None
    assert digest(continued.load()) == digest(skipped.load())


@pytest.mark.integration
def test_diverged_momentum_is_not_saved(write_config: WRITE, tmp_path: Path) -> None:
    """The last step's loss and gradients are finite: only what would be saved is not."""
    code, output = planted(write_config(), 1, "train.steps=6", "checkpoint.interval_steps=2", kind="momentum", step=5)
    assert code == 1
    line = one_line(output)
    assert "weights, statistics and momentum after step 5 must be finite and are not (" in line
    assert "momentum_buffer of " in line
    assert line.endswith("; the newest checkpoint is of step 4")
    assert [step for step, _ in list_checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")] == [4, 2]


@pytest.mark.integration
def test_a_diverged_checkpoint_is_passed_over(write_config: WRITE, tmp_path: Path) -> None:
    config = write_config()
    assert run_command(train, [str(config)]) == 0
    run_dir = tmp_path / "runs" / "tiny"
    expected = newest_valid(run_dir / "checkpoints")
    assert expected is not None
    spoil(run_dir, lambda weights: weights["slow.stem.norm.running_var"].fill_(float("inf")))
    assert run_command(train, [str(config)]) == 0
    log = (run_dir / "log.txt").read_text()
    assert "must be finite, but 1 of its " in log
    assert "(model.slow.stem.norm.running_var): the training had diverged; falling back to the one before" in log
    assert "continuing from step 4 of 6" in log
    again = newest_valid(run_dir / "checkpoints")
    assert again is not None
    assert again.step == 6
    assert digest(again.load()) == digest(expected.load())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for count in (1, 7, 1000):
        for position in {0, count // 2, count - 1}:
            tensors = {"a": torch.ones(3), "b": torch.zeros(count, dtype=dtype), "c": torch.tensor(2**62)}
            assert not_finite(tensors) == []
            tensors["b"][position] = value
            assert not_finite(tensors) == ["b"]
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert not_finite({"largest": largest, "empty": torch.zeros(0), "flag": torch.tensor(True)}) == []
    assert not_finite({}) == []


def test_tensors_of_nested_containers_have_dotted_names() -> None:
    one = torch.ones(1)
    assert dict(tensors_of({"a": {"b": [one, 2], 3: (one,)}, "c": "x"})).keys() == {"a.b[0]", "a.3[0]"}
