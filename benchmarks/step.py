"""Whole training step: `python -m benchmarks.step [--variants small] [--clips 8 32] [--ways fused ...] [--out FILE]`.

One step is forward under autocast, loss, backward and SGD on synthetic inputs, with the audio kept and dropped. On CUDA
cuDNN chooses its algorithms by timing (cudnn.benchmark), once, before anything is timed; a time is the median of steps
between two events, the device idle before each. The opponents are plain PyTorch (`benchmarks.steps.plain_model`):

    pyslowfast                      NCDHW, nn.BatchNorm3d, autocast: as PySlowFast runs it
    eager 5-D, eager 4-D            channels-last, one-frame kernels as 2-D convolutions; BatchNorm3d, or its 4-D view
    eager 4-D graph                 the same captured as one CUDA graph
    compile eager [reduce-overhead] torch.compile of the 5-D one
    fused                           ours, launch by launch
    fused graph                     ours as training runs it: one CUDA graph of the whole step
    fused graph, plain convolutions the same without grouped pixels
    compile fused [reduce-overhead] torch.compile around our operations

Each way has its own time limit (--limit-s); what it did not finish is a row that says so. Rows are appended to the file
as they come. --profile shows where the time of one step goes, by kind of work (`benchmarks.steps.profile`).
"""

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import check_out
from benchmarks.result_rows import append_rows, given_arguments, provenance
from benchmarks.steps.measure import Job
from benchmarks.steps.plain_model import check_plain
from benchmarks.steps.ways import WAYS, ways_here
from kernels.layout import group_count
from kernels.library import fused_devices
from model.variants import VARIANTS

MIN_PX = 32  # res5 still has a pixel
ROOT = Path(__file__).resolve().parents[1]
Record = Callable[[dict[str, Any]], None]


def measure_all(jobs: Sequence[Job], limit_s: float, record: Record) -> list[dict[str, Any]]:
    """Measure jobs in a process of their own, each within its limit.

    Args:
        jobs: in order; those of one process share cuDNN's choices.
        limit_s: of one job, the start of the process left out of later ones.
        record: takes every row as it comes.

    Returns:
        all rows; a job that failed or ran out of time is a row with `failed`.
    """
    rows: list[dict[str, Any]] = []
    left = list(jobs)

    def take(row: dict[str, Any]) -> None:
        """Keep and hand on a row."""
        rows.append(row)
        record(row)

    while left:
        job = left[0]
        for message in _worker(left, limit_s):
            if "begin" in message:
                job = left.pop(0)
            elif "row" in message:
                take(message["row"])
            elif "failed" in message:
                take(failed_row(job, message["failed"]))
                if message.get("over") and job in left:  # it ended before it began its first job
                    left.remove(job)
    return rows


def failed_row(job: Job, reason: str) -> dict[str, Any]:
    """The row of a job without a figure."""
    settings = {name: value for name, value in asdict(job).items() if name not in ("audio", "repeats")}
    return {"benchmark": "step", **settings, "audio": "/".join(job.audio), "failed": reason}


def _worker(jobs: Sequence[Job], limit_s: float) -> Iterator[dict[str, Any]]:
    """Messages of one process; the last one says `over` where it was ended, or ended by itself too early."""
    command = [sys.executable, "-m", "benchmarks.steps.measure", json.dumps([asdict(job) for job in jobs])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        deadline = [time.monotonic() + limit_s]
        for line in _lines(process.stdout.fileno(), deadline):
            if line is None:
                yield {"failed": f"not finished within {limit_s:g} s", "over": True}
                return
            message = _message(line)
            if "end" in message:
                return
            if "begin" in message:
                deadline[0] = time.monotonic() + limit_s
            yield message
        yield {"failed": f"the process ended with exit code {process.wait()}", "over": True}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def _message(line: bytes) -> dict[str, Any]:
    """The message of one line of output; nothing for lines of libraries."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _lines(descriptor: int, deadline: Sequence[float]) -> Iterator[bytes | None]:
    """Lines of a pipe until its end; None, and nothing after it, once the deadline, which may move, is over."""
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline[0] - time.monotonic())):
                yield None
                return
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            *whole, held = (held + chunk).split(b"\n")
            yield from whole


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows for a terminal."""
    head = f"{'variant':22} {'N':>3} {'way':31} {'audio':8} {'ms':>8} {'host ms':>8} {'clips/s':>8} {'TFLOP/s':>8}"
    lines = [f"{head} {'floor ms':>8} {'setup s':>7}"]
    for row in rows:
        start = f"{row['variant']:22} {row['clips']:3d} {row['way']:31} {row['audio']:8}"
        if "failed" in row:
            lines.append(f"{start} {row['failed'][:70]}")
            continue
        lines.append(
            f"{start} {row['ms']:8.2f} {row['host_ms']:8.2f} {row['clips_per_s']:8.1f} {row['tflop_per_s']:8.2f} "
            f"{row['floor_ms']:8.2f} {row['setup_s']:7.1f}"
        )
    return "\n".join(lines)


def check(variants: Sequence[str], device: str, clips: Sequence[int], pixels: int, repeats: int) -> None:
    """Raise ValueError for what no step can be made of.

    Raises:
        ValueError: numbers below their least value, a variant that the plain model does not hold, no such device.
    """
    for name in variants:
        try:
            check_plain(VARIANTS[name])
        except ValueError as error:
            raise ValueError(f"variant ({name}): {error}; take another one, such as small") from None
        for n in clips:
            if n < 1:
                raise ValueError(f"clips ({n}) must be at least 1")
            group_count(n, VARIANTS[name].clips_per_bn_group)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device (cuda) must be there; take --device cpu")
    if repeats < 1:
        raise ValueError(f"repeats ({repeats}) must be at least 1")
    if pixels < MIN_PX:
        raise ValueError(f"pixels ({pixels}) must be at least {MIN_PX}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    default = "avslowfast_r50_4x16" if cuda else "small"
    parser.add_argument("--variants", nargs="+", default=[default], choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--clips", type=int, nargs="+", default=[8])
    parser.add_argument("--pixels", type=int, default=224 if cuda else 64, help="height and width of the input")
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="timed steps at most")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="WAY", help="default: all that run here")
    parser.add_argument("--audio", nargs="+", default=["kept", "dropped"], choices=["kept", "dropped"])
    parser.add_argument("--limit-s", type=float, default=120, help="of one way at one size")
    parser.add_argument("--profile", action="store_true", help="one step of the first way by kind of work")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 1 when one of our own ways has no figure."""
    parser = _parser()
    args = parser.parse_args(arguments)
    source = provenance("benchmarks.step", args.device, given_arguments(arguments))
    try:
        check_out(args.out)
        check(args.variants, args.device, args.clips, args.pixels, args.repeats)
        ways = ways_here(args.device, args.device in fused_devices(), tuple(args.ways or WAYS))
    except ValueError as problem:
        parser.error(str(problem))
    for name in set(args.ways or ()) - set(ways):
        sys.stderr.write(f"{name}: not on this device\n")
    jobs = [
        Job(variant, n, way, args.pixels, args.dtype, args.device, tuple(args.audio), args.repeats)
        for variant in args.variants
        for n in args.clips
        for way in ways
    ]

    def record(row: dict[str, Any]) -> None:
        """Show and append a row."""
        sys.stderr.write(table([row]).splitlines()[1] + "\n")
        if args.out is not None:
            append_rows(args.out, [row | source])

    if args.profile:
        from benchmarks.steps.profile import profile_job

        rows = []
        for job in jobs:
            row = profile_job(job)
            rows.append(row)
            sys.stdout.write(row["text"] + "\n")
            if args.out is not None:
                append_rows(args.out, [row | source])
        return 0
    rows = measure_all(jobs, args.limit_s, record)
    sys.stdout.write(table(rows) + "\n")
    return 1 if any("failed" in row and WAYS[row["way"]].ours for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
