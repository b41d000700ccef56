"""Every damage to a checkpoint is noticed, and the one before is used."""

import contextlib
import copy
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.records.checkpoint import list_checkpoints, mark_best, newest_valid, read_checkpoint, save_checkpoint
from experiments.records.manifest import FileRecord, manifest_text
from experiments.records.state import (
    CheckpointError,
    load_model_state,
    optimizer_problem,
    state_problem,
    training_problem,
)


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(
        folder, step, {"model": {"w": torch.full((4,), float(step))}, "step": step}, "a: 1\n", keep=keep
    )


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [30, 20]
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 30
    assert found.load()["model"]["w"].tolist() == [30.0] * 4
    assert found.config == "a: 1\n"
    assert newest_valid(tmp_path / "none") is None


@pytest.mark.parametrize("name", ["state.pt", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "truncate", "delete"])
def test_damage_is_noticed_and_falls_back(tmp_path: Path, name: str, damage: str, caplog: Any) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20) / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 10
    assert "falling back" in caplog.text


def test_every_bit_of_a_state_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    data = (path / "state.pt").read_bytes()
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        (path / "state.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            read_checkpoint(path)


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Every single-bit flip."""
    for position in range(8 * len(data)):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << (position % 8)
        yield position, bytes(changed)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["step-00000020", "best"])
def test_every_bit_of_a_manifest_counts(tmp_path: Path, version: int, name: str) -> None:
    """Version 1 had no digest of its own; then the step in `best`, which has no step in its name, is not covered."""
    path = save(tmp_path, 20)
    if name == "best":
        path = mark_best(tmp_path, path)
    files = {n: FileRecord.of(memoryview((path / n).read_bytes())) for n in ("state.pt", "config.yaml")}
    data = manifest_text(20, files, version).encode()
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_bytes(data)
    assert read_checkpoint(path).step == 20
    accepted = []
    for position, changed in flips(data):
        (path / "manifest.json").write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            read_checkpoint(path)
            accepted.append(position)
    uncovered = 0 if (version, name) != (1, "best") else 16
    assert len(accepted) <= uncovered
    if version == 2:
        assert 8 * len(data) > 2544
        assert accepted == []


@pytest.mark.parametrize("text", [
    "[" * 60000, '{"a":' * 10000, '{"version": 2, "step": ' + "9" * 20000 + "}", '{"version": 1e999}', "null", "[]", "",
    '{"version": 2, "step": -1, "files": {}}', '{"version": 2, "step": 1, "files": []}', "x" * 100000,
    '{"version": 2, "step": 1, "files": {"a": {"bytes": 1e400, "sha256": null}}}', '{"version": true, "step": 1}',
])  # fmt: skip
def test_a_manifest_of_anything_is_one_line(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^checkpoint .*: manifest.json [^\n]*$"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["state.pt", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, kind: str, caplog: Any) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # names of sockets are short
            server.bind(name)
            os.chdir(here)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 1
    assert f"{name} cannot be read" in caplog.text


def test_no_memory_is_one_line_and_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def none(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", none)
    with pytest.raises(CheckpointError, match="does not fit into the memory that is free"):
        read_checkpoint(path).load()
    monkeypatch.undo()
    monkeypatch.setattr(torch, "save", none)
    with pytest.raises(OSError, match="there is no memory for a copy of the state"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def good_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "step": 3}
    return copy.deepcopy(state | {"data_fingerprint": "x", "class_names": ["a"], "guard": torch.zeros(2, 2)})


def changed(*path: Any, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Set a value deep in a state; None removes it."""

    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        if value is None:
            del state[path[-1]]
        else:
            state[path[-1]] = value

    return change


@pytest.mark.parametrize(("change", "message"), [
    (changed("model"), "holds no model"),
    (changed("model", "weight", value=3), "something else than a tensor as 'weight'"),
    (changed("class_names", value=[1]), "class_names that are no list of texts"),
    (changed("step"), "has step None"),
    (changed("step", value=10**400), "has step 1000"),
    (changed("step", value=float("inf")), "has step inf"),
    (changed("data_fingerprint"), "has no data_fingerprint"),
    (changed("optimizer"), "has no optimizer"),
    (changed("optimizer", "state"), "without state and param_groups"),
    (changed("scaler"), "has no scaler"),
    (changed("guard", value=torch.zeros(3)), "no tensor (2, 2)"),
    (changed("optimizer", "param_groups", value=[]), "optimizer groups of [] parameters must be [2]"),
    (changed("optimizer", "param_groups", 0, "params", value=[0]), "optimizer groups of [1] parameters must be [2]"),
    (changed("optimizer", "state", 7, value={}), "optimizer state of parameter 7 must be one of 2"),
    (changed("optimizer", "state", 0, "momentum_buffer", value=torch.zeros(9)), "momentum_buffer of parameter 0 (9,)"),
    (changed("optimizer", "state", 0, "exp_avg", value=torch.zeros(3, 2)), "exp_avg of parameter 0 must be"),
])  # fmt: skip
def test_what_a_state_lacks_is_said(change: Callable[[dict[str, Any]], None], message: str) -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, own = good_state(model, optimizer), optimizer.state_dict()

    def problem() -> str:
        found = state_problem(state) or training_problem(state)
        return found or optimizer_problem(state["optimizer"], own, list(model.parameters()))

    assert problem() == ""
    change(state)
    assert message in problem()


def test_all_damaged_is_an_error_not_a_restart(tmp_path: Path) -> None:
    for path in [save(tmp_path, step) for step in (1, 2)]:
        (path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        newest_valid(tmp_path)


def test_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = save(tmp_path, 1)
    data = pickle.dumps({"model": Hostile()})
    (path / "state.pt").write_bytes(data)
    files = {name: FileRecord.of(memoryview((path / name).read_bytes())) for name in ("state.pt", "config.yaml")}
    (path / "manifest.json").write_text(manifest_text(1, files))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path).load()
    assert not (tmp_path / "pwned").exists()


def test_failed_write_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_best_survives_retention(tmp_path: Path) -> None:
    mark_best(tmp_path, save(tmp_path, 1, keep=1))
    save(tmp_path, 2, keep=1)
    assert read_checkpoint(tmp_path / "best").step == 1
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2]


def test_other_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(CheckpointError, match="version 9; this code reads versions 1 to 2"):
        read_checkpoint(path)


def test_other_model_is_refused_with_the_difference() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_state(nn.Linear(2, 3), {"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}, "x")
    text = str(caught.value)
    assert "1 keys missing: bias" in text
    assert "1 keys too many: extra" in text
    assert "weight (3, 4) must be (3, 2)" in text


def damage(path: Path) -> None:
    """Change one byte of a checkpoint's state; its length stays."""
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def test_damaged_checkpoints_do_not_count_and_the_only_valid_one_stays(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for path in [save(tmp_path, step) for step in (30, 40)]:  # higher than what follows after falling back to 10
        damage(path)
    save(tmp_path, 20, keep=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [40, 30, 20, 10]
    damage(tmp_path / "step-00000020")
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 10
    save(tmp_path, 25, keep=2)  # 20 does not count and goes, 10 counts and stays
    assert [s for s, _ in list_checkpoints(tmp_path)] == [40, 30, 25, 10]
    for step in (30, 40):
        save(tmp_path, step, keep=2)  # the run gets there: they are replaced
    assert [s for s, _ in list_checkpoints(tmp_path)] == [40, 30]
    assert all(read_checkpoint(path).step == step for step, path in list_checkpoints(tmp_path))


def test_old_one_stays_where_the_new_one_reads_back_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import experiments.records.checkpoint as module

    save(tmp_path, 1, keep=1)
    original = module.put_folder

    def put_damaged(made: Path, path: Path) -> None:
        original(made, path)
        damage(path)

    monkeypatch.setattr(module, "put_folder", put_damaged)
    with pytest.raises(OSError, match="was read back after writing and is damaged"):
        save(tmp_path, 2, keep=1)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 1
