"""Everything that only a GPU can show, in one bounded run: `make gpu-report` or `python -m benchmarks.gpu_report`.

Correctness first (tests marked needs_cuda, the operations' own also under compute-sanitizer), then figures: copy and
matrix rates, fused ops, training step, decoding and loading, end to end. Each section runs in a process of its own
under a time limit, with whatever it starts; one that fails is reported as failed and the rest goes on. Writes JSON
under benchmarks/results/ and prints a short table.

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

CUDA_TESTS = ("tests/kernels", "tests/pipeline/test_graph.py", "tests/experiments/test_train.py")
SANITIZED = ("tests/kernels/test_pool.py", "tests/kernels/test_ops.py")
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
    """Return the sections in order; `short` keeps the whole under about five minutes."""
    clips = ["8", "32"] if short else ["8", "16", "32", "64"]
    compiled = ["default"] if short else ["default", "max-autotune-no-cudagraphs"]
    return [
        Section("build", ["-m", "kernels.build"], 240, _last_line),
        Section(
            "correctness",
            ["-m", "pytest", "-q", "-m", "needs_cuda", "-p", "no:cacheprovider", *CUDA_TESTS],
            300,
            _last_line,
        ),
        *(_sanitizer_section(tool) for tool in (() if short else ("memcheck", "racecheck"))),
        Section("rates", ["-m", "benchmarks.gpu_report", "--rates", "{out}"], 60, _rates_line),
        Section(
            "fusion",
            ["-m", "benchmarks.fusion", "--device", "cuda", "--clips", *clips, "--compiled", *compiled,
             "--out", "{out}"],
            300,
            _fusion_line,
        ),
        Section("step", ["-m", "benchmarks.step", "--device", "cuda", "--out", "{out}"], 240, _step_line),
        _loader_section("h264"),
        _loader_section("vp9"),
        Section(
            "quickstart_h264",
            ["-m", "experiments.train", "experiments/configs/quickstart.yaml", "name=gpu-report", "train.fresh=true",
             "data.path=synthetic:quickstart-h264", "runtime.device=cuda", "runtime.precision=bf16",
             "tracking.backend=none"],
            180,
            _last_line,
        ),
        Section("views", ["-m", "benchmarks.views", "--measure", "--precisions", "bf16", "--clips", "16", "--json",
                          "--variants", "avslowfast_r50_4x16", "slowfast_r50_4x16"], 120, _last_line),
    ]  # fmt: skip


def _sanitizer_section(tool: str) -> Section:
    """Tests of the single operations under compute-sanitizer; says so where it is not installed."""
    limit_s = 400.0
    command = ["-m", "benchmarks.kernel_report", "--sanitizer", tool, "--limit-s", str(limit_s - 20), "--out", "{out}"]
    return Section(tool, [*command, "--tests", *SANITIZED], limit_s, _sanitizer_line)


def _loader_section(codec: str) -> Section:
    """The loader alone on a store of `codec`, decoded by NVDEC and by CPU threads."""
    command = ["-m", "benchmarks.loader", "--device", "cuda:0", "--codec", codec, "--threads", "8", "--clips", "16"]
    return Section(f"loader_{codec}", [*command, "--batches", "30", "--out", "{out}"], 120, _loader_line)


def _last_line(result: Any) -> str:
    return str(result).strip().splitlines()[-1][:110] if str(result).strip() else ""


def _rates_line(result: Any) -> str:
    return f"copy {result['copy_gb_per_s']} GB/s, bf16 matrix product {result['bf16_tflop_per_s']} TFLOP/s"


def _fusion_line(result: Any) -> str:
    rows = result["rows"]
    laterals = [row["over_fused"] for row in rows if row["kind"] == "lateral" and row["dtype"] == "bfloat16"]
    names = sorted({name for row in laterals for name in row} - {"fused"})
    return "laterals bf16, opponent / fused: " + ", ".join(
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


def run_section(section: Section) -> dict[str, Any]:
    """Run one section; returns status, seconds, result (JSON it wrote, else its output) and the end of its output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, *(argument.replace("{out}", str(out)) for argument in section.command)]
        began = time.monotonic()
        code, output = run_bounded(command, section.limit_s, os.environ | {"AVSF_REQUIRE_CUDA": "1"})
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
    if done["status"] != "ok":
        return _last_line(done["stderr"])
    try:
        return section.headline(done["result"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"no headline ({type(error).__name__}: {error}); the figures are in the JSON file"


def main() -> int:
    """Run the command line; exit code 1 when a section failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer sizes and opponents")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run only these sections")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gpu-<name>-<date>.json")
    parser.add_argument("--rates", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
    chosen = [s for s in sections(options.short) if not options.only or s.name in options.only]
    for section in chosen:
        print(f"{section.name} ...", flush=True)
        done = run_section(section)
        report["sections"][section.name] = done
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # kept even if a later section hangs
    print(f"\n{report['machine']['gpu']}, {report['machine']['date']}, torch {torch.__version__}: {out}")
    for section in chosen:
        done = report["sections"][section.name]
        print(f"{section.name:16} {done['status']:12} {done['seconds']:7.1f} s  {headline(section, done)}")
    return 0 if all(s["status"] == "ok" for s in report["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
