"""Every damage to a checkpoint is noticed, and the one before is used."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.records.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_model_state,
    mark_best,
    newest_valid,
    read_checkpoint,
    save_checkpoint,
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
    import hashlib

    data = pickle.dumps({"model": Hostile()})
    (path / "state.pt").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
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
    with pytest.raises(CheckpointError, match="has version 9; this code reads version 1"):
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
