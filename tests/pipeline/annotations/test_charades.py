"""Traps of Charades."""

from pathlib import Path

import pytest

from pipeline.annotations import AnnotationError, Annotations, TimedLabel, read
from tests.pipeline.support import miniatures as mini

HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


def read_actions(tmp_path: Path, actions: str, length: str = "10.0") -> Annotations:
    table = mini.write(tmp_path / "Charades_v1_train.csv", HEADER, f"AAAAA,B,C,6,6,Yes,x,y,z,{actions},{length}")
    mini.write(tmp_path / "videos/AAAAA.mp4")
    return read("charades", table, tmp_path / "videos")


def test_union_times_and_empty_actions(tmp_path: Path) -> None:
    m = mini.charades(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    rows = {row.id: row for row in found.rows}
    assert rows["46GP8"].labels == {"action": (92, 147)}
    assert rows["46GP8"].actions == (TimedLabel(92, 1.9, 4.2), TimedLabel(147, 0.0, 2.6))
    assert rows["N11GT"].labels == {"action": (75, 98)}
    assert len(rows["N11GT"].actions) == 3
    assert (rows["0IH69"].labels, rows["0IH69"].actions) == ({"action": ()}, ())
    assert rows["YSKX3"].split == "val"
    assert rows["YSKX3"].labels == {"action": (106, 156)}
    assert found.report.oddities == {"video without actions": 2, "action that ends after the video": 2}
    assert found.report.missing == ("GONE1",)
    assert found.classes["action"][92] == "Doing thing 92/somewhere"
    assert len(found.classes["action"]) == 157


def test_the_class_list_beside_a_single_csv_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = mini.charades(tmp_path).touch()
    monkeypatch.chdir(m.annotations)
    for table in (m.annotations / "Charades_v1_test.csv", Path("Charades_v1_test.csv")):
        found = read(m.dataset, table, m.videos)
        assert found.classes["action"][92] == "Doing thing 92/somewhere"
        assert found.splits == ("val",)


def test_an_end_after_the_length_is_kept_as_annotated(tmp_path: Path) -> None:
    found = read_actions(tmp_path, "c015 0.00 32.00", "31.38")
    assert found.rows[0].actions == (TimedLabel(15, 0.0, 32.0),)
    assert found.report.examples["action that ends after the video"][0].startswith(
        "Charades_v1_train.csv:2: AAAAA c015"
    )


def test_counts_are_put_beside_the_published_ones(tmp_path: Path) -> None:
    m = mini.charades(tmp_path).touch()
    counts = {c.what: (c.found, c.expected) for c in read(m.dataset, m.annotations, m.videos).report.counts}
    assert counts["videos of train"] == (5, 7_985)
    assert counts["videos of val"] == (2, 1_863)
    assert counts["classes"] == (157, 157)


@pytest.mark.parametrize(
    ("actions", "problem"),
    [
        ("c157 0.00 1.00", r"Charades_v1_train.csv:2: class \('157'\)"),
        ("c1 0.00 1.00", r"action \('c1 0.00 1.00'\) must look like"),
        ("c001 0.00", "action"),
        ("c001 0.00 nan", r"end \('nan'\)"),
        ("c001 -1 2", r"start \('-1'\)"),
        ("c001 0,1", "cells"),
    ],
)
def test_malformed_actions(actions: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read_actions(tmp_path, actions)


def test_the_class_list_must_count_up(tmp_path: Path) -> None:
    m = mini.charades(tmp_path).touch()
    mini.write(m.annotations / "Charades_v1_classes.txt", "c000 One", "c002 Three")
    with pytest.raises(AnnotationError, match=r"Charades_v1_classes.txt:2: class \('c002 Three'\)"):
        read(m.dataset, m.annotations, m.videos)


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    row = "AAAAA,B,C,6,6,Yes,x,y,z,,10"
    with pytest.raises(AnnotationError, match="each video once"):
        read("charades", mini.write(tmp_path / "Charades_v1_test.csv", HEADER, row, row), tmp_path)
