"""Measurements of `benchmarks.step` in this process: `python -m benchmarks.steps.measure JOBS` prints one JSON a line.

`benchmarks.step` starts it and watches the clock: a way that takes too long ends this process, and the next one begins
with the way after it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.ops.roofline import Floor, step_floor
from benchmarks.rates import rates
from benchmarks.steps.ways import Inputs, synthetic_batch, trainee
from model.variants import VARIANTS

TIMED_S = 1.5  # for the timed steps of one way and audio


@dataclass(frozen=True)
class Job:
    """One way at one size; `audio`: "kept", "dropped" or both."""

    variant: str
    clips: int
    way: str
    pixels: int
    dtype: str
    device: str
    audio: tuple[str, ...] = ("kept", "dropped")
    repeats: int = 20


def times_ms(step: Callable[[], None], device: str, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step, and of the host's part in it; at most `repeats` steps or `TIMED_S` seconds.

    Args:
        step: warmed up.
        device: "cuda": events around each step, the device idle before it; "cpu": wall clock, host time is all of it.
        repeats: at most; at least 3 are timed.
    """
    whole: list[float] = []
    host: list[float] = []
    began = time.perf_counter()
    while len(whole) < repeats and (len(whole) < 3 or time.perf_counter() - began < TIMED_S):
        if device == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
        start = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        if device == "cuda":
            last.record()
            last.synchronize()
            whole.append(first.elapsed_time(last))
        else:
            whole.append(host[-1])
    return whole, host


@cache
def floor_of(variant: str, clips: int, pixels: int, audio: bool) -> Floor:
    """`step_floor` of a variant."""
    return step_floor(VARIANTS[variant], clips, pixels, audio=audio)


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """Measure one job.

    Args:
        job: what.

    Yields:
        one row for audio kept and one for audio dropped, where the job and the variant have both.
    """
    config = VARIANTS[job.variant]
    limits = rates(job.device)
    frames_dtype = torch.float16 if job.device == "cuda" else torch.float32  # as the loader gives them
    inputs: Inputs = synthetic_batch(config, job.clips, job.pixels, job.device, frames_dtype)
    if job.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with trainee(job.way, config, inputs, getattr(torch, job.dtype)) as made:
        for audio in job.audio if config.has_audio else ("none",):
            step = made.stepper(audio == "kept")
            if job.device == "cuda":
                torch.cuda.synchronize()
            setup_s = time.perf_counter() - began
            whole, host = times_ms(step, job.device, job.repeats)
            yield _row(job, audio, whole, host, setup_s, limits)
            began = time.perf_counter()


def _row(
    job: Job, audio: str, whole: list[float], host: list[float], setup_s: float, limits: dict[str, float]
) -> dict[str, Any]:
    """One row, ready for JSON."""
    ms = statistics.median(whole)
    floor = floor_of(job.variant, job.clips, job.pixels, audio == "kept")
    settings = {name: value for name, value in asdict(job).items() if name not in ("audio", "repeats")}
    return {
        "benchmark": "step",
        **settings,
        "audio": audio,
        "ms": round(ms, 3),
        "ms_least": round(min(whole), 3),
        "host_ms": round(statistics.median(host), 3),
        "clips_per_s": round(1e3 * job.clips / ms, 2),
        "setup_s": round(setup_s, 1),  # build, cuDNN's choice of algorithms, compilation, capture
        "timed_steps": len(whole),
        "cudnn_benchmark": job.device == "cuda",
        "tflop_per_s": round(floor.tflop / ms * 1e3, 3),
        "tflop": round(floor.tflop, 7),
        "least_gigabytes": round(floor.gigabytes, 3),
        "floor_ms": round(floor.milliseconds(limits["copy_gb_per_s"], limits["matrix_tflop_per_s"]), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if job.device == "cuda" else None,
        **limits,
    }


def main() -> None:
    """Measure the jobs of the first argument; every line is a job that begins, a row, or an error."""
    for given in json.loads(sys.argv[1]):
        job = Job(**{**given, "audio": tuple(given["audio"])})
        _say({"begin": given})
        try:
            for row in measure(job):
                _say({"row": row})
        except torch.OutOfMemoryError as error:
            _say({"failed": f"out of memory: {str(error)[:200]}"})
        except Exception as error:  # an opponent's compiler may fail in any way, and costs its own figure only
            _say({"failed": f"{type(error).__name__}: {str(error)[:400]}"})
    _say({"end": True})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write("\n" + json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
