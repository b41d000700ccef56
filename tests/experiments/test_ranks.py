"""What one rank does to the others: each end names the rank, its step and its clips, in one line."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.records.spool import read_events, read_metrics
from tests.experiments.support.forked import run_ranks
from tests.experiments.support.processes import FAULTS, agent, run, torchrun

pytestmark = pytest.mark.integration
WRITE = Callable[..., Path]
OVERRIDES = ["train.steps=12", "train.clips_per_step=16", "runtime.collective_timeout_s=6"]
CLIPS = "with the clips train-"


def ends(run_dir: Path) -> list[str]:
    """How the starts of a run ended, by its record."""
    return [event["end"] for _, event in read_events(run_dir / "metrics.jsonl") if "end" in event]


def run_with(config: Path, fault: dict[str, Any], launcher: list[str]) -> tuple[int, str]:
    """Train under torchrun, or its agent with forked ranks, with a fault; returns exit code and output."""
    return run([*launcher, "-m", FAULTS, str(config), *OVERRIDES], AVSF_FAULT=json.dumps(fault))


@pytest.mark.parametrize(
    ("rank", "launcher"), [(1, agent(2)), pytest.param(0, torchrun(2), marks=pytest.mark.slow)], ids=["1", "0"]
)
def test_rank_that_is_stopped_is_named_and_ended(
    write_config: WRITE, tmp_path: Path, rank: int, launcher: list[str]
) -> None:
    marker = tmp_path / "done"
    fault = {"kind": "stop", "rank": rank, "step": 7, "marker": str(marker)}
    code, output = run_with(write_config(), fault, launcher)
    seconds = time.time() - float(marker.read_text())
    assert code == 1
    silent = f"error: rank {rank} gave no sign of life for 6 s (runtime.collective_timeout_s); its last place: step "
    lines = [line for line in output.splitlines() if silent in line]
    assert lines, output[-3000:]
    assert CLIPS in lines[0]  # of the last heartbeat: the step before, where steps are shorter than its interval
    assert "experiments/" not in output.split("Traceback")[-1].split("====")[0]  # torchrun's own is the only one
    assert f"exitcode  : -{signal.SIGKILL:d}" in output  # torchrun, too, blames the rank that was stopped
    assert seconds < 60  # torchrun alone: its timeout, and 30 s for a process that takes no SIGTERM
    print(f"\nrank {rank} was stopped: the launch ended {seconds:.1f} s later at a timeout of 6 s")


def test_rank_that_is_killed_is_named_and_the_end_is_recorded(write_config: WRITE, tmp_path: Path) -> None:
    fault = json.dumps({"kind": "kill", "rank": 1, "step": 7})
    code, output = run_ranks(FAULTS, [str(write_config()), *OVERRIDES], 2, timeout_s=240, AVSF_FAULT=fault)
    assert code == 1
    assert "error: rank 1 (process " in output
    assert "ended without a word" in output
    assert ends(tmp_path / "runs" / "tiny") == ["FAILED"]


@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [(1, agent(1, restarts=8)), pytest.param(2, torchrun(2, restarts=8), marks=pytest.mark.slow)],
    ids=["1", "2"],
)
def test_same_failure_twice_is_not_tried_again(
    write_config: WRITE, tmp_path: Path, ranks: int, launcher: list[str]
) -> None:
    last = ranks - 1
    fault = {"kind": "raise", "rank": last, "step": 7}
    code, output = run_with(write_config(), fault, launcher)
    assert code == 1
    assert output.count(f"rank {last} failed at step 7 with the clips train-") >= 2
    assert f"error: the last two starts ended alike and a third would, too: rank {last} failed at step 7" in output
    # The second start, and the one that says no.
    assert output.count("continuing from step 6 of 12") == 2, output[-4000:]
    run_dir = tmp_path / "runs" / "tiny"
    assert ends(run_dir)[:2] == ["FAILED", "FAILED"]
    assert max(read_metrics(run_dir / "metrics.jsonl")["train/loss"][0]) == 7


SLOW = {  # what is slowed on rank 1 -> what is said of it
    "reads": ({"seconds": 0.3, "where": "read"}, "it waits for data"),
    "forward": ({"seconds": 0.5, "where": "forward"}, "its forward passes take"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW)
def test_rank_that_is_slow_is_named_in_the_log(what: str, write_config: WRITE) -> None:
    fault, said = SLOW[what]
    settings = ["train.steps=8", "train.clips_per_step=8", "train.log_interval_steps=4"]
    settings += ["data.num_workers=0", "runtime.collective_timeout_s=60"]
    command = [*torchrun(2), "-m", FAULTS, str(write_config()), *settings]
    code, output = run(command, AVSF_FAULT=json.dumps({"kind": "slow", "rank": 1, **fault}))
    assert code == 0, output[-3000:]
    lines = [line for line in output.splitlines() if "holds up the others" in line]
    assert f"rank 1 holds up the others: {said}" in lines[0]


def test_store_of_the_ranks_listens_where_the_ranks_meet_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.runtime import _listener

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    listener = _listener("127.0.0.1", 0)
    assert listener is not None
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    assert _listener("192.0.2.1", 0) is None  # of no machine
    monkeypatch.setenv("WORLD_SIZE", "4")  # on two machines: the other one cannot come to this one's loopback
    assert _listener("127.0.0.1", 0) is None
