"""Timing of operations on the CPU and on CUDA, the copy rate to compare with, and what machine it was."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
_cpu_clock = {"processor": False}


def time_us(function: Callable[[], Any], device: str, *, repeats: int, cold: bool = False) -> float:
    """Median time of a call after three warm-up calls.

    Args:
        function: the work; its result is dropped.
        device: "cpu" (wall clock) or "cuda" (events on the current stream).
        repeats: timed calls, at least 1.
        cold: overwrite a buffer larger than the caches before each call.

    Returns:
        microseconds.
    """
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if cold else None
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        times.append(_one_cuda(function) if device == "cuda" else _one_cpu(function))
    return statistics.median(times)


def _one_cpu(function: Callable[[], Any]) -> float:
    clock = time.process_time if _cpu_clock["processor"] else time.perf_counter
    start = clock()
    function()
    return (clock() - start) * 1e6


def use_processor_time(on: bool) -> None:
    """Time CPU work by the processor time of this process: right on a busy machine, with one thread only.

    Args:
        on: processor time instead of the wall clock.
    """
    _cpu_clock["processor"] = on
    if on:
        torch.set_num_threads(1)


def _one_cuda(function: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def copy_bandwidth(device: str, *, size_mib: int, repeats: int) -> float:
    """Bytes read and written per second by one large `copy_` in this run, in GB/s.

    Args:
        device: "cpu" or "cuda".
        size_mib: size of the source.
        repeats: timed copies.

    Returns:
        GB/s (1e9 bytes), counting the read and the write.
    """
    source = torch.zeros(size_mib << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us(lambda: target.copy_(source), device, repeats=repeats) / 1e3


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and date for a result file.

    Args:
        device: "cpu" or "cuda".

    Returns:
        a JSON-ready dictionary.
    """
    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "cpu_clock": "processor time" if _cpu_clock["processor"] else "wall",
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        info |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def check_out(path: Path | None) -> None:
    """Raise ValueError, before anything is measured, unless a result can be written to `path` (None: nowhere)."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK)):
        raise ValueError(f"--out ({path}) must be a file in a folder that can be written; make the folder first")


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write JSON so that whoever reads the file, at any time, finds one whole version of it.

    Args:
        path: replaced; its folder must exist.
        result: ready for JSON.
    """
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
