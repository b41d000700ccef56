"""Paths on the command line that are not what the command takes: what is there, and what to name instead."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError, build, read_tree
from experiments.config import Config
from experiments.engine.data import resolve_data_path
from experiments.engine.evaluation import write_report
from experiments.engine.initial_weights import load_initial_weights
from experiments.engine.target import unfinished_note
from experiments.engine.trained_model import load_target
from experiments.evaluate import main as evaluate_main
from experiments.export import main as export
from experiments.predict import main as predict
from experiments.records.checkpoint import find_checkpoint, mark_best, save_checkpoint
from experiments.records.run_folder import RunFolderError, open_run_folder
from experiments.records.state import CheckpointError
from experiments.runtime import Runtime
from pipeline.open import DataPathError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of two runs, one with two checkpoints and a best one, and what an export leaves."""
    for step in (1, 2):
        saved = save_checkpoint(tmp_path / "runs" / "a" / "checkpoints", step, {"model": {}}, "version: 1\n", keep=2)
    mark_best(saved.parent, saved)
    (tmp_path / "runs" / "b" / "checkpoints").mkdir(parents=True)
    for name, file in (("program", "model.pt2"), ("weights", "model.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs", r"but is the folder of 2 run\(s\); name one: .*runs/a, .*runs/b$"),
        ("runs/a/checkpoints", r"name the run \(.*/runs/a\) or one of them \(.*/checkpoints/step-00000002\)"),
        ("runs/b", "must hold a checkpoint; train first|has saved no checkpoint: continue it first"),
        ("program", "model exported as program or onnx, .*experiments.export --format weights writes"),
        ("weights", "exported with --format weights; name the run that it came from"),
        ("runs/a/checkpoints/best/state.pt", "not a file inside one; name its folder, .*/checkpoints/best$"),
        ("runs/c", "must be "),
    ],
)
def test_target_and_source_of_weights(runs: Path, path: str, words: str) -> None:
    target = runs.parent / path
    with pytest.raises((CheckpointError, ConfigError), match=words):
        load_target(target, "best", [])
    if path != "weights":  # which a training takes
        with pytest.raises(CheckpointError, match=words):
            load_initial_weights(None, target)  # type: ignore[arg-type] # refused before the model is touched


def test_a_training_that_is_not_finished_is_noted(tmp_path: Path) -> None:
    assert unfinished_note(tmp_path) == ""
    file = tmp_path / "summary.json"
    for text, words in (
        ('{"finished": false, "steps": 35, "total_steps": 1000}', " is not finished (step 35 of 1000)"),
        ('{"finished": true, "steps": 1000, "total_steps": 1000}', ""),
        ("[]", ""),
        ("", ""),
    ):
        file.write_text(text)
        assert unfinished_note(tmp_path) == (f"note: the training in {tmp_path}{words}" if words else "")


def test_missing_target_is_no_configuration_file(runs: Path, capsys: Any) -> None:
    for command in (predict, evaluate_main, export):
        rest = {predict: ["x.mp4"], export: ["--out", "x"]}.get(command, [])
        assert run_command(command, [str(runs / "nothing"), *rest]) == 2
        assert capsys.readouterr().err == (
            f"error: {runs / 'nothing'} must be a run folder, a checkpoint folder or a configuration file and exist; "
            "correct the path\n"
        )


def test_damaged_checkpoint_that_was_named_has_a_remedy(runs: Path) -> None:
    folder = runs / "a" / "checkpoints"
    state = folder / "best" / "state.pt"
    state.unlink()
    state.write_bytes(b"x")
    for target in (runs / "a", folder / "best"):
        with pytest.raises(CheckpointError, match=r"state.pt is damaged .*; name another one \(.*/step-00000002\)$"):
            find_checkpoint(target)
    shutil.rmtree(folder / "step-00000001")
    shutil.rmtree(folder / "step-00000002")
    with pytest.raises(CheckpointError, match=r"; restore it from a copy, or train again$"):
        find_checkpoint(runs / "a")


def test_data_path_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    config = build(Config, read_tree(f"data: {{path: {tmp_path / 'x'}}}", "t"))
    with pytest.raises(DataPathError, match=r"data.path \(.*/x\) must be a folder, not a file"):
        resolve_data_path(config, Runtime(0, 1, 0, None))  # type: ignore[arg-type]


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    config = build(Config, read_tree(f"name: r\noutput_dir: {tmp_path / 'x'}", "t"))
    with pytest.raises(
        RunFolderError, match=r"run folder \(.*/x/r\) must be a folder that can be made \(Not a dir.*\); "
    ):
        open_run_folder(config, [])
    (tmp_path / "r" / ".lock").mkdir(parents=True)  # a file that cannot be written, whoever runs this
    config = build(Config, read_tree(f"name: r\noutput_dir: {tmp_path}", "t"))
    with pytest.raises(RunFolderError, match=r"\(.*/r\) must be writable \(Is a directory\); choose another"):
        open_run_folder(config, [])
    with pytest.raises(RunFolderError, match=r"report folder \(.*/x/y\) must be .*; choose another --output"):
        write_report(None, tmp_path / "x" / "y", {})  # type: ignore[arg-type] # refused before the report is read


@pytest.mark.integration
def test_predict_of_a_folder_without_videos_and_export_into_a_file(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.train import main as train

    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    run, file = tmp_path / "runs" / "tiny", tmp_path / "file"
    file.touch()
    capsys.readouterr()
    assert run_command(predict, [str(run), str(tmp_path)]) == 2
    assert f"folder ({tmp_path}) must hold at least one video; check the path" in capsys.readouterr().err
    assert run_command(export, [str(run), "--out", str(file / "x")]) == 2
    assert f"--out ({file}/x) must be a folder that can be made (Not a directory)" in capsys.readouterr().err

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("experiments.engine.exporting.input_facts", interrupt)
    assert run_command(export, [str(run), "--out", str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    assert run_command(export, [str(run), "--out", str(tmp_path / "out")]) == 130
    assert list((tmp_path / "out").iterdir()) == []
