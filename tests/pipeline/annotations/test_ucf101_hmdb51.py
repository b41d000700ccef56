"""Traps of UCF101 and HMDB51."""

from pathlib import Path

import pytest

from pipeline.annotations import AnnotationError, read
from tests.pipeline.support import miniatures as mini


def test_handstand_pushups_are_found_whatever_their_spelling(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    row = next(row for row in found.rows if row.id == "HandstandPushups/v_HandstandPushups_g01_c01.avi")
    assert row.video == "HandstandPushups/v_HandStandPushups_g01_c01.avi"
    assert row.labels == {"action": (1,)}
    assert found.classes["action"] == ("ApplyEyeMakeup", "HandstandPushups")
    assert found.report.oddities["file called differently (case or suffix)"] == 9
    assert found.report.missing == ()


def test_three_splits_do_not_mix(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    for number in "123":
        parts = {part: {row.id for row in found.rows if row.split == part + number} for part in ("train", "val")}
        assert parts["train"] & parts["val"] == set()
        assert len(parts["train"] | parts["val"]) == 6
    one = read(m.dataset, m.annotations, m.videos, {"split": "2"})
    assert one.splits == ("val2", "train2")
    with pytest.raises(AnnotationError, match=r"split \(4\)"):
        read(m.dataset, m.annotations, m.videos, {"split": "4"})


def test_missing_lists_are_named(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    m.annotations.joinpath("testlist03.txt").unlink()
    with pytest.raises(AnnotationError, match=r"must hold testlist03.txt: a split has both lists"):
        read(m.dataset, m.annotations, m.videos)
    assert read(m.dataset, m.annotations, m.videos, {"split": "2"}).splits == ("val2", "train2")
    m.annotations.joinpath("trainlist03.txt").unlink()
    with pytest.raises(AnnotationError, match=r"trainlist03.txt / testlist03.txt"):
        read(m.dataset, m.annotations, m.videos, {"split": "3"})


def test_converted_and_flat_copies_are_found(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path)
    for path in m.files:
        mini.write(m.videos / (path.rpartition("/")[2].removesuffix(".avi") + ".mp4"))
    assert len(read(m.dataset, m.annotations, m.videos).rows) == 18


def test_published_counts_of_ucf101(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    expected = {c.what: c.expected for c in read(m.dataset, m.annotations, m.videos).report.counts}
    assert expected["rows of train1"] + expected["rows of val1"] == 13_320
    assert expected["rows of train2"] + expected["rows of val2"] == 13_320
    assert expected["rows of train3"] + expected["rows of val3"] == 13_320
    assert expected["videos"] == 13_320
    assert expected["classes"] == 101


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("ApplyEyeMakeup/v_x.avi 2", r"trainlist01.txt:1: class number \('2'\) must be 1, that of ApplyEyeMakeup"),
        ("Nothing/v_x.avi 1", r"class folder \('Nothing'\)"),
        ("v_x.avi 1", "class folder"),
        ("../v_x.avi 1", r"trainlist01.txt:1: path"),
        ("/etc/v_x.avi 1", "absolute"),
        ("ApplyEyeMakeup/v_x.avi 1 2", "line"),
        ("ApplyEyeMakeup/v_x.avi x", "class number"),
    ],
)
def test_malformed_ucf101_lists(line: str, problem: str, tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    mini.write(m.annotations / "trainlist01.txt", line)
    with pytest.raises(AnnotationError, match=problem):
        read(m.dataset, m.annotations, m.videos)


def test_malformed_class_index(tmp_path: Path) -> None:
    m = mini.ucf101(tmp_path).touch()
    mini.write(m.annotations / "classInd.txt", "1 ApplyEyeMakeup", "3 HandstandPushups")
    with pytest.raises(AnnotationError, match=r"classInd.txt:2: class \('3 HandstandPushups'\)"):
        read(m.dataset, m.annotations, m.videos)


def test_flags_of_hmdb51(tmp_path: Path) -> None:
    m = mini.hmdb51(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    assert set(found.splits) == {"train1", "val1", "train2", "val2", "train3", "val3"}
    # Split 1 has the flags 1, 2, 0 for the three videos of a class.
    odd = "brush_hair/#20_(Rhythm)_clap!_u_nm_np1_fr_goo_0.avi"
    parts = {row.split for row in found.rows if row.video == odd}
    assert parts == {"train1", "val2"}
    assert found.report.dropped == {"unused by its split (flag 0)": 6}
    assert found.classes["action"] == ("brush_hair", "wave")
    assert {row.labels["action"] for row in found.rows if row.video.startswith("wave/")} == {(1,)}


def test_one_split_and_published_counts_of_hmdb51(tmp_path: Path) -> None:
    m = mini.hmdb51(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos, {"split": "1"})
    assert found.splits == ("train1", "val1")
    expected = {c.what: c.expected for c in found.report.counts}
    assert (expected["rows of train1"], expected["rows of val1"], expected["classes"]) == (3_570, 1_530, 51)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a.avi 3", r"wave_test_split1.txt:1: flag \('3'\)"),
        ("a.avi", "flag"),
        ("../a.avi 1", r"wave_test_split1.txt:1: path"),
        ("x/a.avi 1", "plain file name"),
        ("pipe:0 1", "URL"),
    ],
)
def test_malformed_hmdb51_splits(line: str, problem: str, tmp_path: Path) -> None:
    m = mini.hmdb51(tmp_path).touch()
    mini.write(m.annotations / "wave_test_split1.txt", line)
    with pytest.raises(AnnotationError, match=problem):
        read(m.dataset, m.annotations, m.videos)


def test_hmdb51_never_takes_a_video_of_another_class(tmp_path: Path) -> None:
    for label in ("jump", "wave"):
        mini.write(tmp_path / f"s/{label}_test_split1.txt", "a.avi 1", "b.avi 1")
    mini.write(tmp_path / "videos/jump/a.avi")
    mini.write(tmp_path / "videos/b.avi")
    found = read("hmdb51", tmp_path / "s", tmp_path / "videos")
    assert [row.id for row in found.rows] == ["jump/a.avi", "jump/b.avi", "wave/b.avi"]
    assert found.report.missing == ("wave/a.avi",)


def test_hmdb51_prefers_the_class_folder(tmp_path: Path) -> None:
    mini.write(tmp_path / "s/wave_test_split1.txt", "a.avi 1")
    for folder in ("jump", "wave"):
        mini.write(tmp_path / f"videos/{folder}/a.avi")
    assert read("hmdb51", tmp_path / "s", tmp_path / "videos").rows[0].video == "wave/a.avi"


def test_hidden_files_are_no_classes(tmp_path: Path) -> None:
    m = mini.hmdb51(tmp_path).touch()
    mini.write(m.annotations / "._brush_hair_test_split1.txt", "\x01\x02")  # macOS puts it beside the list
    found = read(m.dataset, m.annotations, m.videos)
    assert found.classes["action"] == ("brush_hair", "wave")
    assert len(found.rows) == 12
    kind = "labels are those of 2 classes, not of the 51 published ones; give the split files of all classes"
    assert found.report.examples[kind] == ("label 0 is 'brush_hair'",)


def test_a_split_without_lists_is_an_error(tmp_path: Path) -> None:
    mini.write(tmp_path / "s/wave_test_split1.txt", "a.avi 1")
    mini.write(tmp_path / "videos/a.avi")
    with pytest.raises(AnnotationError, match=r"split \(2\) must be one whose lists are in .*s: 1; unpack"):
        read("hmdb51", tmp_path / "s", tmp_path / "videos", {"split": "2"})
    assert len(read("hmdb51", tmp_path / "s", tmp_path / "videos", {"split": "1"}).rows) == 1
