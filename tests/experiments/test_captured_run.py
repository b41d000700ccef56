"""The whole command with the stand-in for CUDA graphs: checkpoints, evaluation and a resume are the eager ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.engine.learner as learner_module
import experiments.engine.run_evaluation as evaluation_module
from experiments.cli.command_line import run_command
from experiments.engine.optim import build_optimizer
from experiments.records.checkpoint import newest_valid
from experiments.records.run_folder import read_evaluations
from experiments.train import main
from tests.experiments.support.recording import RecordingCapturer


def final_state(run_dir: Path) -> dict[str, Any]:
    found = newest_valid(run_dir / "checkpoints")
    assert found is not None
    return found.load()


@pytest.mark.integration
def test_captured_command_is_the_eager_one(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[RecordingCapturer] = []

    def capturer(*_: Any) -> RecordingCapturer:
        captures.append(RecordingCapturer())
        return captures[-1]

    fused = lambda model, config, *, fused: build_optimizer(model, config, fused=True)  # noqa: E731
    monkeypatch.setattr(learner_module, "build_optimizer", fused)
    settings = ["train.steps=16", "eval.interval_steps=8", "model.dropout_rate=0.5", "eval.clips_per_batch=4"]
    assert run_command(main, [str(write_config("eager")), *settings]) == 0
    monkeypatch.setattr(learner_module, "graph_obstacle", lambda *_: "")
    monkeypatch.setattr(learner_module, "CudaCapturer", capturer)
    monkeypatch.setattr(evaluation_module, "forward_capturer", capturer)
    assert run_command(main, [str(write_config("captured")), *settings]) == 0
    # The step with audio and without it; then twice a split of one batch, which is not captured, and one of several.
    assert [c.captures for c in captures] == [2, 0, 1, 0, 1]
    eager, run_dir = tmp_path / "runs" / "eager", tmp_path / "runs" / "captured"
    assert read_evaluations(eager) == read_evaluations(run_dir)
    (run_dir / "checkpoints" / "step-00000016").rename(tmp_path / "put-aside")
    assert run_command(main, [str(tmp_path / "captured.yaml"), *settings]) == 0  # the last two steps again
    expected = final_state(eager)
    for state in (final_state(run_dir), torch.load(tmp_path / "put-aside" / "state.pt")):
        for name, tensor in expected["model"].items():
            assert torch.equal(state["model"][name], tensor), name
        for index, kept in expected["optimizer"]["state"].items():
            assert torch.equal(state["optimizer"]["state"][index]["momentum_buffer"], kept["momentum_buffer"])
        assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
