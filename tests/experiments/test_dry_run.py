"""`train --dry-run`: the plan of a run, its refusals, and that nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.train import main

WRITE = Callable[..., Path]


def said(capsys: Any) -> dict[str, str]:
    """Topic -> text of what was printed; lines without a topic belong to the one before."""
    found: dict[str, str] = {}
    topic = ""
    for line in capsys.readouterr().out.splitlines():
        if line[:1] != " ":
            topic = line.split()[0]
        found[topic] = f"{found.get(topic, '')} {line.removeprefix(topic).strip()}".strip()
    return found


def test_plan_says_what_a_training_would_do_and_leaves_nothing(
    write_config: WRITE, tmp_path: Path, capsys: Any
) -> None:
    overrides = ["train.clips_per_step=32", "train.max_clips_per_pass=8", "eval.interval_steps=4", "optim.lr_clips=16"]
    overrides += ["eval.precise_bn_batches=3", "views.num_clips=2"]
    assert run_command(main, [str(write_config()), "--dry-run", *overrides]) == 0
    found = said(capsys)
    assert found["run"].endswith(": begun")
    assert "4 classes of 'action' 16 samples to train on in 'train', 16 to evaluate in 'val'" in found["data"]
    assert found["step"].startswith("32 clips = 1 ranks x 4 passes x 8; BN over 8 clips without CUDA graph: ")
    assert "7 x 8 clips" in found["memory"]  # two ahead, one in use, four passes of the step
    assert found["length"] == "6 steps = 12.00 epochs"
    assert found["rate"] == "cosine, peak 0.04, warm-up 2 steps from 0"
    assert found["checkpoints"].startswith("3 at least, 2 kept")
    assert found["evaluations"].startswith("2 x 40 views (")
    assert found["evaluations"].endswith("running statistics from 96 clips before each")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=5", "model.num_classes (5) must be 4"),
        ("train.clips_per_step=12", "must be at most model.clips_per_bn_group (8) or a multiple of it"),
        ("train.clips_per_step=65536", "GiB must be less than the memory of this machine"),
        ("data.path=/nowhere", "/nowhere"),
    ],
)
def test_what_would_end_the_training_ends_the_dry_run(
    write_config: WRITE, tmp_path: Path, capsys: Any, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.engine.memory.available_bytes", lambda device: 2**30)
    assert run_command(main, [str(write_config()), "--dry-run", override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_weights_is_refused_before_the_training(
    write_config: WRITE, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "films").mkdir()
    given = [str(write_config()), "--dry-run", f"train.init_from={tmp_path / 'films'}"]
    assert run_command(main, given) == 2
    assert "is empty" in capsys.readouterr().err
    assert run_command(main, [*given[:2], f"train.init_from={tmp_path / 'later'}"]) == 0
    assert "which is not there yet" in said(capsys)["run"]
