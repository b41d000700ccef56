"""Everything that only a GPU can show, in one bounded run: `make gpu-report` or `python -m benchmarks.gpu_report`.

Correctness first (tests marked needs_cuda, the operations' own also under compute-sanitizer), then figures: copy and
matrix rates, fused ops, training step, decoding and loading, end to end. Each section runs in a process of its own
under a time limit, with whatever it starts; one that fails or is out of time is reported as such, with what it had
measured, and the rest goes on. The whole ends within half an hour, with --short within ten minutes; --only runs
chosen sections, each of them at most six minutes. Writes JSON under benchmarks/results/ and prints a short table.

On a host without a package index call the module itself; beside DALI and PyAV it needs psutil, safetensors, hypothesis
and sortedcontainers, and no MLflow.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_report import run_bounded
from benchmarks.kernel_timing import write_whole

CUDA_TESTS = ("tests/kernels", "tests/model", "tests/pipeline/test_graph.py", "tests/experiments/test_train.py")
# Every kernel in small shapes: compute-sanitizer is 10 to 50 times slower. What the model runs comes first.
SANITIZED = (
    "tests/kernels/test_composites.py",
    "tests/kernels/test_pool.py::test_against_the_definition",
    "tests/kernels/test_ops.py::test_lateral_cat",
    "tests/kernels/test_ops.py::test_frame_sum",
    "tests/kernels/test_ops.py::test_running_statistics",
    "tests/kernels/test_ops.py::test_stats_and_finalize",
)
LIMIT_S = {False: 1740.0, True: 580.0}  # of everything together; True: --short
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "torchvision", "torchaudio", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "av", "numpy")


@dataclass(frozen=True)
class Section:
    """One process of the report.

    Args:
        name: Its key in the JSON.
        command: Arguments of python; `{out}` is a JSON file that it writes, where it writes one.
        limit_s: Time limit.
        headline: Makes the line of the table out of its result.
    """

    name: str
    command: list[str]
    limit_s: float
    headline: Callable[[Any], str]


def sections(short: bool) -> list[Section]:
    """Return the sections in order; `short` leaves out the sanitizer, larger batches and most compilations."""
    tests = ["-m", "pytest", "-q", "-m", "needs_cuda and not slow", "-p", "no:cacheprovider", *CUDA_TESTS]
    return [
        Section("build", ["-m", "kernels.build"], 90, _last_line),
        Section("correctness", tests, 270, _last_line),
        *(() if short else (_sanitizer_section("memcheck", 180), _sanitizer_section("racecheck", 140))),
        Section("rates", ["-m", "benchmarks.gpu_report", "--rates", "{out}"], 40, _rates_line),
        *_fusion_sections(short),
        *_step_sections(short),
        _loader_section("h264"),
        _loader_section("vp9"),
        Section(
            "quickstart_h264",
            ["-m", "experiments.train", "experiments/configs/quickstart.yaml", "name=gpu-report", "train.fresh=true",
             "data.path=synthetic:quickstart-h264", "runtime.device=cuda", "runtime.precision=bf16",
             "tracking.backend=none"],
            120,
            _last_line,
        ),
        Section("views", ["-m", "benchmarks.views", "--measure", "--precisions", "bf16", "--clips", "16", "--json",
                          "--variants", "avslowfast_r50_4x16", "slowfast_r50_4x16"], 60, _last_line),
    ]  # fmt: skip


def _fusion_sections(short: bool) -> list[Section]:
    """Every site, dtype and N, with torch.compile for bfloat16 at N = 8 and 32; a few sites with its autotuning.

    A compilation takes seconds: all sites x sizes x dtypes x modes are 288 of them. What is cut off at the limit is
    the end of the list: float32 and the sizes between.
    """
    run = ["-m", "benchmarks.fusion", "--device", "cuda", "--out", "{out}"]
    clips = ["8", "32"] if short else ["8", "32", "16", "64"]
    compiled = ["--compiled", "default", "--compiled-clips", "8", *([] if short else ["32"])]
    whole = Section(
        "fusion",
        [*run, "--clips", *clips, *compiled, "--compiled-dtypes", "bfloat16"],
        180 if short else 360,
        _fusion_line,
    )
    tuned = ["--sites", "res2", "res3", "slow res3 inner", "slow res2 end", "--compiled", "max-autotune-no-cudagraphs"]
    autotune = Section("fusion_autotune", [*run, "--clips", "32", "--dtypes", "bfloat16", *tuned], 90, _fusion_line)
    return [whole] if short else [whole, autotune]


def _step_sections(short: bool) -> list[Section]:
    """Training step of the large model; with torch.compile in a section of its own, whose limit it may not keep."""
    run = ["-m", "benchmarks.step", "--device", "cuda", "--out", "{out}", "--ways"]
    eager = Section("step", [*run, "eager 5-D", "eager 4-D view", "fused"], 70, _step_line)
    ways = ["fused", "compile eager 4-D view", "compile fused"]
    return [eager] if short else [eager, Section("step_compiled", [*run, *ways], 200, _step_line)]


def _sanitizer_section(tool: str, limit_s: float) -> Section:
    """Tests of the single operations under compute-sanitizer; says so where it is not installed."""
    command = ["-m", "benchmarks.kernel_report", "--sanitizer", tool, "--limit-s", str(limit_s - 10), "--out", "{out}"]
    return Section(tool, [*command, "--tests", *SANITIZED], limit_s, _sanitizer_line)


def _loader_section(codec: str) -> Section:
    """The loader alone on a store of `codec`, decoded by NVDEC and by CPU threads."""
    command = ["-m", "benchmarks.loader", "--device", "cuda:0", "--codec", codec, "--threads", "8", "--clips", "16"]
    return Section(f"loader_{codec}", [*command, "--batches", "30", "--out", "{out}"], 90, _loader_line)


def _last_line(result: Any) -> str:
    return str(result).strip().splitlines()[-1][:110] if str(result).strip() else ""


def _rates_line(result: Any) -> str:
    return f"copy {result['copy_gb_per_s']} GB/s, bf16 matrix product {result['bf16_tflop_per_s']} TFLOP/s"


def _fusion_line(result: Any) -> str:
    rows = result["rows"]
    laterals = [row["over_fused"] for row in rows if row["kind"] == "lateral" and row["dtype"] == "bfloat16"]
    names = sorted({name for row in laterals for name in row} - {"fused"})
    so_far = "" if result["finished"] else f"{len(rows)} rows before its end; "
    return f"{so_far}laterals bf16, opponent / fused: " + ", ".join(
        f"{name} {min(r[name] for r in laterals if name in r)}..{max(r[name] for r in laterals if name in r)}x"
        for name in names
    )


def _step_line(result: Any) -> str:
    return ", ".join(f"{way} {ms} ms" for way, ms in result["ms_per_step"].items())


def _sanitizer_line(result: Any) -> str:
    return f"{result['sanitizer']}: {result['tail'][-1] if result['tail'] else 'no output'}"[:110]


def _loader_line(result: Any) -> str:
    return ", ".join(f"{r['decoder']} {r['what']} {r['clips_per_second']} clips/s" for r in result["rows"])


def measure_rates() -> dict[str, float]:
    """Return the ceilings of the rest: copy bandwidth (read + write, GB/s) and bf16 matrix rate (TFLOP/s)."""

    def median_ms(run: Callable[[], object], repeats: int = 30) -> float:
        """Return the median of timed runs in milliseconds, after five to warm up."""
        for _ in range(5):
            run()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[repeats // 2]

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_ms = median_ms(lambda: a @ b)
    return {
        "copy_gb_per_s": round(2 * source.numel() * 4 / copy_ms / 1e6, 1),
        "bf16_tflop_per_s": round(2 * 8192**3 / product_ms / 1e9, 1),
    }


def machine() -> dict[str, Any]:
    """Return hardware, versions and date."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu_cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "packages": found,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def run_section(section: Section, left_s: float = float("inf")) -> dict[str, Any]:
    """Run one section within its limit.

    Args:
        section: what to run.
        left_s: seconds left for the whole report.

    Returns:
        status, seconds, result (the JSON it wrote, also before it was ended, else its output), the end of its output.
    """
    if left_s < 5:
        return {"status": "not started", "seconds": 0.0, "result": "", "stderr": "the report's time was over"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, *(argument.replace("{out}", str(out)) for argument in section.command)]
        began = time.monotonic()
        code, output = run_bounded(command, min(section.limit_s, left_s), os.environ | {"AVSF_REQUIRE_CUDA": "1"})
        seconds = round(time.monotonic() - began, 1)
        status = "ok" if code == 0 else "timed out" if code == 124 else f"failed ({code})"
        result: Any = output[-4000:]
        if out.is_file():
            try:
                result = json.loads(out.read_text(encoding="utf-8"))
            except ValueError as error:  # ended while it wrote
                status = f"{status}, result unreadable ({error})"
    return {"status": status, "seconds": seconds, "result": result, "stderr": "" if code == 0 else output[-2000:]}


def headline(section: Section, done: dict[str, Any]) -> str:
    """Return the line of the table; a result that its section cannot read costs that line only."""
    if done["status"] != "ok" and not isinstance(done["result"], dict):
        return _last_line(done["stderr"])
    try:
        return section.headline(done["result"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"no headline ({type(error).__name__}: {error}); the figures are in the JSON file"


def main() -> int:
    """Run the command line; exit code 1 when a section failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer sizes and opponents, within ten minutes")
    parser.add_argument("--limit-s", type=float, help="seconds for everything; default 1740, with --short 580")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run only these sections")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gpu-<name>-<date>.json")
    parser.add_argument("--rates", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = sections(options.short)
    unknown = sorted(set(options.only or ()) - {section.name for section in every})
    if unknown:
        parser.error(f"sections ({', '.join(unknown)}) must be of: {', '.join(section.name for section in every)}")
    chosen = [section for section in every if not options.only or section.name in options.only]
    if not torch.cuda.is_available():
        print("error: CUDA devices (0) must be at least 1 for gpu-report; everything else here runs without one",
              file=sys.stderr)  # fmt: skip
        return 2
    if options.rates:
        options.rates.write_text(json.dumps(measure_rates()), encoding="utf-8")
        return 0
    report: dict[str, Any] = {"machine": machine(), "sections": {}}
    name = report["machine"]["gpu"].lower().replace(" ", "-")
    out = options.out or RESULTS / f"gpu-{name}-{report['machine']['date']}.json"
    deadline = time.monotonic() + (options.limit_s or LIMIT_S[options.short])
    for section in chosen:
        print(f"{section.name} ...", flush=True)
        done = run_section(section, deadline - time.monotonic())
        report["sections"][section.name] = done
        write_whole(out, report)  # kept even if a later section hangs
    print(f"\n{report['machine']['gpu']}, {report['machine']['date']}, torch {torch.__version__}: {out}")
    for section in chosen:
        done = report["sections"][section.name]
        print(f"{section.name:16} {done['status']:12} {done['seconds']:7.1f} s  {headline(section, done)}")
    return 0 if all(s["status"] == "ok" for s in report["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
