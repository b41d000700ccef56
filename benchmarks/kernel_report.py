"""Whether the fused operations are right on a GPU; how fast they are there is for `benchmarks.fusion` to say.

`python -m benchmarks.kernel_report --sanitizer memcheck --limit-s 300 --out FILE` runs the operations' tests under
compute-sanitizer.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.build import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error)")
PROGRESS = re.compile(r"[.sxX]+( *\[ *\d+%\])?")  # of tests that passed or were left out
TIMED_OUT = 124  # exit code of `run_bounded`


def cuda_correctness(
    *, sanitizer: str | None = None, timeout_s: float = 1800, tests: tuple[str, ...] = ("tests/kernels",)
) -> dict[str, Any]:
    """Run CUDA tests of the fused operations in processes of their own, for a bounded time.

    Args:
        sanitizer: a tool of compute-sanitizer ("memcheck", "racecheck") to run under, or None.
        timeout_s: limit in seconds; the tests still running then are ended.
        tests: files or folders of tests, by default all of the fused operations.

    Returns:
        counts by outcome, `ok` (some passed, none failed, none skipped, exit code 0; 124: out of time) and the
        output's last lines; with a sanitizer that is not installed `ok` is None and `tail` says so.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_cuda and not slow", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"AVSF_REQUIRE_CUDA": "1"}
    if sanitizer is not None:
        tool = find_sanitizer()
        if tool is None:
            line = f"{sanitizer}: compute-sanitizer is not installed; it comes with the CUDA toolkit"
            return {"ok": None, "exit_code": None, "counts": {}, "tail": [line], "sanitizer": sanitizer}
        # Our kernels only (their names hold the namespace): with torch's as well a test takes 15 s.
        filters = ["--kernel-name", "kernel_substring=avsf"]
        command = [tool, "--tool", sanitizer, "--error-exitcode", "9", *filters, *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every tensor has borders of its own
    code, output = run_bounded(command, timeout_s, environment)
    lines = output.strip().splitlines()
    if code == TIMED_OUT and sanitizer is not None:
        passed = sum(line.count(".") for line in lines if PROGRESS.fullmatch(line))
        lines.append(f"{passed} tests without a finding until the time was over")
    counts = {name: int(count) for count, name in SUMMARY.findall("\n".join(lines[-3:]))}
    ok = code == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped", 0)
    return {"ok": ok, "exit_code": code, "counts": counts, "tail": lines[-15:], "sanitizer": sanitizer}


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path or beside nvcc; None where there is none."""
    nvcc = find_nvcc()
    places = [nvcc.resolve().parent, nvcc.resolve().parent.parent / "compute-sanitizer"] if nvcc else []
    found = (shutil.which("compute-sanitizer", path=str(place)) for place in places)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def run_bounded(
    command: list[str], timeout_s: float, environment: Mapping[str, str], *, grace_s: float = 0.0
) -> tuple[int, str]:
    """Run a command and whatever it starts; all of it is ended when the time is over.

    Args:
        command: argument list.
        timeout_s: limit in seconds.
        environment: of the process.
        grace_s: seconds that it gets to end by itself, told by SIGTERM, once the time is over.

    Returns:
        exit code (124: out of time, and not ended by itself) and its output, errors included. It goes through a file: a
        pipe would stay open as long as a process that the command left behind.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = _told_to_stop(process, grace_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _told_to_stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Tell a process to stop and wait for it; its exit code, or 124."""
    if grace_s <= 0:
        return 124
    process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        return 124


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 1 when a test failed or the time was over, 0 otherwise, also without the tool."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sanitizer", choices=["memcheck", "racecheck"], help="default: without")
    parser.add_argument("--limit-s", type=float, default=1800, help="time limit in seconds")
    parser.add_argument("--tests", nargs="+", default=["tests/kernels"], help="files or folders of tests")
    parser.add_argument("--out", type=Path, help="JSON file; default standard output")
    args = parser.parse_args(arguments)
    result = cuda_correctness(sanitizer=args.sanitizer, timeout_s=args.limit_s, tests=tuple(args.tests))
    text = json.dumps(result, indent=1) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text)
    return 1 if result["ok"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
