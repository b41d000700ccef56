"""README and docs say what the committed results say, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.report import PAGES, ROOT, TABLES, all_rows, render
from benchmarks.result_rows import append_rows

RATE = re.compile(r"\d[\d .,]*(?:clips/s|views/s|img/s|images/s|TFLOP/s)")
MACHINE = {"gpu": "NVIDIA H200", "cpu": "Xeon", "cpu_threads": 16, "date": "2026-11-26T12:00:00+00:00", "torch": "2.11"}


def step_row(way: str, ms: float, **changes: Any) -> dict[str, Any]:
    row = {
        "benchmark": "step", "device": "cuda", "audio": "kept", "variant": "r50", "clips": 32, "pixels": 224,
        "way": way, "ms": ms, "clips_per_s": 32e3 / ms, "tflop_per_s": 80.0, "floor_ms": 20.0, "machine": MACHINE,
        "commit": "abc", "command": "python -m benchmarks.step --clips 32",
    }  # fmt: skip
    return row | changes


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_those_of_the_committed_results(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    assert render(text, all_rows(), below="../" * page.count("/")) == text, "run make bench-report"


def test_the_readme_has_the_tables_and_no_rate_beside_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {match["name"] for match in report.REGION.finditer(text)}
    assert "step" in names <= set(TABLES)
    outside = report.REGION.sub("", text)
    rates = re.findall(r"\d[\d .,]*(?:clips/s|views/s|TFLOP/s)", outside)
    assert not rates, f"figures without a result file: {rates}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_no_table_of_docs_has_a_rate_that_no_result_holds(page: Path) -> None:
    text = report.REGION.sub("", page.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.startswith("|") and RATE.search(line)]
    assert not lines, f"figures without a result file: {lines}"


def test_such_a_rate_would_be_found() -> None:
    assert RATE.search("| loader | 1 234.5 clips/s |")
    assert not RATE.search("| `data.prefetch_batches` | 2 |")


def test_a_table_of_rows(tmp_path: Path) -> None:
    rows = [
        step_row("fused graph", 100.0, machine=MACHINE | {"date": "2026-11-25T12:00:00+00:00"}),
        step_row("fused graph", 40.0),
        step_row("fused graph", 30.0, audio="dropped"),
        step_row("eager 4-D", 120.0),
        step_row("compile eager", 90.0),
        step_row("compile fused", 60.0),
        step_row("pyslowfast", 200.0, commit="another"),
    ]
    failed = step_row("compile fused reduce-overhead", 1.0)
    del failed["ms"]
    append_rows(tmp_path / "gpu-h200.json", [*rows, failed | {"failed": "not finished within 95 s"}])
    (tmp_path / "older.json").write_text('{"machine": 1}')
    text = render("<!-- bench:step -->\nold\n<!-- /bench:step -->\n", all_rows(tmp_path), below="../")
    (line,) = [line for line in text.splitlines() if "r50" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["NVIDIA H200", "r50, 224 px", "32", "800", "3.00x", "unmeasured", "1.50x", "80.0", "50 %"]
    assert "[gpu-h200.json](../benchmarks/results/gpu-h200.json)" in text
    assert "old" not in text
    assert "commit abc, another; torch 2.11; `python -m benchmarks.step`" in text


def test_what_has_no_row_is_unmeasured() -> None:
    for name in TABLES:
        text = render(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n", [])
        assert "unmeasured" in text
        assert render(text, []) == text


def test_a_region_that_cannot_be_filled_is_an_error() -> None:
    with pytest.raises(ValueError, match="bench:speed must be one of step"):
        render("<!-- bench:speed -->\n<!-- /bench:speed -->", [])
    with pytest.raises(ValueError, match="must have its"):
        render("<!-- bench:step -->\n", [])


def test_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:inference -->\nwrong\n<!-- /bench:inference -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "all_rows", list)
    assert report.main(["--check"]) == 1
    assert "wrong" in page.read_text()
    assert report.main([]) == 0
    assert "unmeasured" in page.read_text()
    assert report.main(["--check"]) == 0


def test_other_tables_read_what_the_benchmarks_write() -> None:
    common = {"machine": MACHINE, "commit": "abc", "file": "gpu.json", "device": "cuda"}
    rows = [
        common | {"benchmark": "inference", "variant": "r50", "clips": 64, "pixels": 256, "way": "folded graph",
                  "views_per_s": 3500.4, "tflop_per_s": 140.0},
        common | {"benchmark": "step profile", "variant": "r50", "clips": 32, "way": "fused graph",
                  "kinds": {"stems": {"launches": 4, "ms": 6.5}, "idle": {"launches": 0, "ms": 0.5}}},
        common | {"benchmark": "gpu-report", "part": "tests-kernels", "status": "ok", "line": "517 passed in 70 s"},
    ]  # fmt: skip
    assert "| 3500 | 140.0 |" in TABLES["inference"](rows)
    assert "6.50 ms (4)" in TABLES["profile"](rows)
    assert "517 passed" in TABLES["gpu-parts"](rows)


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"decoder": "auto", "nvdec_clips": 0.0, "cpu_clips": 6208.0, "nvdec_percent_mean": 6.8}, "0 %"),
        ({"decoder": "auto", "nvdec_clips": 8.0, "cpu_clips": 24.0}, "25 %"),
        ({"decoder": "auto"}, "-"),
        ({"decoder": "dali"}, "100 %"),
        ({"decoder": "cpu"}, "0 %"),
    ],
)
def test_who_decoded_is_told_by_clips_not_by_the_trial_before_them(row: dict[str, object], share: str) -> None:
    common = {"benchmark": "loader", "device": "cuda:0", "codec": "h264", "clips": 32, "workers": -1, "what": "all",
              "clips_per_second": 1.0, "batch_ms_p50": 1.0, "batch_ms_p95": 1.0, "file": "f", "commit": "c",
              "machine": {"date": "2026-11-26", "gpu": "G"}}  # fmt: skip
    line = report.gpu_loader_table([common | row]).splitlines()[2]
    assert line.split(" | ")[7] == share
