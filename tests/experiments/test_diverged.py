"""A model that has diverged: no score of it counts, and no command uses it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.evaluate import main as evaluate
from experiments.export import main as export
from experiments.predict import main as predict
from experiments.records.checkpoint import mark_best, newest_valid, save_checkpoint
from experiments.records.finite import not_finite, tensors_of
from experiments.records.run_folder import read_evaluations
from experiments.train import main as train
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
