"""Every GFLOPs cell of the paper against ours."""

import json
from pathlib import Path

import pytest

from benchmarks.model_speed import main as measure_speed
from benchmarks.result_rows import read_rows
from benchmarks.steps.views import Speed, speeds_text
from benchmarks.views import ROWS, TOLERANCE_PERCENT, broken_down, counted, main, stages_text
from model.variants import VARIANTS


@pytest.mark.integration
def test_every_reproducible_cell(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(ROWS) == 35
    keys = {"table", "row", "variant", "gmacs", "params_m", "views", "paper_gflops", "residual_percent"}
    for row in rows:
        assert keys <= row.keys()
        assert row["residual_percent"] == pytest.approx(100 * (row["gmacs"] / row["paper_gflops"] - 1), abs=2e-3)
        if row["reproducible"]:
            allowed = 0.5 if row["paper_gflops"] == 106 else TOLERANCE_PERCENT
            assert abs(row["residual_percent"]) <= allowed, row
        else:
            assert row["note"]
            assert abs(row["residual_percent"]) > 5
    assert [r["row"] for r in rows if not r["reproducible"]] == [
        "A->F->S",
        "Audio-only, Kinetics-600",
        "Audio-only, Kinetics-400",
    ]
    probes = [r for r in rows if r["paper_params_m"] == 38.5]
    assert len(probes) == 6
    assert all(abs(r["params_without_bn_m"] - 38.5) < 0.05 for r in probes)
    assert {r["table"] for r in rows} == {"3", "4", "5a", "5b", "6", "7", "8", "A.1", "A.3"}


def test_rows_name_variants() -> None:
    assert {row.variant for row in ROWS} <= set(VARIANTS)


def test_one_row_and_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(counted([row for row in ROWS if row.table == "A.3"]))
    assert [r.gmacs for r in found] == [4.0224, 4.0224]
    main(["--variants", "audio_r50"])
    assert "not repr." in capsys.readouterr().out
    text = stages_text(broken_down(["audio_r50"]))
    assert "audio            res5" in text
    total = sum(float(line.split()[2]) for line in text.splitlines()[1:])
    assert total == pytest.approx(4.0224, abs=1e-3)
    main(["--variants", "small", "--stages", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["variant"], row["px"], row["gmacs"]) == ("small", [64, 64], pytest.approx(0.1354, abs=1e-4))
    assert sum(part["gmacs"] for part in row["stages"]) == pytest.approx(row["gmacs"], abs=1e-3)
    main(["--variants", "small", "--stages"])
    assert capsys.readouterr().out.startswith("small, 64x64 px: 0.135 G, ")


def test_variant_of_no_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--variants", "small"])
    assert "small: in no row of the paper's tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measure", "--clips", "0"], "--clips (0) must be at least 1; "),
        (["--clips", "4"], "--clips (4) must come with --measure; "),
        (["--precisions", "bf16"], "--precisions (['bf16']) must come with --measure; "),
    ],
)
def test_options_that_cannot_be_meant(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--variants", "small", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize("name", ["--clips", "--repeats"])
def test_speed_of_nothing_is_not_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        measure_speed(["step", name, "0"])
    assert f"error: {name} (0) must be at least 1" in capsys.readouterr().err


@pytest.mark.integration
def test_measure_reports_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    asked = ["--measure", "--variants", "small", "audio_r50", "--precisions", "fp32", "--clips", "1"]
    main([*asked, "--json", "--out", str(out)])
    document = json.loads(capsys.readouterr().out)
    assert {"cpu", "cpu_cores", "torch", "date"} <= document["machine"].keys()
    row, sound = document["rows"]
    assert row["variant"] == "small"
    assert row["views_per_s"] > 0
    assert row["tflops_per_s"] == pytest.approx(row["views_per_s"] * 2 * 0.1354e-3, rel=0.02)
    assert (row["gflops"], row["views"]) == (pytest.approx(0.1354, abs=1e-4), 30)
    assert row["seconds_per_video"] == pytest.approx(30 / row["views_per_s"], rel=1e-3, abs=1e-4)
    assert (sound["variant"], sound["gflops"]) == ("audio_r50", pytest.approx(4.0224, abs=1e-3))
    rows = read_rows(out)
    assert [row["benchmark"] for row in rows] == ["views", "views"]
    assert {"machine", "commit", "command"} <= rows[0].keys()


def test_speeds_are_a_table_of_gflops_views_and_seconds() -> None:
    text = speeds_text([Speed("r50", "bf16", 32, 39.8, 30, 3000.0, 0.01, 238.8)])
    assert text.splitlines()[1].split() == ["r50", "bf16", "39.80", "x", "30", "32", "3000.00", "0.010", "238.800"]
