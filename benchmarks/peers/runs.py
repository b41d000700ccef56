"""Runs of loaders for `benchmarks.peers.compare`: each in a process of its own, in turns, within a time for all.

What is known of an arm is a row after each of its runs, so that a comparison that is cut short has shown what it had.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.clips import GOPS
from benchmarks.peers.environment import default_folder, environment_of, outcome_of, python_of
from benchmarks.peers.measure import PROJECT, WAYS
from benchmarks.peers.pyav_ways import decoded_by_pyslowfast, decoded_to_last

ROOT = Path(__file__).resolve().parents[2]
PYSLOWFAST = "PyAV + DataLoader, as PySlowFast"
STORE, ORIGINALS, SHORT = "store", f"files, GOP {GOPS[0]}", f"files, GOP {GOPS[1]}"
FIGURES = ("clips_per_s", "cpu_s_per_clip", "peak_rss_mib", "bytes_per_clip", "first_batch_s", "click_error_ms")
STORE_GOP = 12
GUESS_S = 20.0  # of a run, before any has been seen
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One loader on one source.

    Args:
        loader: a name of `WAYS`, or `PROJECT`. source: of what. folder: its videos or store. keys: of DataConfig.
    """

    loader: str
    source: str
    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """How arms are run: clips a batch, workers, timed seconds, repeats, and the longest that one run may take."""

    clips: int
    workers: int
    seconds: float
    repeats: int
    limit_s: float


def run_arm(arm: Arm, run: Run, seed: int) -> dict[str, Any]:
    """Run one arm in a process of its own; returns its figures, or "failed"."""
    peers = default_folder()
    own = arm.loader == PROJECT
    if not own and (why := _why_missing(arm.loader, peers)):
        return {"failed": f"not installed: {why}"}
    python = sys.executable if own else str(python_of(peers))
    command = [python, "-m", "benchmarks.peers.measure", arm.loader, str(arm.folder), "--seed", str(seed)]
    command += ["--clips", str(run.clips), "--workers", str(run.workers), "--seconds", str(run.seconds)]
    command += ["--keys", json.dumps(arm.keys)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment_of(peers) | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    peak, done = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done), daemon=True)
    watcher.start()
    try:
        out, err = process.communicate(timeout=run.limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return {"failed": f"not done within {run.limit_s:g} s"}
    except BaseException:  # the comparison is ended: nothing of it runs on
        _end(process)
        raise
    finally:
        done.set()
        watcher.join()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        last = (err.strip().splitlines() or ["nothing printed"])[-1]
        return {"failed": f"ended with {process.returncode}: {last[:300]}"}
    row: dict[str, Any] = json.loads(lines[-1])
    return row if "failed" in row else row | {"peak_rss_mib": round(peak[0])}


def _why_missing(loader: str, peers: Path) -> str:
    """Why a loader was not installed, in the words of pip; empty where it was."""
    if not python_of(peers).exists():
        return f"{peers.name} is missing; run make peers"
    outcome = outcome_of(peers)
    said = (outcome.get(package.partition("-")[0], "ok") for package in WAYS[loader][2])
    return "; ".join(text for text in said if text != "ok")


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _watch(pid: int, peak: list[float], done: threading.Event) -> None:
    """Keep the most memory that a process tree had resident (shared pages count in each process), MiB."""
    while not done.wait(0.2):
        total = 0
        for process in _family(pid):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total / 2**20)


def _end(process: subprocess.Popen[str]) -> None:
    for member in reversed(_family(process.pid)):
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def decoded(arm: Arm, first_frames: Sequence[int]) -> float:
    """Frames decoded for a clip, from the first frames of the checked clips and the distance of key frames."""
    gop = {ORIGINALS: GOPS[0], SHORT: GOPS[1]}.get(arm.source, STORE_GOP)
    count = decoded_by_pyslowfast if arm.loader == PYSLOWFAST else decoded_to_last
    return round(statistics.mean(count(first, gop) for first in first_frames), 1)


def combined(arm: Arm, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the repeats of an arm: medians, and every repeat's CPU seconds."""
    row: dict[str, Any] = {"loader": arm.loader, "source": arm.source, "keys": arm.keys}
    good = [run for run in runs if "failed" not in run]
    if not good:
        return row | {"failed": runs[-1]["failed"]}
    row |= {name: statistics.median(run[name] for run in good) for name in FIGURES}
    row["frames_decoded_per_clip"] = decoded(arm, [n for run in good for n in run["first_frames"]])
    row |= {"checked_clips": sum(len(run["first_frames"]) for run in good), "repeats": len(good)}
    row |= {"cpu_s_per_clip_of_repeats": [run["cpu_s_per_clip"] for run in good], "versions": good[0]["versions"]}
    failures = [run["failed"] for run in runs if "failed" in run]
    return row | ({"failed_repeats": failures} if failures else {})


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    name = f"{row['loader']:34} {row['source']:20}"
    if "failed" in row:
        return f"{name} {row['failed']}"
    return (
        f"{name} {1 / row['cpu_s_per_clip']:6.1f} clips/CPU s {row['clips_per_s']:7.1f} clips/s "
        f"{row['peak_rss_mib']:6.0f} MiB {row['bytes_per_clip'] / 1024:6.0f} KiB/clip "
        f"{row['frames_decoded_per_clip']:6.1f} frames {row['first_batch_s']:6.2f} s to the first batch"
    )


class Turns:
    """Runs arms in turns: every arm once, then every arm again, until all repeats or the time for them is over.

    Args:
        arms: the more important ones first. run: how. seconds: no run is begun that would be done later than that,
            counted from `began`. began: of `time.monotonic()`.

    Attributes:
        rows: one an arm that was run, or that there was no time for, in the order of the arms.
    """

    def __init__(self, arms: Sequence[Arm], run: Run, seconds: float, began: float) -> None:
        self._arms, self._run, self._seconds, self._began = arms, run, seconds, began
        self._runs: list[list[Row]] = [[] for _ in arms]
        self._took_s: list[list[float]] = [[] for _ in arms]

    @property
    def rows(self) -> list[Row]:
        """See the class."""
        return [combined(arm, runs) for arm, runs in zip(self._arms, self._runs, strict=True) if runs]

    def go(self, told: Callable[[str], object]) -> None:
        """Run all; `told` is given a line after each run, when `rows` has it."""
        total = len(self._arms) * self._run.repeats
        for repeat in range(self._run.repeats):
            for place, arm in enumerate(self._arms):
                number = repeat * len(self._arms) + place + 1
                if self._runs[place] and "failed" in self._runs[place][-1]:
                    continue  # what failed once is not waited for again
                if self._is_late(place):
                    if self._runs[place]:
                        continue  # a repeat less
                    late = f"not run: the time for all ({self._seconds / 60:g} minutes) is over; use --only"
                    self._runs[place].append({"failed": late})
                else:
                    began = time.monotonic()
                    self._runs[place].append(run_arm(arm, self._run, seed=repeat))
                    self._took_s[place].append(time.monotonic() - began)
                now_s = time.monotonic() - self._began
                told(f"[{number}/{total}, {now_s:.0f} s] {line(combined(arm, self._runs[place]))}")

    def _is_late(self, place: int) -> bool:
        """Whether a run of an arm would end too late: it takes what it took, or else what the slowest one took."""
        all_s = [taken for arm in self._took_s for taken in arm]
        needed_s = max(self._took_s[place] or all_s or [GUESS_S])
        return time.monotonic() - self._began + needed_s > self._seconds
