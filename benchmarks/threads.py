"""The quickstart's step on an idle and on a busy machine, by choice of threads: `python -m benchmarks.threads`.

    python -m benchmarks.threads [--seconds 4] [--rounds 4] [--busy 2] [--out benchmarks/results/threads.json]

Each way is a process that has made its first steps and then takes turns with the others: a round is every way with
nothing else running, then every way beside `--busy` endless loops. Who is not at its turn is stopped (SIGSTOP), so that
nothing spins beside it. Clips/s of wall time, medians over the rounds; ratios within one run. CPU only.

    product    what a training does: threads that soon sleep while they wait, runtime.num_threads=0
    product/2  the same with half of the threads, at least one
    torch      torch's own choice of threads and way of waiting
    active     torch's own choice of threads, waiting with OMP_WAIT_POLICY=active
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments import SPIN_TURNS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "experiments" / "configs" / "quickstart.yaml"
WAYS = ("product", "product/2", "torch", "active")
WARM_UP_STEPS = 3


def serve(way: str) -> int:
    """Be one way: make the step, then for each line of input (seconds) take steps that long and answer in JSON.

    Args:
        way: of `WAYS`; its environment is that of `environment_of`.
    """
    import torch  # first: torch's own way of waiting must be set before anything of this project is imported

    if not way.startswith("product"):
        torch.ones(1 << 20).sum()  # its threads are there now
    torchs = torch.get_num_threads()
    from experiments.config import load_config
    from experiments.runtime import choose_num_threads

    config = load_config(CONFIG)
    if way.startswith("product"):
        chosen = choose_num_threads(0, torchs)
        torch.set_num_threads(chosen if way == "product" else max(1, chosen // 2))
    step = make_step(config)
    for _ in range(WARM_UP_STEPS):
        step()
    say({"threads": torch.get_num_threads()})
    for line in sys.stdin:
        say(timed(step, float(line), config.train.clips_per_step))
    return 0


def make_step(config: Any) -> Any:
    """Return a function that takes one training step of a configuration on random clips."""
    import torch

    from experiments.engine.optim import build_optimizer
    from experiments.engine.precision import channels_last
    from experiments.engine.step import StepInputs, TrainingStep, task_loss
    from experiments.tasks import make_task
    from model import build_model

    torch.manual_seed(0)
    model, clips, pixels = (
        channels_last(build_model(config.model)),
        config.train.clips_per_step,
        config.data.crop_size_px,
    )
    task = make_task("classification", tuple(f"class {i}" for i in range(config.model.num_classes)))
    frames = torch.randn(clips, 3, config.model.num_fast_frames, pixels, pixels)
    inputs = StepInputs(
        frames.contiguous(memory_format=torch.channels_last_3d),
        torch.randn(clips, 1, config.model.num_mel_frames, config.model.num_mel_bins),
        None,
        torch.arange(clips) % config.model.num_classes,
    )
    step = TrainingStep(
        model, build_optimizer(model, config.optim), torch.amp.GradScaler("cpu", enabled=False), task_loss(task),
        lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    return lambda: step(inputs, drop_audio=False)


def timed(step: Any, seconds: float, clips: int) -> dict[str, float]:
    """Take steps for some seconds; returns clips/s, and the fastest and slowest step in seconds."""
    found: list[float] = []
    began = time.perf_counter()
    while not found or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return {"clips_per_s": clips * len(found) / sum(found), "fastest_s": min(found), "slowest_s": max(found)}


def say(found: dict[str, Any]) -> None:
    """Answer the parent."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def environment_of(way: str) -> dict[str, str]:
    """Return the environment of a way: nothing about threads but what the way is."""
    known = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in known}
    if way.startswith("product"):
        return kept | {"GOMP_SPINCOUNT": str(SPIN_TURNS)}  # here, since `serve` imports torch first
    return kept | ({"OMP_WAIT_POLICY": "active"} if way == "active" else {})


class Way:
    """A process that takes steps at its turn, and is stopped otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.threads", "--serve", name]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment_of(name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.threads = int(self._answer()["threads"])
        self._process.send_signal(signal.SIGSTOP)
        self.found: dict[str, list[dict[str, float]]] = {}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"way {self.name!r} ended with exit code {self._process.wait()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found

    def measure(self, seconds: float, load: str) -> None:
        """Take steps for some seconds and keep what comes of it."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self.found.setdefault(load, []).append(self._answer())
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep CPUs busy with endless loops of their own processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(names: Sequence[str], seconds: float, rounds: int, busy: int) -> list[dict[str, Any]]:
    """Return a row for each way and load.

    Args:
        names: of `WAYS`. seconds: of one turn. rounds: turns of each way and load. busy: endless loops.
    """
    ways: list[Way] = []
    loaded = f"{busy} busy loops"
    try:
        for name in names:
            ways.append(Way(name))
        for number in range(rounds):
            turns = ways if number % 2 == 0 else ways[::-1]
            for way in turns:
                way.measure(seconds, "idle")
            with busy_loops(busy):
                for way in turns:
                    way.measure(seconds, loaded)
    finally:
        for way in ways:
            with suppress(ProcessLookupError):
                way.close()
    return [row for way in ways for row in rows_of(way, ways, ("idle", loaded))]


def rows_of(way: Way, ways: Sequence[Way], loads: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a way: medians, and how many times the speed of torch's own choice."""
    rows = []
    for load in loads:
        speeds = {each.name: statistics.median(f["clips_per_s"] for f in each.found[load]) for each in ways}
        turns = way.found[load]
        spread = max(turn["slowest_s"] for turn in turns) / min(turn["fastest_s"] for turn in turns)
        row: dict[str, Any] = {
            "benchmark": "threads", "way": way.name, "load": load, "threads": way.threads, "rounds": len(turns),
            "clips_per_s": round(speeds[way.name], 2),
            "all_clips_per_s": [round(turn["clips_per_s"], 2) for turn in turns],
            "slowest_over_fastest_step": round(spread, 2),
        }  # fmt: skip
        if "torch" in speeds:
            row["times_torch"] = round(speeds[way.name] / speeds["torch"], 3)
        rows.append(row)
    return rows


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.threads", description="The quickstart's step by choice of threads, idle and busy."
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn (default 4)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each way and load (default 4)")
    parser.add_argument("--busy", type=int, default=2, help="endless loops beside (default 2)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, help="result file that rows are added to")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    if options.seconds <= 0 or options.rounds < 1 or options.busy < 1:
        parser.error("--seconds must be more than 0, --rounds and --busy at least 1")
    from benchmarks.result_rows import append_rows, given_arguments, provenance

    rows = measure(options.ways, options.seconds, options.rounds, options.busy)
    source = provenance("benchmarks.threads", "cpu", given_arguments(None))
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    if options.out is not None:
        append_rows(options.out, [{**row, **source} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
