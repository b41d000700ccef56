"""Both halves of a GPU report on the fused operations: are they right there, and how fast are they."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error)")


def cuda_correctness(*, sanitizer: str | None = None, timeout_s: float = 1800) -> dict[str, Any]:
    """Run every CUDA test of the fused operations in a process of its own.

    Args:
        sanitizer: a tool of compute-sanitizer ("memcheck", "racecheck") to run under, or None.
        timeout_s: limit in seconds.

    Returns:
        counts by outcome, `ok` (some passed, none failed, none skipped, exit code 0) and the output's last lines.

    Raises:
        ValueError: a sanitizer is asked for but compute-sanitizer is not on the path.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_cuda", "-p", "no:cacheprovider", "tests/kernels"]
    if sanitizer is not None:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise ValueError(
                f"sanitizer {sanitizer!r} needs compute-sanitizer on the path; it comes with the CUDA toolkit"
            )
        command = [tool, "--tool", sanitizer, "--error-exitcode", "9", *command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"AVSF_REQUIRE_CUDA": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    counts = {name: int(count) for count, name in SUMMARY.findall("\n".join(lines[-3:]))}
    ok = done.returncode == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped", 0)
    return {"ok": ok, "exit_code": done.returncode, "counts": counts, "tail": lines[-15:], "sanitizer": sanitizer}


def cuda_fusion(**options: Any) -> dict[str, Any]:
    """Figures of `benchmarks.fusion` on CUDA, ready for JSON.

    Args:
        options: of `benchmarks.fusion.measure`, for example clips=(8, 32) or compiled=("default",).

    Returns:
        what `measure` returns; float16 (cuDNN's normalisation) is measured beside bfloat16 and float32.
    """
    from benchmarks.fusion import measure

    return measure("cuda", **({"dtypes": ("bfloat16", "float16", "float32")} | options))
