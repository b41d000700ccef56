"""The GPU report's parts are bounded, and none costs another: without a GPU, on small processes."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, inference, kernel_report, rates, step
from benchmarks.gpu_parts import (
    KERNEL_TESTS,
    LONGEST_S,
    MODEL_TESTS,
    SANITIZED,
    TRAINING_TESTS,
    VISITS,
    Part,
    chosen_parts,
    parts,
)
from benchmarks.gpu_report import run_part
from benchmarks.result_rows import read_rows

pytestmark = pytest.mark.integration  # starts processes or trains

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, code: str, *, left_s: float = 60, **changes: Any) -> dict[str, Any]:
    part = Part("part", ("-c", code, "{json}", "{rows}"), **({"limit_s": 20} | changes))
    return run_part(part, tmp_path / "rows.json", tmp_path / "log", left_s, rehearse=True)


def test_result_failure_and_unreadable_result(tmp_path: Path) -> None:
    good = run(tmp_path, "import sys; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('all well')")
    assert (good["status"], good["result"], good["line"]) == ("ok", {"a": 1}, "all well")
    bad = run(tmp_path, "raise SystemExit('no device')")
    assert bad["status"] == "failed (1)"
    assert "no device" in bad["output"]
    half = run(tmp_path, "import sys; open(sys.argv[1], 'w').write('{')")
    assert "unreadable" in half["result"]
    rows = read_rows(tmp_path / "rows.json")
    assert [row["status"] for row in rows] == ["ok", "failed (1)", "ok"]
    assert {"machine", "commit", "command"} <= rows[0].keys()
    assert "no device" in (tmp_path / "log").read_text()


def test_rows_of_a_part_come_before_its_own(tmp_path: Path) -> None:
    code = "import sys; from benchmarks.result_rows import append_rows; from pathlib import Path; "
    run(tmp_path, code + "append_rows(Path(sys.argv[2]), [{'benchmark': 'x'}]); raise SystemExit(3)")
    assert [row["benchmark"] for row in read_rows(tmp_path / "rows.json")] == ["x", "gpu-report"]


@pytest.mark.integration
def test_a_part_out_of_time_ends_with_what_it_started(tmp_path: Path) -> None:
    """The grandchild keeps the output open; nobody waits for it, and it is gone."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    done = run(tmp_path, code, limit_s=3)
    assert done["status"] == "timed out"
    if note.is_file():
        stat = Path(f"/proc/{note.read_text()}/stat")
        deadline = time.monotonic() + 5
        while stat.is_file() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not stat.is_file() or stat.read_text().split()[2] == "Z"


def test_a_training_out_of_time_saves_and_goes_on_at_the_next_visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "GRACE_S", 10.0)
    code = "import signal, time; signal.signal(15, lambda *_: exit(75)); time.sleep(60)"
    done = run(tmp_path, code, limit_s=12, resumes=True)
    assert done["status"] == "goes on at the next visit"
    assert done["seconds"] < 12
    monkeypatch.setattr(gpu_report, "GRACE_S", 1.0)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    assert run(tmp_path, deaf, limit_s=2, resumes=True)["status"] == "timed out"


def test_parts_are_short_and_their_names_unique() -> None:
    every = parts()
    assert all(0 < part.limit_s <= LONGEST_S == 100 for part in every)
    assert len({part.name for part in every}) == len(every)
    asked = {
        "build", "tests-kernels", "tests-model", "tests-training", "rates", "step", "profile", "norms", "stem",
        "inference", "sanitizer-memcheck", "sanitizer-racecheck", "loader-h264", "loader-vp9",
        "quickstart-h264", "recipe",
    }  # fmt: skip
    assert asked <= {part.name for part in every}
    for visit in VISITS:
        assert chosen_parts(None, visit)[0].name == "build"
    short = chosen_parts(None, "short")
    assert short[1].name == "tests-kernels"  # correctness first
    with pytest.raises(ValueError, match=r"parts \(stpe\) must be of: build, tests-kernels"):
        chosen_parts(["rates", "stpe"], None)


def test_what_is_not_there_or_too_late_is_said(tmp_path: Path) -> None:
    late = run(tmp_path, "raise SystemExit('started')", left_s=4)
    assert (late["status"], late["seconds"], late["line"]) == ("not started", 0.0, "the report's time was over")
    absent = run(tmp_path, "raise SystemExit('started')", needs=("json", "no.such.package"))
    assert (absent["status"], absent["line"]) == ("left out", "no.such.package: not here")


def test_commands_of_the_benchmarks_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option would cost a part on the only machine that can run it."""
    jobs: list[Any] = []
    monkeypatch.setattr(step, "check", lambda *_: None)
    monkeypatch.setattr(step, "provenance", lambda *_: {})
    monkeypatch.setattr(step, "ways_here", lambda device, fused, names: names)
    monkeypatch.setattr(step, "measure_all", lambda given, limit_s, record: jobs.append((given, limit_s)) or [])
    for part in parts():
        if part.command[1] == "benchmarks.step" and "--profile" not in part.command:
            words = [word for word in (*part.command[2:], *part.cuda) if word not in ("--out", "{rows}")]
            assert step.main(words) == 0
            given, limit_s = jobs[-1]
            assert all(job.device == "cuda" for job in given)
            assert limit_s < LONGEST_S
    first = jobs[0][0]
    assert [(job.clips, job.way) for job in first[:2]] == [(32, "fused graph"), (32, "eager 4-D")]
    ways = {job.way for given, _ in jobs for job in given}
    assert {"fused graph", "pyslowfast", "compile fused", "compile eager reduce-overhead", "eager 4-D"} <= ways


@pytest.mark.integration
def test_rehearsal_of_a_part_runs_its_code_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["rates", "profile", "inference"]
    assert gpu_report.main(["--rehearse", "--only", *names, "--out-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("rehearsal-*.json")
    rows = read_rows(path)
    done = {row["part"]: row["status"] for row in rows if row["benchmark"] == "gpu-report"}
    assert done == dict.fromkeys(names, "ok")
    assert {"rates", "step profile", "inference"} <= {row["benchmark"] for row in rows}
    assert "views/s" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2  # rows and log


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--only", "rates"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert gpu_report.main(["--list"]) == 0
    assert "--visit kernels: build tests-kernels" in capsys.readouterr().out


def test_tests_that_the_report_runs_exist() -> None:
    for name in (*KERNEL_TESTS, *MODEL_TESTS, *TRAINING_TESTS, *SANITIZED):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists()
        assert not function or f"def {function}(" in (ROOT / path).read_text()
    assert "needs_cuda" in (ROOT / SANITIZED[0]).read_text()


@pytest.mark.integration
def test_a_visit_puts_the_packed_folder_together_from_two_calls(tmp_path: Path) -> None:
    """Part 0 comes with one call, part 1 with the next; only then is there a package to import."""
    checkout, bundle = tmp_path / "checkout", tmp_path / "bundle"
    (checkout / "benchmarks").mkdir(parents=True)
    (checkout / ".bundle").mkdir()
    script = checkout / "benchmarks" / "gpu_visit.sh"
    script.write_bytes((ROOT / "benchmarks" / "gpu_visit.sh").read_bytes())
    (checkout / "benchmarks" / "__init__.py").touch()
    (checkout / "benchmarks" / "gpu_report.py").write_text(
        "import importlib.util, sys; print(sys.argv[1:], bool(importlib.util.find_spec('packed_one')))"
    )
    (tmp_path / "packed_one").mkdir()
    (tmp_path / "packed_one" / "__init__.py").touch()
    with tarfile.open(tmp_path / "all.xz", "w:xz") as archive:
        archive.add(tmp_path / "packed_one", "packed_one")
    data = (tmp_path / "all.xz").read_bytes()
    environment = os.environ | {"AVSF_BUNDLE": str(bundle), "PYTHON": sys.executable}

    def visit(number: int, content: bytes) -> str:
        for old in (checkout / ".bundle").iterdir():
            old.unlink()
        (checkout / ".bundle" / f"part.{number}").write_bytes(content)
        command = ["bash", str(script), "--visit", "kernels"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = visit(0, data[:50])
    assert "1 of 2 parts" in first
    assert "['--visit', 'kernels'] False" in first
    assert "True" in visit(1, data[50:])


def test_sanitizer_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_report, "find_sanitizer", lambda: None)
    out = tmp_path / "out.json"
    assert kernel_report.main(["--sanitizer", "memcheck", "--out", str(out)]) == 0
    result = kernel_report.cuda_correctness(sanitizer="racecheck")
    assert result["ok"] is None
    assert "not installed" in result["tail"][0]


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
    assert seen[0][5:9] == ["--kernel-name", "kernel_substring=avsf", sys.executable, "-m"]
    assert seen[1:] == [7, "1"]


def test_summary_shows_what_the_benchmarks_write() -> None:
    done = [{"part": "step", "status": "ok", "seconds": 3.0, "line": "x"}]
    rows = [
        {"benchmark": "step", "variant": "v", "clips": 8, "way": "fused", "audio": "kept", "ms": 1.5,
         "clips_per_s": 9.0, "host_ms": 1.0, "floor_ms": 0.5},
        {"benchmark": "step", "variant": "v", "clips": 8, "way": "compile eager", "failed": "no"},
        {"benchmark": "inference", "variant": "v", "clips": 64, "way": "folded", "views_per_s": 7.0},
    ]  # fmt: skip
    text = gpu_report.summary(done, rows)
    assert "1.50 ms     9.0 clips/s" in text
    assert "7.0 views/s" in text


def test_rates_and_inference_refuse_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        rates.main(["--out", "nowhere/x.json"])
    for wrong, words in (("--pixels 8", "pixels (8) must be at least 32"), ("--clips 0", "clips (0) must be")):
        with pytest.raises(SystemExit, match="2"):
            inference.main(["--device", "cpu", *wrong.split()])
        assert words in capsys.readouterr().err


def test_inference_gives_the_scores_of_the_model(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--device", "cpu", "--clips", "2", "--pixels", "64", "--repeats", "1", "--out", str(out)]
    assert inference.main([*options, "--ways", "folded graph", "folded", "unfolded", "pyslowfast"]) == 0
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["folded", "unfolded", "pyslowfast"]  # no graphs on the CPU
    assert rows["unfolded"]["score_difference"] == 0
    assert 0 <= rows["folded"]["score_difference"] < 1e-4
    assert all(row["views_per_s"] == pytest.approx(2e3 / row["ms"], rel=1e-2) for row in rows.values())


def test_sanitizer_out_of_time_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_report, "find_sanitizer", lambda: "/tool")
    monkeypatch.setattr(kernel_report, "run_bounded", lambda *_: (124, "===== COMPUTE-SANITIZER\n.....s.. [ 9%]\n..."))
    result = kernel_report.cuda_correctness(sanitizer="racecheck")
    assert result["ok"] is False
    assert result["tail"][-1] == "10 tests without a finding until the time was over"


def test_speed_of_a_training_over_several_visits_is_that_of_all_of_them() -> None:
    once = {"steps": 9, "clips_per_second": 50.0, "resumed_from_step": 0, "timed_clips": 90, "seconds": {"data": 1.0}}
    assert gpu_report._over_all(once) == {}
    later = once | {"resumed_from_step": 6, "timed_clips": 240, "seconds": {"data": 2.0, "step": 6.0, "eval": 9.0}}
    assert gpu_report._over_all(later) == {
        "clips_per_s": 30.0, "data_wait_share": 0.25, "speed_of": "all processes", "clips_per_s_of_last_process": 50.0,
    }  # fmt: skip
    del later["timed_clips"]
    assert gpu_report._over_all(later) == {"speed_of": "the last process, from step 6 on"}


def test_training_row_comes_from_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"steps": 4, "clips_per_second": 12.34, "data_wait_share": 0.25, "top1": 0.5, "decoder": "cpu"}
    code = (
        "import json, pathlib, sys; words = dict(w.split('=') for w in sys.argv[1:]); "
        "folder = pathlib.Path(words['output_dir']) / words['name']; folder.mkdir(parents=True); "
        f"(folder / 'summary.json').write_text(json.dumps({summary}))"
    )
    words = (f"output_dir={tmp_path}/runs", "name=r", "train.clips_per_step=8")
    part = Part("recipe", ("-c", code, *words), limit_s=60, resumes=True)
    done = run_part(part, tmp_path / "rows.json", tmp_path / "log", 60.0, True)
    assert (done["status"], done["line"]) == ("ok", "4 steps, 12 clips/s, top1 50.0 %")
    row = next(row for row in read_rows(tmp_path / "rows.json") if row["benchmark"] == "training")
    assert (row["run"], row["clips"], row["data_wait_share"], row["clips_per_s"]) == ("recipe", 8, 0.25, 12.34)
