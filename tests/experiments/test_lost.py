"""Nothing is lost: restarts that continue, full disks, files that a power cut tore, folders that are deleted."""

import errno
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_events, read_metrics
from experiments.train import main
from tests.experiments.support.processes import (
    FAULTS,
    digest,
    final_state,
    fork,
    run,
    start,
    torchrun,
    wait_for_step,
)

pytestmark = pytest.mark.integration
WRITE = Callable[..., Path]


def losses(run_dir: Path) -> tuple[list[int], list[float]]:
    """Steps and losses that a run recorded."""
    return read_metrics(run_dir / "metrics.jsonl")["train/loss"]


def test_restart_by_torchrun_continues_what_train_fresh_began(write_config: WRITE, tmp_path: Path) -> None:
    config, run_dir = write_config(), tmp_path / "runs" / "tiny"
    assert run_command(main, [str(config), "train.steps=2"]) == 0
    fault = {"kind": "kill", "step": 5, "marker": str(tmp_path / "done")}
    overrides = ["train.fresh=true", "train.steps=8"]
    command = [*torchrun(1, restarts=2), "-m", FAULTS, str(config), *overrides]
    code, output = run(command, AVSF_FAULT=json.dumps(fault))
    assert code == 0, output[-3000:]
    assert (tmp_path / "done").exists()
    assert "continuing from step 4 of 8" in output
    moved = [p for p in (tmp_path / "runs").iterdir() if p.name.startswith("tiny.replaced-")]
    assert len(moved) == 1  # by the first start, what was there before; nothing by the second
    assert losses(moved[0])[0] == [1, 2]
    assert losses(run_dir)[0] == list(range(1, 9))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own, below the folder of the runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all that is free on a disk; returns the file to delete."""
    path = folder / "filler"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while os.write(descriptor, b"\0" * size):
                pass
        except OSError:
            continue
    os.close(descriptor)
    return path


OVERRIDES = ["train.steps=12", "checkpoint.interval_steps=3", "eval.interval_steps=6", "tracking.flush_timeout_s=60"]


def test_full_disk_that_is_freed_costs_nothing(write_config: WRITE, small_disk: Path, tmp_path: Path) -> None:
    whole = write_config("whole", **{f"output_dir: {small_disk}": f"output_dir: {tmp_path / 'other'}"})
    assert run_command(main, [str(whole), *OVERRIDES]) == 0
    full, freed = tmp_path / "full", tmp_path / "freed"
    hold = json.dumps({"kind": "hold", "files": {"2": str(full), "10": str(freed)}})
    process = fork(FAULTS, [str(write_config()), *OVERRIDES], AVSF_FAULT=hold)
    run_dir = small_disk / "tiny"
    wait_for_step(process, run_dir, 2)
    filler = fill(small_disk)
    full.touch()
    process.wait_for_words("evaluations.json could not be written (No space left on device, ", 240)  # of step 6
    process.wait_for_words("metrics.jsonl could not be written (No space left on device, needs", 240)
    filler.unlink()
    freed.touch()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    assert "metrics.jsonl could not be written (No space left on device, needs" in output
    for name in ("metrics.jsonl", "checkpoints", "evaluations.json"):
        assert f"/{name} was written after all" in output
    assert losses(run_dir) == losses(tmp_path / "other" / "whole")
    assert digest(final_state(run_dir)) == digest(final_state(tmp_path / "other" / "whole"))
    assert read_evaluations(run_dir) == read_evaluations(tmp_path / "other" / "whole")


@pytest.mark.parametrize(
    "error", ["EROFS", pytest.param("EDQUOT", marks=pytest.mark.slow), pytest.param("EIO", marks=pytest.mark.slow)]
)
def test_disk_that_refuses_for_some_steps_costs_nothing(write_config: WRITE, tmp_path: Path, error: str) -> None:
    overrides = ["train.steps=12", "checkpoint.interval_steps=4", "eval.interval_steps=6"]
    assert run_command(main, [str(write_config("whole")), *overrides]) == 0
    whole, run_dir = tmp_path / "runs" / "whole", tmp_path / "runs" / "tiny"
    fault = json.dumps({"kind": "refuse", "error": error, "step": 3, "until": 9, "folder": str(run_dir)})
    code, output = run(["-m", FAULTS, str(write_config()), *overrides], AVSF_FAULT=fault)
    assert code == 0, output[-3000:]
    words = os.strerror(getattr(errno, error))
    for name in ("metrics.jsonl", "checkpoints", "evaluations.json", "per_class.csv"):
        assert re.search(rf"/{name} could not be written \({words}, ", output), name
        assert f"/{name} was written after all" in output
    assert losses(run_dir) == losses(whole)
    assert digest(final_state(run_dir)) == digest(final_state(whole))
    assert read_evaluations(run_dir) == read_evaluations(whole)


def test_disk_full_to_the_end_is_named_and_the_same_command_makes_up_for_it(
    write_config: WRITE, small_disk: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    hold = json.dumps({"kind": "hold", "files": {"4": str(full)}})
    process = start(["-m", FAULTS, str(write_config()), *OVERRIDES], AVSF_FAULT=hold)
    run_dir = small_disk / "tiny"
    wait_for_step(process, run_dir, 4)
    filler = fill(small_disk)
    full.touch()
    output = process.communicate(timeout=240)[0]
    last = output.strip().splitlines()[-1]
    assert process.returncode == 1, output[-3000:]
    assert "Traceback" not in output
    assert "error: training reached step 12 of 12, but not all is written: " in last
    for name in ("checkpoints", "metrics.jsonl", "evaluations.json", "summary.json"):
        assert name in last
    filler.unlink()
    assert run_command(main, [str(tmp_path / "tiny.yaml"), *OVERRIDES]) == 0
    assert losses(run_dir)[0] == list(range(1, 13))
    assert sorted(read_evaluations(run_dir)) == [6, 12]
    assert final_state(run_dir)["step"] == 12


def test_start_that_was_killed_before_its_configuration_was_written(write_config: WRITE, tmp_path: Path) -> None:
    config, run_dir = write_config(), tmp_path / "runs" / "tiny"
    for operation in (2, 6, 12):  # making the lock; naming what records the launch; naming config.yaml
        fault = {"kind": "kill", "operation": operation, "folder": str(run_dir)}
        code, output = run(["-m", FAULTS, str(config), "train.steps=2"], AVSF_FAULT=json.dumps(fault))
        assert code == -9, output[-2000:]
        assert not (run_dir / "config.yaml").exists()
    assert run_command(main, [str(config), "train.steps=2"]) == 0
    assert losses(run_dir)[0] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_files_that_a_power_cut_tore_are_named_and_rebuilt(
    write_config: WRITE, tmp_path: Path, content: bytes, caplog: Any
) -> None:
    overrides = ["train.steps=4", "eval.interval_steps=2"]
    config, run_dir = write_config(), tmp_path / "runs" / "tiny"
    assert run_command(main, [str(config), *overrides]) == 0
    evaluations, text = read_evaluations(run_dir), (run_dir / "config.yaml").read_text()
    for name in ("config.yaml", "evaluations.json", "summary.json"):
        (run_dir / name).write_bytes(content)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    assert run_command(main, [str(config), *overrides]) == 0
    assert read_evaluations(run_dir) == evaluations
    assert (run_dir / "config.yaml").read_text() == text
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    for name in ("config.yaml", "evaluations.json", "summary.json"):
        assert re.search(rf"{re.escape(str(run_dir / name))} is (torn|damaged)", caplog.text)
    (run_dir / "config.yaml").write_bytes(content)
    assert run_command(main, [str(config), *overrides, "optim.lr=0.5"]) == 2  # still held to what it was trained with


def test_run_folder_deleted_under_the_training_is_made_again(write_config: WRITE, tmp_path: Path) -> None:
    config, run_dir = write_config(), tmp_path / "runs" / "tiny"
    deleted = tmp_path / "deleted"
    hold = json.dumps({"kind": "hold", "files": {"4": str(deleted)}})
    overrides = ["train.steps=12", "checkpoint.interval_steps=10"]
    process = start(["-m", FAULTS, str(config), *overrides], AVSF_FAULT=hold)
    wait_for_step(process, run_dir, 4)
    shutil.rmtree(run_dir)
    deleted.touch()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    assert f"run folder {run_dir} was deleted or moved under the running training" in output
    assert losses(run_dir)[0] == list(range(1, 13))
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "environment.txt", "log.txt", "summary.json", "plots", ".lock", "per_class.csv"}
    assert "step 12/12" in (run_dir / "log.txt").read_text()
    assert final_state(run_dir)["step"] == 12


def test_what_fails_at_the_end_hides_neither_the_cause_nor_the_end(
    write_config: WRITE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from experiments.engine import learner, reporter, run_data

    original = run_data.RunData.batches

    def failing(self: Any, first: int) -> Any:
        for step, batch in enumerate(original(self, first)):
            if step == 3:
                raise ValueError("the first cause")
            yield batch

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("another failure")

    monkeypatch.setattr(run_data.RunData, "batches", failing)
    for module, name in ((reporter, "draw_curves"), (reporter, "write_summary"), (learner.Learner, "close")):
        monkeypatch.setattr(module, name, broken)
    assert run_command(main, [str(write_config())]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert captured[-1] == "error: the first cause"
    assert sum("besides, at the end of the run: RuntimeError: another failure" in line for line in captured) >= 2
    ends = [event["end"] for _, event in read_events(tmp_path / "runs" / "tiny" / "metrics.jsonl") if "end" in event]
    assert ends == ["FAILED"]


def test_storage_that_fails_for_moments_changes_nothing(write_config: WRITE, tmp_path: Path) -> None:
    overrides = ["train.steps=6", "data.decoder=dali"]
    assert run_command(main, [str(write_config("whole")), *overrides]) == 0
    fault = json.dumps({"kind": "hiccup", "every": 9})
    code, output = run(["-m", FAULTS, str(write_config()), *overrides], AVSF_FAULT=fault)
    assert code == 0, output[-3000:]
    for name in ("Input/output error", "Stale file handle", "Connection timed out"):
        assert f"{name}: " in output  # with the file
    assert "tried again in 0.05 s" in output
    whole, run_dir = tmp_path / "runs" / "whole", tmp_path / "runs" / "tiny"
    assert losses(run_dir) == losses(whole)
    assert digest(final_state(run_dir)) == digest(final_state(whole))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["clips_substituted"], summary["quarantined"]) == (0, [])


def test_read_that_never_returns_is_named_with_file_and_byte(write_config: WRITE, tmp_path: Path) -> None:
    overrides = ["train.steps=6", "data.decoder=dali", "data.clip_deadline_s=2"]
    began = time.monotonic()
    fault = json.dumps({"kind": "hang", "read": 50})
    code, output = run(["-m", FAULTS, str(write_config()), *overrides], AVSF_FAULT=fault)
    assert code == 1, output[-3000:]
    last = output.strip().splitlines()[-1]
    assert re.search(
        r"error: read of \S+/shards/\S+ at byte \d+ has not returned for \d+ s; .*data.clip_deadline_s", last
    )
    assert "Traceback" not in output
    assert time.monotonic() - began < 120
    ends = [event["end"] for _, event in read_events(tmp_path / "runs" / "tiny" / "metrics.jsonl") if "end" in event]
    assert ends == ["FAILED"]
