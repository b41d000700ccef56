"""Rows are added, never overwritten, and say where they come from."""

import json
from pathlib import Path

import pytest

from benchmarks import result_rows
from benchmarks.result_rows import append_rows, provenance, put_rows, read_rows


def test_rows_are_added(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert read_rows(path) == []
    append_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 2}, {"a": 3}])
    assert [row["a"] for row in read_rows(path)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_form_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"machine": 1}')
    with pytest.raises(ValueError, match="must hold an object with a list of rows"):
        append_rows(path, [{"a": 1}])
    assert path.read_text() == '{"machine": 1}'
    with pytest.raises(ValueError, match="must be a file in a folder that can be written"):
        append_rows(tmp_path / "nowhere" / "x.json", [])


def test_a_row_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    result_rows.commit.cache_clear()
    monkeypatch.setenv("AVSF_COMMIT", "abc123")
    found = provenance("benchmarks.step", "cpu", ["--ways", "eager 4-D"])
    result_rows.commit.cache_clear()
    assert found["commit"] == "abc123"
    assert found["command"] == "python -m benchmarks.step --ways 'eager 4-D'"
    assert {"cpu", "torch", "date", "cpu_cores"} <= found["machine"].keys()
    assert json.dumps(found)


def test_rows_of_a_run_take_the_place_of_its_earlier_ones_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    append_rows(path, [{"a": 1}, {"a": 2, "run": "x"}])
    put_rows(path, [{"a": 3, "run": "y"}], "y")
    put_rows(path, [{"a": 4, "run": "y"}, {"a": 5, "run": "y"}], "y")
    assert [row["a"] for row in read_rows(path)] == [1, 2, 4, 5]
