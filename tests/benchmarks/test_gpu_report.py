"""The GPU report's sections are bounded, and none costs another: without a GPU, on small processes."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, kernel_report
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
