"""The rate of every norm of a model: which places it has, what must move, and a whole small run."""

import json
from pathlib import Path

import pytest

from benchmarks.norm_rates import Place, main, places, summarize
from kernels.library import fused_devices

pytestmark = pytest.mark.integration  # starts processes or trains


def test_places_are_those_of_the_model() -> None:
    found = places("avslowfast_r50_4x16", 8, 224)
    forms = {
        form: sum(count for place, count in found.items() if place.form == form) for form in {p.form for p in found}
    }
    # 16 blocks a pathway end with a residual: 12 of them the input itself, 4 projected.
    assert (forms["residual"], forms["projected"], forms["pool"]) == (36, 12, 2)
    assert found[Place((8, 256, 4, 56, 56), "residual")] == 2
    assert found[Place((8, 64, 4, 112, 112), "pool")] == 1


def test_bytes_of_two_passes() -> None:
    place = Place((8, 64, 4, 56, 56), "residual")
    size = 2 * 8 * 64 * 4 * 56 * 56
    assert place.megabytes() == pytest.approx(size / 1e6)
    assert place.bytes_moved("forward") == 4 * size + size / 16
    assert place.bytes_moved("backward fork") - place.bytes_moved("backward") == size  # the second reader's gradient


def test_summary_adds_places_and_takes_the_better_walk() -> None:
    row = {
        "shape": [32, 8, 1, 1, 1],
        "form": "relu",
        "count": 3,
        "mb": 20.0,
        "bytes": 1_000_000,
        "operation": "forward",
    }
    rows = [row | {"walk": "pass by pass", "us": 10.0}, row | {"walk": "group by group", "us": 5.0}]
    summary = summarize(rows, 100.0)
    assert summary["pass by pass"]["ms"] == pytest.approx(0.03)
    assert summary["better"]["10 to 64 MB"] == {"ms": 0.015, "share_of_copy": 2.0, "calls": 3}


@pytest.mark.skipif("cpu" not in fused_devices(), reason="the library of fused operations is not built")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rates.json"
    main(["--device", "cpu", "--clips", "2", "--pixels", "32", "--repeats", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {row["operation"] for row in result["rows"]} == {"forward", "backward", "backward fork"}
    assert all(row["us"] > 0 and row["share_of_copy"] > 0 for row in result["rows"])
    assert "N 2, better" in capsys.readouterr().out
