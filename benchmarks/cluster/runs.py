"""Real steps of 1, 2 and 4 processes on this machine's cores, over gloo: what `benchmarks.scaling --measure` runs.

The quickstart's model trains on random clips, one thread a process. Batches are parts of one batch whatever the number
of processes, so equal totals must end in equal weights. The model is told what one process takes alone, what two take
that train side by side, each for itself (caches and memory are shared, and the slower one of a step counts), what an
exchange takes, and what other programs took of the cores meanwhile; never a training of several processes.
"""

import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.cluster.inputs import MODEL
from benchmarks.cluster.model import RankCost, rank_step_ms
from benchmarks.stages.measure import waited_s
from experiments.config import Config, load_config, resolved_yaml
from experiments.engine.data import random_batch
from experiments.engine.learner import Learner
from experiments.records.checkpoint import save_checkpoint
from experiments.records.state import state_bytes
from experiments.runtime import Runtime, init_runtime, shut_down
from experiments.tasks import make_task
from model.avslowfast import build_model
from model.variants import VARIANTS
from pipeline.batch import Batch
from pipeline.workers.machine import usable_cpus

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "experiments" / "configs" / "quickstart.yaml"
GROUP = 8  # clips of a BN group: parts of a batch are multiples of it, so that equal totals are equal arithmetic
CASES = ((1, GROUP), (1, 2 * GROUP), (1, 4 * GROUP), (2, GROUP), (2, 2 * GROUP), (4, GROUP))  # processes, clips of each
SMALL_BYTES = 4096  # of the exchanges beside the gradients: pooled statistics
WARM_UP = 3
SAVES = 3
BUSY_CORES = 0.3  # that others take, from which the wall time of a run is not judged, but its CPU time
_TICKS_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Job:
    """What the processes do.

    Args:
        ranks: processes.
        clips: of each in a step; 0 = only exchanges.
        steps: timed, after three that are not.
        pixels: H = W.
        weights: file for the weights at the end, or "".
        together: one training; otherwise each process trains for itself beside the others.
    """

    ranks: int
    clips: int
    steps: int
    pixels: int = 48
    weights: str = ""
    together: bool = True


def config_of(job: Job) -> Config:
    """Return the configuration of a job."""
    return load_config(
        CONFIG,
        [f"train.clips_per_step={max(1, job.clips) * job.ranks}", "model.drop_pathway_rate=0.0", "runtime.device=cpu",
         "runtime.num_threads=1", f"data.crop_size_px={job.pixels}", f"data.jitter_min_px={job.pixels}",
         f"data.jitter_max_px={job.pixels + 8}", f"views.crop_size_px={job.pixels}", "optim.warmup_steps=0"],
    )  # fmt: skip


def part(batch: Batch, first: int, count: int) -> Batch:
    """Return some clips of a batch."""
    cut = slice(first, first + count)
    return replace(batch, **{name: value[cut] for name, value in vars(batch).items() if value is not None})


def rank_main(job: Job) -> dict[str, Any]:
    """Take the steps of this process; returns rank 0's row, of all ranks."""
    config = config_of(job)
    runtime = init_runtime(config.runtime)
    try:
        if job.clips == 0:
            return _exchanges(job, runtime)
        return _steps(job, config, runtime) if job.together else _beside(job, config, runtime)
    finally:
        shut_down(runtime)


def _learner(config: Config, runtime: Runtime) -> Learner:
    task = make_task(config.train.task, tuple(map(str, range(config.model.num_classes))))
    learner = Learner(config, runtime, task, 1000, fresh=True)
    learner.prepare()
    return learner


def _take(learner: Learner, batch: Batch, steps: Iterable[int]) -> list[float]:
    """Take steps; returns the seconds of each."""
    walls = []
    for step in steps:
        began = time.perf_counter()
        drop = learner.begin_step(step)
        learner.take_step(learner.inputs(batch), drop_audio=drop)
        learner.statistics.synchronize()
        walls.append(time.perf_counter() - began)
    return walls


def _beside(job: Job, config: Config, runtime: Runtime) -> dict[str, Any]:
    """Milliseconds of a step where every process trains for itself: what sharing caches and memory costs."""
    own = Runtime(0, 1, 0, runtime.device)
    learner, batch = _learner(config, own), random_batch(config, own, job.clips)
    _take(learner, batch, range(WARM_UP))
    dist.barrier()
    start = time.process_time()
    walls = _take(learner, batch, range(WARM_UP, WARM_UP + job.steps))
    times = torch.tensor([1e3 * (time.process_time() - start) / job.steps, *(1e3 * s for s in walls)])
    every = [torch.empty_like(times) for _ in range(job.ranks)]
    dist.all_gather(every, times)
    table = torch.stack(every)
    steps = table[:, 1:]
    return {
        "cpu_ms": float(table[:, 0].mean()), "mean_ms": float(steps.mean()), "slowest_ms": float(steps.amax(0).mean())
    }  # fmt: skip


def _steps(job: Job, config: Config, runtime: Runtime) -> dict[str, Any]:
    learner = _learner(config, runtime)
    whole = random_batch(config, Runtime(0, 1, 0, runtime.device), job.clips * job.ranks)
    batch = part(whole, runtime.rank * job.clips, job.clips)
    _take(learner, batch, range(WARM_UP))
    start = _Clock()
    walls = _take(learner, batch, range(WARM_UP, WARM_UP + job.steps))
    found = start.read(runtime, job.steps)
    everything = b"".join(t.numpy().tobytes() for t in learner.model.state_dict().values())
    digest = torch.frombuffer(bytearray(hashlib.sha256(everything).digest()), dtype=torch.uint8).clone()
    if runtime.world_size > 1:
        least, most = digest.clone(), digest.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found["ranks_equal"] = bool(torch.equal(least, most))
    if job.weights and runtime.is_main:
        np.save(job.weights, torch.cat([p.detach().reshape(-1) for p in learner.model.parameters()]).numpy())
    size = 4 * sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    return {**found, **_quantiles(walls), "gradient_bytes": size}


def _exchanges(job: Job, runtime: Runtime) -> dict[str, Any]:
    """CPU and wall milliseconds of a rank in an exchange of few bytes, and in one of the gradients' size."""
    config = config_of(job)
    size = sum(p.numel() for p in build_model(config.model).parameters())
    found: dict[str, Any] = {"gradient_bytes": 4 * size}
    for name, count in (("small", SMALL_BYTES // 4), ("large", size)):
        value = torch.zeros(count)
        for number in range(WARM_UP + job.steps):
            if number == WARM_UP:
                began, wall = time.process_time(), time.perf_counter()
            dist.all_reduce(value)
        found[f"{name}_ms"] = (time.process_time() - began) * 1e3 / job.steps
        found[f"{name}_wall_ms"] = (time.perf_counter() - wall) * 1e3 / job.steps
    return found


class _Clock:
    """Wall and CPU time from its making on, and what others took of the cores."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._busy = time.perf_counter(), time.process_time(), busy_s()

    def read(self, runtime: Runtime, steps: int) -> dict[str, float]:
        """CPU milliseconds of a rank's step, and cores that other programs kept busy."""
        wall, own, busy = time.perf_counter() - self._wall, time.process_time() - self._cpu, busy_s() - self._busy
        total = torch.tensor(own, dtype=torch.float64)
        if runtime.world_size > 1:
            dist.all_reduce(total)
        mine = float(total)
        return {"cpu_ms": mine * 1e3 / steps / runtime.world_size, "foreign_cores": max(0.0, (busy - mine) / wall)}


def busy_s() -> float:
    """Seconds that all cores of the machine have worked so far; 0 where the kernel does not say."""
    try:
        user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft) / _TICKS_HZ


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e3 * s for s in seconds)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "quarter_ms": round(ordered[len(ordered) // 4], 3),
        "mean_ms": round(statistics.fmean(ordered), 3),
    }


def run(job: Job, timeout_s: float = 300) -> dict[str, Any]:
    """Run the processes of a job; returns rank 0's row.

    Raises:
        RuntimeError: a process that failed, with the end of what it said.
        TimeoutError: not done in time; the processes are ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.cluster.runs", json.dumps(asdict(job))]
    common = {"WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(job.ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{job.ranks} processes of {job.clips} clips were not done in {timeout_s:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {job.ranks} ended with {process.returncode}: {output[-2000:]}")
    row: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return row


def measure(steps: int, pixels: int = 48, cases: Sequence[tuple[int, int]] = CASES) -> Iterator[dict[str, Any]]:
    """Run every case and say how far the model of `cluster.model.rank_step_ms` is off.

    Args:
        steps: timed in each case.
        pixels: H = W.
        cases: processes and clips of each; with one process at least two sizes.

    Yields:
        a row a case: ranks, clips, clips_per_s, times, predicted_ms, error, weights_difference to one process.
    """
    alone: dict[int, dict[str, Any]] = {}
    found: list[tuple[int, int, dict[str, Any]]] = []
    exchanged = run(Job(2, 0, max(20, steps), pixels))
    with tempfile.TemporaryDirectory() as folder:
        weights: dict[int, NDArray[np.float32]] = {}
        for ranks, clips in sorted(cases):
            file = f"{folder}/{ranks}-{clips}.npy"
            row = run(Job(ranks, clips, steps, pixels, file))
            total, here = ranks * clips, np.load(file)
            if ranks == 1:
                alone[clips], weights[total] = row, here
            elif total in weights:
                row["weights_difference"] = float(np.abs(here - weights[total]).max())
            found.append((ranks, clips, row))
    beside = {clips: run(Job(2, clips, steps, pixels, together=False)) for clips in (min(alone), max(alone))}
    costs = Costs.of(alone, beside, exchanged)
    for ranks, clips, row in found:
        yield compared(costs, ranks, clips, row)


@dataclass(frozen=True)
class Costs:
    """Costs of a step, each measured without a training of several processes.

    Args:
        alone: CPU time of one process that has the machine for itself.
        wall: wall time of two that train side by side, each for itself, the slower one of each step; and of exchanges.
        cpu: CPU time of the same.
    """

    alone: RankCost
    wall: RankCost
    cpu: RankCost

    @classmethod
    def of(
        cls, alone: dict[int, dict[str, Any]], beside: dict[int, dict[str, Any]], exchanged: dict[str, Any]
    ) -> "Costs":
        """Costs from steps at two sizes and more, and from exchanges between two."""
        return cls(
            _line(alone, "cpu_ms", exchanged, ""),
            _line(beside, "slowest_ms", exchanged, "wall_"),
            _line(beside, "cpu_ms", exchanged, ""),
        )


def _line(rows: dict[int, dict[str, Any]], key: str, exchanged: dict[str, Any], clock: str) -> RankCost:
    low, high = min(rows), max(rows)
    clip_ms = (rows[high][key] - rows[low][key]) / (high - low)
    small, large = exchanged[f"small_{clock}ms"], exchanged[f"large_{clock}ms"]
    size = float(exchanged["gradient_bytes"])
    return RankCost(rows[low][key] - low * clip_ms, clip_ms, 4 * small, max(0.0, large - small) / size, size)


def compared(costs: Costs, ranks: int, clips: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row of a case with what the model says of the mean step, and of a rank's CPU time: others disturb it less."""
    cores = usable_cpus()
    free = max(ranks * 0.25, cores - row["foreign_cores"]) if row["foreign_cores"] < cores else 0.25 * ranks
    wall, cpu = (costs.alone, costs.alone) if ranks == 1 else (costs.wall, costs.cpu)
    predicted, work = rank_step_ms(wall, ranks, clips, free), rank_step_ms(cpu, ranks, clips, float(ranks))
    return {
        "benchmark": "scaling", "ranks": ranks, "clips": clips, "cores": cores, **row,
        "clips_per_s": round(1e3 * ranks * clips / row["mean_ms"], 2),
        "predicted_ms": round(predicted, 3), "error": round(predicted / row["mean_ms"] - 1, 4),
        "predicted_cpu_ms": round(work, 3), "cpu_error": round(work / row["cpu_ms"] - 1, 4),
    }  # fmt: skip


def judged_error(row: dict[str, Any]) -> float:
    """Error of the model by wall time; by CPU time where other programs took more than `BUSY_CORES`."""
    return float(row["cpu_error"] if row["foreign_cores"] > BUSY_CORES else row["error"])


def checkpoint_row(variant: str = MODEL) -> dict[str, Any]:
    """How fast a checkpoint (weights, momentum) is written and read back in the temp folder, less waits for a core."""
    model = build_model(VARIANTS[variant])
    weights = model.state_dict()
    state = {"model": weights, "momentum": {name: torch.rand_like(p) for name, p in model.named_parameters()}}
    size, seconds = state_bytes(state), []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(SAVES):
            began, waited = time.perf_counter(), waited_s()
            save_checkpoint(Path(folder), step, state, resolved_yaml(load_config(CONFIG)), keep=1)
            seconds.append(time.perf_counter() - began - (waited_s() - waited))
    took = statistics.median(seconds)
    return {
        "benchmark": "scaling checkpoint", "variant": variant, "gigabytes": round(size / 1e9, 4),
        "seconds": round(took, 3), "gb_per_s": round(size / 1e9 / took, 4),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(rank_main(Job(**json.loads(sys.argv[1])))))
