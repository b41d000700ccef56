"""Traps of EPIC-Kitchens-55 and -100."""

from pathlib import Path

import pytest

from pipeline.annotations import AnnotationError, Annotations, read
from tests.pipeline.support import miniatures as mini

ROW = "0,P01,P01_01,open door,00:00:00.14,00:00:03.37,8,202,open,2,door,8,['door'],[8]"


def read_row(tmp_path: Path, row: str) -> Annotations:
    mini.write(tmp_path / "videos/P01_01.MP4")
    return read("epic_kitchens55", mini.write(tmp_path / "labels.csv", mini.EPIC55_HEADER, row), tmp_path / "videos")


def test_times_come_from_time_stamps_of_two_and_three_digits(tmp_path: Path) -> None:
    m = mini.epic55(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    spans = {row.id: (row.start_s, row.end_s) for row in found.rows if row.split in ("train", "val")}
    assert spans == {"0": (0.14, 3.37), "1": (4.37, 5.205), "2": (1.0, 1.5), "3": (0.0, 0.3), "4": (4.1, 6.0)}
    assert found.report.missing == ("P30_07",)


def test_split_by_person(tmp_path: Path) -> None:
    m = mini.epic55(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    splits = {row.id: row.split for row in found.rows if row.labels}
    assert splits == {"0": "train", "1": "train", "2": "train", "3": "val", "4": "val"}
    whole = read(m.dataset, m.annotations, m.videos, {"split": "all"})
    assert {row.split for row in whole.rows if row.labels} == {"train"}
    with pytest.raises(AnnotationError, match="paper or all"):
        read(m.dataset, m.annotations, m.videos, {"split": "random"})


def test_labels_classes_and_counts_of_55(tmp_path: Path) -> None:
    m = mini.epic55(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    assert (len(found.classes["verb"]), len(found.classes["noun"])) == (125, 352)
    first = next(row for row in found.rows if row.id == "0")
    assert first.labels == {"verb": (2,), "noun": (8,)}
    assert found.classes["noun"][8] == "noun:8"
    tests = {row.split: (row.id, dict(row.labels)) for row in found.rows if row.split.startswith("test")}
    assert tests == {"test_s1": ("1924", {}), "test_s2": ("7", {})}
    expected = {count.what: count.expected for count in found.report.counts}
    assert expected["rows of train"] == 23_191
    assert expected["rows of val"] == 5_281
    assert expected["rows of test_s1"] == 8_047
    assert expected["rows of test_s2"] == 2_929


def test_the_pickle_is_never_opened(tmp_path: Path) -> None:
    m = mini.epic55(tmp_path).touch()
    pickle = m.annotations / "EPIC_train_action_labels.pkl"
    with pytest.raises(AnnotationError, match=r"a pickle can run code; give the CSV"):
        read(m.dataset, pickle, m.videos)
    (m.annotations / "EPIC_train_action_labels.csv").unlink()
    found = read(m.dataset, m.annotations, m.videos)
    assert {row.split for row in found.rows} == {"test_s1", "test_s2"}


def test_one_file_without_class_lists(tmp_path: Path) -> None:
    found = read_row(tmp_path, ROW)
    assert found.classes["verb"][2] == "verb 2"
    assert found.rows[0].labels == {"verb": (2,), "noun": (8,)}
    assert "no verb names" in found.report.oddities


def test_epic100_ids_labels_and_times_without_fraction(tmp_path: Path) -> None:
    m = mini.epic100(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    rows = {row.id: row for row in found.rows}
    assert rows["P01_01_0"].labels == {"verb": (3,), "noun": (3,)}
    assert rows["P28_101_7"].split == "train"
    assert rows["P28_101_7"].end_s == 2.257
    assert rows["P28_101_7"].video == "P28/videos/P28_101.MP4"
    assert rows["P01_11_0"].split == "val"
    assert rows["P01_101_0"].labels == {}
    assert (len(found.classes["verb"]), len(found.classes["noun"])) == (97, 300)
    expected = {count.what: count.expected for count in found.report.counts}
    assert (expected["rows of train"], expected["rows of val"]) == (67_217, 9_668)


def test_both_editions_in_one_folder_keep_their_own_files(tmp_path: Path) -> None:
    both = mini.epic55(tmp_path).touch(), mini.epic100(tmp_path).touch()
    sizes = {"epic_kitchens55": (125, 352), "epic_kitchens100": (97, 300)}
    for m in both:
        alone = mini.MINIATURES[m.dataset](tmp_path / m.dataset).touch()
        found, expected = (read(m.dataset, x.annotations, x.videos) for x in (m, alone))
        assert found.classes == expected.classes
        assert (len(found.classes["verb"]), len(found.classes["noun"])) == sizes[m.dataset]
        assert {row.id: row.labels for row in found.rows} == {row.id: row.labels for row in expected.rows}


def test_more_names_than_classes_are_refused(tmp_path: Path) -> None:
    m = mini.epic100(tmp_path).touch()
    path = mini.write(m.annotations / "EPIC_100_verb_classes.csv", "id,key", *(f"{i},v{i}" for i in range(125)))
    problem = r"EPIC_100_verb_classes.csv: verb names \('125'\) must be at most the 97 classes of epic_kitchens100"
    with pytest.raises(AnnotationError, match=problem):
        read(m.dataset, m.annotations, m.videos)
    path.unlink()
    found = read(m.dataset, m.annotations, m.videos)
    assert found.classes["verb"][3] == "verb 3"
    assert found.report.examples["no verb names"][0].startswith("put EPIC_100_verb_classes.csv beside")


def test_class_lists_beside_a_single_file_are_used(tmp_path: Path) -> None:
    m = mini.epic55(tmp_path).touch()
    found = read(m.dataset, m.annotations / "EPIC_train_action_labels.csv", m.videos)
    assert found.classes["noun"][8] == "noun:8"
    assert found.splits == ("train", "val")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("P01_01,", "P1_01,", r"labels.csv:2: video_id \('P1_01'\)"),
        ("P01_01,", "../P01_01,", "video_id"),
        ("00:00:03.37", "00:00:00.10", r"stop_timestamp \('00:00:00.10'\) must not lie before"),
        ("00:00:03.37", "3.37", "HH:MM:SS"),
        ("00:00:03.37", "00:61:03.37", "HH:MM:SS"),
        ("open,2", "open,125", r"verb_class \('125'\) must be an integer in \[0, 124\]"),
        ("door,8", "door,-1", "noun_class"),
        ("door,8", "door,8.0", "noun_class"),
        ("0,P01", "0 0,P01", "uid"),
        (",['door']", "", "cells"),
    ],
)
def test_malformed_rows(old: str, new: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read_row(tmp_path, ROW.replace(old, new, 1))


def test_a_segment_without_length_is_kept_and_counted(tmp_path: Path) -> None:
    found = read_row(tmp_path, ROW.replace("00:00:03.37", "00:00:00.14"))
    assert (found.rows[0].start_s, found.rows[0].end_s) == (0.14, pytest.approx(0.141))
    assert found.report.oddities["segment without length, taken as 1 ms"] == 1


def test_a_repeated_uid_is_refused(tmp_path: Path) -> None:
    table = mini.write(tmp_path / "labels.csv", mini.EPIC55_HEADER, ROW, ROW)
    with pytest.raises(AnnotationError, match=r"labels.csv:3: id \('0'\) must be unique"):
        read("epic_kitchens55", table, tmp_path)
