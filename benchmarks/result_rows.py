"""Result files: JSON with rows that are added to and never overwritten; each row says where it comes from."""

import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_timing import check_out, machine, write_whole

RESULTS = Path(__file__).resolve().parent / "results"
COMMIT_VARIABLE = "AVSF_COMMIT"  # the commit of a copy without .git


@functools.cache
def commit() -> str:
    """Commit of the code: `AVSF_COMMIT`, else git's, "+" behind it with uncommitted changes, else "unknown"."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        """Return the output of a git command."""
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cu", "*.cuh", "*.cpp", "*.h")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(module: str, device: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Where a row comes from.

    Args:
        module: the benchmark, such as "benchmarks.step".
        device: "cpu" or "cuda".
        arguments: of its command line.

    Returns:
        machine (hardware, versions, date), commit and command.
    """
    command = shlex.join(["python", "-m", module, *arguments])
    return {"machine": machine(device), "commit": commit(), "command": command}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file; none where there is no file.

    Raises:
        ValueError: a file of another form.
    """
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError(f"{path} must hold an object with a list of rows; give another file, this one is not touched")
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file; whoever reads it meanwhile finds one whole version.

    Args:
        path: made if missing; its folder must exist.
        rows: ready for JSON.

    Raises:
        ValueError: a file of another form (it stays as it is), or one that cannot be written.
    """
    check_out(path)
    write_whole(path, {"rows": [*read_rows(path), *rows]})


def put_rows(path: Path, rows: Sequence[dict[str, Any]], run: str) -> None:
    """Add the rows of a run, in place of those that it had added before; the file is whole at any time.

    Args:
        path: made if missing; its folder must exist.
        rows: ready for JSON, each with `run` under "run".
        run: what tells it from every other run.

    Raises:
        ValueError: a file of another form (it stays as it is), or one that cannot be written.
    """
    check_out(path)
    write_whole(path, {"rows": [*(row for row in read_rows(path) if row.get("run") != run), *rows]})


def tell_rows(
    rows: Iterable[dict[str, Any]], out: Path | None, common: dict[str, Any], source: dict[str, Any]
) -> list[dict[str, Any]]:
    """Print rows as they are measured, and add each to a result file at once: what is measured stays.

    Args:
        rows: ready for JSON.
        out: the file; None: none.
        common: put before each row there. source: `provenance`, put behind it.

    Returns:
        the rows.
    """
    told = []
    for row in rows:
        print(json.dumps(row), flush=True)
        if out is not None:
            append_rows(out, [common | row | source])
        told.append(row)
    return told


def given_arguments(arguments: Sequence[str] | None) -> list[str]:
    """Arguments of the present command line."""
    return list(sys.argv[1:] if arguments is None else arguments)
