"""The GPU report's sections are bounded, and none costs another: without a GPU, on small processes."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fusion, gpu_report, kernel_report, step
from benchmarks.gpu_report import Section, headline, run_section


def section(code: str, limit_s: float = 20, line: Any = str) -> Section:
    return Section("part", ["-c", code, "{out}"], limit_s, line)


def test_result_failure_and_unreadable_result() -> None:
    good = run_section(section("import sys; open(sys.argv[1], 'w').write('{\"a\": 1}')"))
    assert (good["status"], good["result"]) == ("ok", {"a": 1})
    bad = run_section(section("raise SystemExit('no device')"))
    assert bad["status"] == "failed (1)"
    assert "no device" in headline(section(""), bad)
    half = run_section(section("import sys; open(sys.argv[1], 'w').write('{')"))
    assert "result unreadable" in half["status"]


def test_headline_that_does_not_fit_costs_its_line_only() -> None:
    done = {"status": "ok", "result": {}, "stderr": ""}
    assert "KeyError" in headline(section("", line=lambda result: result["rows"]), done)


@pytest.mark.integration
def test_a_section_out_of_time_ends_with_what_it_started(tmp_path: Path) -> None:
    """The grandchild keeps the output open; nobody waits for it, and it is gone."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    done = run_section(section(code, limit_s=3))
    assert done["status"] == "timed out"
    if note.is_file():
        stat = Path(f"/proc/{note.read_text()}/stat")
        deadline = time.monotonic() + 5
        while stat.is_file() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not stat.is_file() or stat.read_text().split()[2] == "Z"


def test_every_section_has_a_limit_and_names_are_unique() -> None:
    for short in (True, False):
        sections = gpu_report.sections(short)
        assert all(0 < s.limit_s <= 600 for s in sections)
        assert len({s.name for s in sections}) == len(sections)
    assert {"memcheck", "racecheck"} <= {s.name for s in gpu_report.sections(False)}
    assert sum(s.limit_s for s in gpu_report.sections(False)) <= 1800
    assert gpu_report.LIMIT_S[False] < 1800
    assert gpu_report.LIMIT_S[True] < 600


def test_a_report_that_is_out_of_time_starts_nothing_more() -> None:
    done = run_section(section("raise SystemExit('started')"), left_s=4)
    assert (done["status"], done["seconds"]) == ("not started", 0.0)
    assert headline(section(""), done) == "the report's time was over"


def test_figures_of_a_section_that_was_ended_reach_the_table() -> None:
    row = {"kind": "lateral", "dtype": "bfloat16", "over_fused": {"eager 5-D": 2.5, "fused": 1.0}}
    code = f"import json, sys; json.dump({{'finished': False, 'rows': [{row}]}}, open(sys.argv[1], 'w')); exit(3)"
    part = section(code, line=gpu_report._fusion_line)
    done = run_section(part)
    assert done["status"] == "failed (3)"
    assert headline(part, done) == "1 rows before its end; laterals bf16, opponent / fused: eager 5-D 2.5..2.5x"


def test_commands_of_the_benchmarks_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option would cost a section on the only machine that can run it."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(fusion, "measure", lambda device, **options: seen.append({"device": device} | options))
    monkeypatch.setattr(step, "measure", lambda variant, device, **options: seen.append({"device": device} | options))
    for part in gpu_report.sections(False):
        if part.command[1] in ("benchmarks.fusion", "benchmarks.step"):
            command = [argument for argument in part.command[2:] if argument not in ("--out", "{out}")]
            (fusion if part.name.startswith("fusion") else step).main(command)
    first, tuned, eager, compiled = seen
    assert first["clips"] == (8, 32, 16, 64)
    assert first["dtypes"] == ("bfloat16", "float16", "float32")
    assert (first["compiled"], first["compiled_clips"]) == (("default",), [8, 32])
    assert len(first["sites"]) == 12
    assert (tuned["compiled"], tuned["clips"]) == (("max-autotune-no-cudagraphs",), (32,))
    assert {*eager["ways"], *compiled["ways"]} == set(step.WAYS)
    assert {options["device"] for options in seen} == {"cuda"}


def test_an_unknown_section_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--only", "fusion", "stpe"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "sections (stpe) must be of: build, correctness" in capsys.readouterr().err


def test_tests_that_the_report_runs_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for name in (*gpu_report.CUDA_TESTS, *gpu_report.SANITIZED):
        path, _, function = name.partition("::")
        assert (root / path).exists()
        assert not function or f"def {function}(" in (root / path).read_text()
    assert "needs_cuda" in (root / gpu_report.SANITIZED[0]).read_text()


def test_sanitizer_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_report, "find_sanitizer", lambda: None)
    out = tmp_path / "out.json"
    assert kernel_report.main(["--sanitizer", "memcheck", "--out", str(out)]) == 0
    result = kernel_report.cuda_correctness(sanitizer="racecheck")
    assert result["ok"] is None
    assert "not installed" in gpu_report._sanitizer_line(result)


def test_sanitizer_runs_the_tests_under_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_report, "find_sanitizer", lambda: "/tool")
    seen: list[Any] = []

    def run(command: list[str], limit: float, environment: Any) -> tuple[int, str]:
        seen.extend([command, limit, environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]])
        return 0, "....\n12 passed in 3 s\n"

    monkeypatch.setattr(kernel_report, "run_bounded", run)
    result = kernel_report.cuda_correctness(sanitizer="memcheck", timeout_s=7, tests=("a.py",))
    assert result["ok"] is True
    assert result["counts"] == {"passed": 12}
    assert seen[0][:4] == ["/tool", "--tool", "memcheck", "--error-exitcode"]
    assert seen[0][5:7] == [sys.executable, "-m"]
    assert seen[1:] == [7, "1"]


def test_step_headline_reads_what_the_step_benchmark_writes() -> None:
    assert gpu_report._step_line({"ms_per_step": {"fused": 1.5}}) == "fused 1.5 ms"
    assert os.fspath(gpu_report.RESULTS).endswith("results")
