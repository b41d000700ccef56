"""Seeded faults at random places of a training, one and two ranks, with and without restarts: always bitwise the same.

python -m pytest -s -m slow tests/experiments/test_trials.py; AVSF_TRIALS says how many (50), AVSF_TRIALS_OUT names a
file that gets one line a trial.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_events, read_metrics
from tests.experiments.support.processes import FAULTS, digest, final_state, start, torchrun

pytestmark = pytest.mark.slow
STEPS = 14
OVERRIDES = [
    f"train.steps={STEPS}", "train.clips_per_step=8", "checkpoint.interval_steps=3", "eval.interval_steps=7",
    "model.dropout_rate=0.5", "runtime.collective_timeout_s=8",
]  # fmt: skip
OPERATIONS = (60, 160)  # file operations of such a run in rank 0's run folder: fewer and more happen with evaluations
TRIAL_S = 240.0


@dataclass
class Trial:
    """One fault, and what came of it."""

    number: int
    kind: str
    ranks: int
    restarts: int
    rank: int
    place: str  # "step 5" or "operation 37"
    starts: int = 0  # by hand
    struck: bool = False
    equal: bool = False
    new_step_s: float = -1.0  # from the fault to the first step that is new


def draw(number: int) -> Trial:
    """Return a trial as a function of its number."""
    chance = random.Random(1000 + number)
    ranks = chance.choice((1, 2))
    kind = ("kill", "stop", "segv", "raise")[number % 4]
    restarts = 3 if ranks == 2 and chance.random() < 0.5 else 0
    if chance.random() < 0.5:
        return Trial(number, kind, ranks, restarts, chance.randrange(ranks), f"step {chance.randrange(STEPS)}")
    return Trial(number, kind, ranks, restarts, 0, f"operation {chance.randint(1, OPERATIONS[chance.randrange(2)])}")


def new_step_after(run_dir: Path, fault_s: float) -> float:
    """Seconds from a time to the first metric that was recorded after it, -1 if there is none."""
    times = [
        e["time_ms"] / 1000 for _, e in read_events(run_dir / "metrics.jsonl") if "train/loss" in e.get("metrics", {})
    ]
    return min((t - fault_s for t in times if t > fault_s), default=-1.0)


def run_trial(trial: Trial, config: Path, run_dir: Path, marker: Path) -> None:
    """Start the training until it ends in order; a stopped process that nobody watches is killed by hand."""
    name, _, count = trial.place.partition(" ")
    fault = {"kind": trial.kind, "rank": trial.rank, name: int(count), "marker": str(marker), "folder": str(run_dir)}
    launcher = torchrun(trial.ranks, trial.restarts) if trial.ranks > 1 else []
    deadline = time.monotonic() + TRIAL_S
    while trial.starts < 4:
        trial.starts += 1
        process = start([*launcher, "-m", FAULTS, str(config), *OVERRIDES], AVSF_FAULT=json.dumps(fault))
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"stuck: {trial}: {process.communicate()[0][-3000:]}")
            if trial.ranks == 1 and trial.kind == "stop" and is_stopped(process.pid):
                time.sleep(0.5)  # nobody else watches a process that is alone
                process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        output = process.communicate()[0]
        if process.returncode == 0:
            break
        assert trial.starts < 4, f"{trial}: {output[-3000:]}"
    trial.struck = marker.exists()
    if trial.struck:
        trial.new_step_s = new_step_after(run_dir, float(marker.read_text()))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def test_faults_at_random_places_change_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    whole: dict[int, dict[str, Any]] = {}
    fresh_s: dict[int, float] = {}
    for ranks in (1, 2):
        config, began = write_config(f"whole{ranks}"), time.time()
        launcher = torchrun(ranks) if ranks > 1 else []
        process = start([*launcher, "-m", FAULTS, str(config), *OVERRIDES])
        output = process.communicate(timeout=TRIAL_S)[0]
        assert process.returncode == 0, output[-3000:]
        run_dir = tmp_path / "runs" / f"whole{ranks}"
        whole[ranks] = {
            "digest": digest(final_state(run_dir)),
            "losses": read_metrics(run_dir / "metrics.jsonl")["train/loss"],
            "evaluations": read_evaluations(run_dir),
        }
        fresh_s[ranks] = new_step_after(run_dir, began)
    trials, lines = [draw(number) for number in range(int(os.environ.get("AVSF_TRIALS", "50")))], []
    for trial in trials:
        config, run_dir = write_config(f"trial{trial.number}"), tmp_path / "runs" / f"trial{trial.number}"
        run_trial(trial, config, run_dir, tmp_path / f"struck{trial.number}")
        found = {
            "digest": digest(final_state(run_dir)),
            "losses": read_metrics(run_dir / "metrics.jsonl")["train/loss"],
            "evaluations": read_evaluations(run_dir),
        }
        trial.equal = found == whole[trial.ranks]
        lines.append(json.dumps(asdict(trial)))
        if "AVSF_TRIALS_OUT" in os.environ:
            Path(os.environ["AVSF_TRIALS_OUT"]).write_text("\n".join(lines) + "\n")
    struck = [trial for trial in trials if trial.struck]
    times = sorted(trial.new_step_s for trial in struck if trial.new_step_s >= 0)
    print(f"\n{len(trials)} trials, {len(struck)} with the fault reached, {sum(t.equal for t in trials)} bitwise equal")
    print(f"fresh start to first step: {fresh_s[1]:.1f} s (1 rank), {fresh_s[2]:.1f} s (2 ranks)")
    print(f"fault to first new step: median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s")
    assert [trial for trial in trials if not trial.equal] == []
    assert len(struck) >= 0.7 * len(trials)  # a fault that is never reached tries nothing
