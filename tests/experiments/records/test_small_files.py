"""Small files of a run that are damaged: named, never a traceback, never a wait, never a restart that destroys."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.cli.files import read_json_file
from experiments.engine.initial_weights import _exported_names
from experiments.records.failures import record_failure, repeated_failure
from experiments.records.launch import is_restart, record_launch
from experiments.records.shipping import read_state
from experiments.records.tracking import sync_run
from experiments.runtime import Runtime

STATE = {"uri": "sqlite:///a.db", "experiment": "e", "name": "n", "run_id": "", "offset": 0}
ALONE = Runtime(0, 1, 0, torch.device("cpu"))
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "zeros": b"\0" * 40,
    "nested": b"[" * 200_000,
    "no text": b'{"agents": "\xff"}',
    "long": b" " * ((1 << 20) + 1),
    "number": b"7",
    "digits": b"9" * 5000,
    "list": b'[{"step": "1", "text": 2, "agents": null}]',
    "others": b'{"agents": 5, "uri": 3, "class_names": 8}',
}


def put(path: Path, kind: str) -> None:
    """Make a damaged file."""
    path.parent.mkdir(exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(DAMAGED[kind])


@pytest.fixture(params=[*DAMAGED, "fifo", "folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_damaged_failures_are_named_and_replaced(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "failures" / "rank-0.json"
    put(path, kind)
    assert repeated_failure(tmp_path, ALONE, 0, ["a"]) == ""
    assert f"{path} is damaged (" in caplog.text
    if kind == "folder":
        return
    for _ in range(2):
        record_failure(tmp_path, 0, 3, "the same", ["a"])
    assert repeated_failure(tmp_path, ALONE, 3, ["a"]) == "the same"
    assert repeated_failure(tmp_path, ALONE, 4, ["a"]) == ""


def test_damaged_launch_moves_nothing_aside_under_a_launcher(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ".launch"
    put(path, kind)
    assert is_restart(tmp_path, ["host/1/2"])
    assert f"{path} is damaged (" in caplog.text
    assert not is_restart(tmp_path, [])
    if kind != "folder":
        record_launch(tmp_path, ["host/1/2"])
        assert is_restart(tmp_path, ["host/1/2"])
        assert not is_restart(tmp_path, ["host/1/3"])


def test_damaged_tracking_state_is_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tracking.json"
    put(path, kind)
    assert read_state(tmp_path) == {"torn": True, "replaying": True}
    assert f"{path} is torn (" in caplog.text
    with pytest.raises(ValueError, match=r"must hold tracking.json or config.yaml; both are torn"):
        sync_run(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("offset", -1), ("offset", True), ("offset", 1.0), ("uri", None)])
def test_tracking_state_with_a_wrong_value_is_torn(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "tracking.json"
    path.write_text(json.dumps({**STATE, "tail": "0f"}))
    assert read_state(tmp_path) == {**STATE, "tail": "0f"}
    path.write_text(json.dumps({**STATE, name: value}))
    assert read_state(tmp_path) == {"torn": True, "replaying": True}


def test_damaged_facts_of_an_export_are_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "inputs.json", kind)
    assert _exported_names(tmp_path) == ()
    assert kind in ("number", "list", "others") or f"{tmp_path / 'inputs.json'} is damaged (" in caplog.text


@pytest.mark.parametrize(
    "ask",
    [
        lambda folder: read_state(folder) is None,
        lambda folder: not is_restart(folder, ["host/1/2"]),
        lambda folder: _exported_names(folder) == (),
    ],
)
def test_absent_files_are_no_damage(
    tmp_path: Path, ask: Callable[[Path], bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert ask(tmp_path)
    assert caplog.text == ""
    with pytest.raises(FileNotFoundError):
        read_json_file(tmp_path / "none.json")
