"""What only a GPU can show, in bounded parts: `make gpu-report` or `python -m benchmarks.gpu_report --only PART ...`.

Correctness comes first (tests marked needs_cuda), then rates, the training step against its opponents, where its time
goes, inference, the sanitizer, loading and training. Each part is a process of its own under a limit of at most 100 s;
one that fails or runs out of time is reported with what it had measured, and the rest goes on. `--visit` runs a list
of parts within a total limit; `--list` names parts and visits. Rows are appended to gpu-<name>-<date>.json under
benchmarks/results/ (or --out-dir) as they come, each with hardware, versions, date, commit and command, and a short
table is printed last.

`--rehearse` runs the same code at toy size on a machine without a GPU: nothing there is a figure.

A host without a package index has no MLflow; benchmarks/gpu_visit.sh takes DALI and PyAV there from a packed folder.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import VISITS, Part, chosen_parts, parts
from benchmarks.kernel_report import run_bounded
from benchmarks.result_rows import RESULTS, append_rows, provenance, read_rows

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 75  # exit code of a training that saved its state because it was told to stop
GRACE_S = 12.0  # between telling a training to stop and ending it
LEAST_S = 8.0  # no part is started with less left


def run_part(part: Part, rows: Path, log: Path, left_s: float, rehearse: bool) -> dict[str, Any]:
    """Run one part within its limit and append what came of it to the rows.

    Args:
        part: what to run.
        rows: file of the report's rows; the part appends its own.
        log: file that its output is appended to.
        left_s: seconds left for the whole report.
        rehearse: toy size, without a GPU.

    Returns:
        the part's row: status, seconds, last line, and the end of its output unless all went well.
    """
    missing = [name for name in part.needs if not _is_there(name)]
    if missing:
        return _report(part, "left out", 0.0, rows, f"{', '.join(missing)}: not here", rehearse)
    if left_s < LEAST_S:
        return _report(part, "not started", 0.0, rows, "the report's time was over", rehearse)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        places = {"{rows}": str(rows), "{json}": str(result), "{runs}": "runs/gpu-report"}
        tail = part.toy if rehearse else part.cuda
        command = [sys.executable, *(places.get(word, word).replace("{runs}", places["{runs}"])
                                     for word in (*part.command, *tail))]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if rehearse else {"AVSF_REQUIRE_CUDA": "1"})
        if "pytest" in part.command:  # many workers: their references on the CPU must not fight for its cores
            environment["OMP_NUM_THREADS"] = "1"
        grace_s = GRACE_S if part.resumes else 0.0
        began = time.monotonic()
        code, output = run_bounded(command, min(part.limit_s, left_s) - grace_s, environment, grace_s=grace_s)
        seconds = round(time.monotonic() - began, 1)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n===== {part.name}: exit code {code}, {seconds} s: {' '.join(command[1:])}\n{output}\n")
        found = _read(result)
        summary = _append_training(part, command, rows, rehearse) if part.resumes and code == 0 else ""
    status = {0: "ok", 124: "timed out"}.get(code, f"failed ({code})")
    if code == -signal.SIGTERM and part.resumes:
        status = "timed out"
    elif code == STOPPED and part.resumes:
        status = "goes on at the next visit"
    line = summary or _last_line("\n".join(found["tail"]) if isinstance(found, dict) and found.get("tail") else output)
    end = output[-3000:] if status != "ok" else ""
    return _report(part, status, seconds, rows, line, rehearse, result=found, output=end)


def _report(
    part: Part, status: str, seconds: float, rows: Path, line: str, rehearse: bool, **more: Any
) -> dict[str, Any]:
    """Append the row of a part."""
    row = {"benchmark": "gpu-report", "part": part.name, "status": status, "seconds": seconds, "line": line, **more}
    row = {name: value for name, value in row.items() if value not in (None, "")}
    words = ["--only", part.name, *(["--rehearse"] if rehearse else [])]
    append_rows(rows, [row | provenance("benchmarks.gpu_report", "cpu" if rehearse else "cuda", words)])
    return row


def _append_training(part: Part, command: Sequence[str], rows: Path, rehearse: bool) -> str:
    """Append what a training that has ended says of itself: clips/s, waits, accuracy; returns it as a line."""
    words = dict(word.split("=", 1) for word in command if "=" in word and not word.startswith("-"))
    folder = Path(words["output_dir"]) / words["name"]
    summary = _read(folder / "summary.json") or {}
    keys = {"steps": "steps", "decoder": "decoder", "data_wait_share": "data_wait_share", "top1": "top1",
            "clips_per_second": "clips_per_s", "wall_time_s": "wall_time_s",}  # fmt: skip
    row = {new: summary[old] for old, new in keys.items() if summary.get(old) is not None} | _over_all(summary)
    if "clips_per_s" not in row:
        return ""
    words_of = ["--only", part.name, *(["--rehearse"] if rehearse else [])]
    source = provenance("benchmarks.gpu_report", "cpu" if rehearse else "cuda", words_of)
    size = {"clips": int(words["train.clips_per_step"])} if "train.clips_per_step" in words else {}
    append_rows(rows, [{"benchmark": "training", "run": part.name, **row, **size} | source])
    accuracy = f", top1 {100 * row['top1']:.1f} %" if "top1" in row else ""
    return f"{row['steps']} steps, {row['clips_per_s']:.0f} clips/s{accuracy}"


def _over_all(summary: dict[str, Any]) -> dict[str, Any]:
    """Speed and wait of a run that several visits made, over all of them: the summary's are its last process's."""
    first, seconds = summary.get("resumed_from_step", 0), summary.get("seconds", {})
    if not first:
        return {}
    timed_s = seconds.get("data", 0.0) + seconds.get("step", 0.0)
    if not timed_s or "timed_clips" not in summary:
        return {"speed_of": f"the last process, from step {first} on"}
    return {
        "clips_per_s": round(summary["timed_clips"] / timed_s, 3),
        "data_wait_share": round(seconds["data"] / timed_s, 4),
        "speed_of": "all processes",
        "clips_per_s_of_last_process": summary.get("clips_per_second"),
    }


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _read(path: Path) -> Any:
    """The result that a part wrote, or None."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # ended while it wrote
        return {"unreadable": str(error)}


def _last_line(output: str) -> str:
    """The last line that says something: pytest's summary where there is one."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip()]
    summaries = [line for line in lines if re.search(r"\d+ (passed|failed|error|selected|tests? collected)", line)]
    return (summaries or lines or [""])[-1][:160]


def summary(done: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The short table: a line for each part, then figures.

    Args:
        done: rows of the parts of this call.
        rows: all rows of this call.
    """
    lines = []
    for row in done:
        lines.append(f"{row['part']:22} {row['status']:12} {row['seconds']:6.1f} s  {row.get('line', '')[:90]}")
    for row in rows:
        if row["benchmark"] == "step" and "ms" in row:
            lines.append(
                f"{row['variant']:20} N={row['clips']:<3} {row['way']:28} {row['audio']:8} {row['ms']:8.2f} ms "
                f"{row['clips_per_s']:7.1f} clips/s, host {row['host_ms']:6.1f} ms, floor {row['floor_ms']:6.1f} ms"
            )
        elif row["benchmark"] == "loader":
            lines.append(
                f"loader {row['codec']} {row['decoder']:6} {row['what']:9} {row['clips_per_second']:8.1f} clips/s, "
                f"workers {row.get('workers', '')}, NVDEC {row.get('nvdec_percent_mean', 0):.0f} %"
            )
        elif row["benchmark"] == "nvdec":
            figures = {k: v for k, v in row.items() if k not in ("benchmark", "what", "machine", "commit", "command")}
            lines.append(f"nvdec {row['what']:6} {', '.join(f'{key} {value}' for key, value in figures.items())}")
        elif row["benchmark"] == "inference":
            lines.append(f"{row['variant']:20} N={row['clips']:<3} {row['way']:28} {row['views_per_s']:8.1f} views/s")
        elif row["benchmark"] == "step profile":
            lines.append(row["text"])
    return "\n".join(lines)


def out_file(folder: Path | None, rehearse: bool) -> Path:
    """The file of this machine's rows of today; a rehearsal's lies in --out-dir, else in the temporary folder."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    if rehearse:
        folder = folder or Path(tempfile.gettempdir())
        return folder / f"rehearsal-{date}.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return (folder or RESULTS) / f"gpu-{name}-{date}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="PART", help="run these parts, in this order")
    which.add_argument("--visit", choices=sorted(VISITS), help="run a list of parts")
    which.add_argument("--list", action="store_true", help="name the parts and the visits")
    parser.add_argument("--limit-s", type=float, default=1740, help="seconds for everything")
    parser.add_argument("--out-dir", type=Path, help="folder of the rows and the log; default benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="the same code at toy size, without a GPU")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 1 when a part failed, 2 without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        lines = [f"{part.name:24} at most {part.limit_s:.0f} s" for part in parts()]
        lines += [f"--visit {name}: {' '.join(names)}" for name, names in VISITS.items()]
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    try:
        chosen = chosen_parts(options.only, options.visit)
    except ValueError as problem:
        parser.error(str(problem))
    if not (options.rehearse or torch.cuda.is_available()):
        sys.stderr.write(
            "error: CUDA devices (0) must be at least 1 for gpu-report; --rehearse runs the same at toy size\n"
        )
        return 2
    if options.out_dir is not None:
        options.out_dir.mkdir(parents=True, exist_ok=True)
    rows = out_file(options.out_dir, options.rehearse)
    log = rows.with_suffix(".log") if options.out_dir or options.rehearse else ROOT / "runs" / "gpu-report.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = len(read_rows(rows))
    deadline = time.monotonic() + options.limit_s
    done = []
    for part in chosen:
        sys.stdout.write(f"{part.name} ...\n")
        sys.stdout.flush()
        done.append(run_part(part, rows, log, deadline - time.monotonic(), options.rehearse))
    sys.stdout.write(f"\n{rows}, torch {torch.__version__}\n{summary(done, read_rows(rows)[before:])}\n")
    fine = ("ok", "left out", "goes on at the next visit")
    return 0 if all(row["status"] in fine for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
