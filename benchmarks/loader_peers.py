"""This project's loader against those that people use today: `python -m benchmarks.loader --peers [--quick]`.

Every loader gives the same clips from the same videos (340x256, 10 s, H.264 with key frames every 250 and every 12
frames, about 450 kbit/s the former): 32 frames at stride 2 from a random start, scale jitter, crop 224, mirror,
normalised, and 80x128 log-mel, in batches of 8. Frames carry their number and the sound clicks: what every loader gives
is read back and checked before it is timed. Each runs in a process of its own, one after another, interleaved repeats;
medians count. Clips a CPU second (whole process tree) say more than clips a second on a machine with other work.

`make peers` installs the others; one that is not there is a row that says so. Rows go to --out and a plot beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kernel_timing import check_out
from benchmarks.loader_clips import GOPS, kbit_per_s, make_videos
from benchmarks.peer_environment import default_folder, environment_of, python_of
from benchmarks.peers.measure import PROJECT, WAYS
from benchmarks.peers.project import worker_key
from benchmarks.peers.pyav_ways import decoded_by_pyslowfast, decoded_to_last
from benchmarks.result_rows import RESULTS, append_rows, given_arguments, provenance
from pipeline.frames.build import library_path, library_problem

ROOT = Path(__file__).resolve().parents[1]
PYSLOWFAST, TORCHCODEC = "PyAV + DataLoader, as PySlowFast", "torchcodec in threads, tuned"
STORE, ORIGINALS, SHORT = "store", f"files, GOP {GOPS[0]}", f"files, GOP {GOPS[1]}"
QUICK_WAYS = (PYSLOWFAST, "PyAV + DataLoader, tuned", TORCHCODEC)
FIGURES = ("clips_per_s", "cpu_s_per_clip", "peak_rss_mib", "bytes_per_clip", "first_batch_s", "click_error_ms")
STORE_GOP = 12
# What the project is held to: its arm, the arm it is compared with, the ratio of clips a CPU second it must reach.
GOALS = (
    ((PROJECT, STORE), (PYSLOWFAST, ORIGINALS), 6.0),
    ((PROJECT, STORE), (TORCHCODEC, SHORT), 1.8),
    ((PROJECT, ORIGINALS), (TORCHCODEC, ORIGINALS), 1.3),
    ((PROJECT, SHORT), (TORCHCODEC, SHORT), 1.3),
)


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


def make_store(folder: Path, videos: Path) -> Path:
    """Ingest the originals with the defaults of the command; returns the store."""
    out = folder / "store"
    if not out.exists():
        command = [sys.executable, "-m", "experiments.prepare", "folder", "--videos", str(videos), "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def arms_of(folder: Path, count: int, ways: Sequence[str], scaling: Sequence[int]) -> list[Arm]:
    """Make the videos and the store, and list what is compared.

    Args:
        folder: of the material. count: videos. ways: other loaders. scaling: numbers of the project's workers.
    """
    folders = make_videos(folder, count)
    files = {ORIGINALS: folders[GOPS[0]], SHORT: folders[GOPS[1]]}
    store = make_store(folder, folders[GOPS[0]])
    arms = [Arm(PROJECT, STORE, store), *(Arm(PROJECT, name, path) for name, path in files.items())]
    arms += [Arm(way, name, path) for way in ways for name, path in files.items()]
    if key := worker_key():
        arms += [Arm(PROJECT, f"{STORE}, {number} workers", store, {key: number}) for number in scaling]
    return arms


def run_arm(arm: Arm, run: Run, seed: int) -> dict[str, Any]:
    """Run one arm in a process of its own; returns its figures, or "failed"."""
    peers = default_folder()
    own = arm.loader == PROJECT
    if not own and not python_of(peers).exists():
        return {"failed": f"not installed: {peers.name} is missing; run make peers"}
    python = sys.executable if own else str(python_of(peers))
    command = [python, "-m", "benchmarks.peers.measure", arm.loader, str(arm.folder), "--seed", str(seed)]
    command += ["--clips", str(run.clips), "--workers", str(run.workers), "--seconds", str(run.seconds)]
    command += ["--keys", json.dumps(arm.keys)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment_of(peers) | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    peak, done = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done), daemon=True)
    watcher.start()
    try:
        out, err = process.communicate(timeout=run.limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return {"failed": f"not done within {run.limit_s:g} s"}
    finally:
        done.set()
        watcher.join()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        last = (err.strip().splitlines() or ["nothing printed"])[-1]
        return {"failed": f"ended with {process.returncode}: {last[:300]}"}
    row: dict[str, Any] = json.loads(lines[-1])
    return row if "failed" in row else row | {"peak_rss_mib": round(peak[0])}


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


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with the ratio that was measured, of clips a CPU second; None where an arm has no figure."""
    cpu = {(row["loader"], row["source"]): row.get("cpu_s_per_clip") for row in rows}
    found = []
    for ours, other, wanted in GOALS:
        mine, theirs = cpu.get(ours), cpu.get(other)
        ratio = round(theirs / mine, 2) if mine and theirs else None
        found.append({"ours": list(ours), "other": list(other), "at_least": wanted, "ratio": ratio})
    return found


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


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of clips a CPU second, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = sorted((row for row in rows if "failed" not in row), key=lambda row: -row["cpu_s_per_clip"])
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(good) + 1))
    colours = ["#1f6f8b" if row["loader"] == PROJECT else "#b8b8b8" for row in good]
    names = [f"{row['loader']} ({row['source']})" for row in good]
    bars = axes.barh(names, [1 / row["cpu_s_per_clip"] for row in good], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xlabel("clips a CPU second, whole process tree")
    axes.tick_params(axis="y", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(arms: Sequence[Arm], run: Run) -> list[dict[str, Any]]:
    """Run every arm `repeats` times, in turn."""
    runs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for repeat in range(run.repeats):
        for place, arm in enumerate(arms):
            if runs[place] and "failed" in runs[place][-1]:
                continue  # what failed once is not waited for again
            runs[place].append(run_arm(arm, run, seed=repeat))
            if repeat == run.repeats - 1:
                sys.stdout.write(line(combined(arm, runs[place])) + "\n")
                sys.stdout.flush()
    return [combined(arm, runs[place]) for place, arm in enumerate(arms)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: the arms of the goals, once")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--clips", type=int, default=8, help="of a batch")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of every loader")
    parser.add_argument("--scaling", type=int, nargs="*", default=[1, 2, 4], help="also so many workers of the project")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed, of one run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit-seconds", type=float, default=100.0, help="of one run, all in all")
    parser.add_argument("--keep", type=Path, help="folder of the material; default: a temporary one")
    parser.add_argument("--out", type=Path, help=f"JSON file to append to, such as {RESULTS.name}/loader_peers.json")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        for name in ("videos", "clips", "workers", "repeats", "seconds"):
            if getattr(options, name) <= 0:
                raise ValueError(f"--{name} ({getattr(options, name)}) must be greater than 0")
    except ValueError as problem:
        parser.error(str(problem))
    quick = options.quick
    run = Run(options.clips, options.workers, 2.0 if quick else options.seconds, 1 if quick else options.repeats,
              options.limit_seconds)  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        began = time.monotonic()
        if missing := library_problem(library_path()):
            sys.stdout.write(f"warning: this project's rows are not its best: {missing}\n")
        ways, scaling = (QUICK_WAYS, []) if quick else (list(WAYS), options.scaling)
        arms = arms_of(folder, 4 if quick else options.videos, ways, scaling)
        rates = {f"gop{gop}": round(kbit_per_s(folder / f"gop{gop}")) for gop in GOPS}
        sys.stdout.write(f"material in {time.monotonic() - began:.0f} s, kbit/s: {rates}\n")
        rows = measure(arms, run)
    found = goals(rows)
    for goal in found:
        ratio = "unmeasured" if goal["ratio"] is None else f"{goal['ratio']:.2f}x"
        sys.stdout.write(f"{' on '.join(goal['ours'])} over {' on '.join(goal['other'])}: {ratio}, "
                         f"wanted {goal['at_least']:g}x\n")  # fmt: skip
    if options.out is not None:
        common = {"benchmark": "loader peers", "settings": vars(run) | {"kbit_per_s": rates}}
        source = provenance("benchmarks.loader", "cpu", ["--peers", *given_arguments(arguments)])
        goal_row = {"goals": found}
        append_rows(options.out, [common | row | source for row in [*rows, goal_row]])
        plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
