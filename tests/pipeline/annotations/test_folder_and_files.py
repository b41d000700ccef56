"""Folders of one's own, the listing of videos, options from the command line, and text limits."""

import os
import unicodedata
from pathlib import Path
from typing import Literal

import pytest

from pipeline.annotations import READERS, AnnotationError, options_of, read
from pipeline.annotations import text as text_module
from pipeline.annotations.files import VideoIndex, annotation_files, list_videos, strip_suffix
from pipeline.annotations.report import ReportBuilder
from tests.pipeline.support import miniatures as mini


def test_class_folders_and_split_folders(tmp_path: Path) -> None:
    m = mini.own_folder(tmp_path / "a").touch()
    found = read(m.dataset, None, m.videos)
    assert found.classes == {"action": ("cats", "dogs")}
    assert {row.video.split("/")[0]: row.labels["action"] for row in found.rows} == {"cats": (0,), "dogs": (1,)}
    m = mini.own_folder(tmp_path / "b", "splits").touch()
    found = read(m.dataset, None, m.videos)
    assert {row.video.split("/")[0] for row in found.rows if row.split == "val"} == {"val"}
    assert found.classes == {"action": ("a", "b")}


def test_flat_folders_have_no_labels(tmp_path: Path) -> None:
    m = mini.own_folder(tmp_path, "flat").touch()
    found = read(m.dataset, None, m.videos, m.options)
    assert found.classes == {}
    assert all(row.labels == {} for row in found.rows)


def val_of(videos: Path, **options: str) -> set[str]:
    return {row.video for row in read("folder", None, videos, options).rows if row.split == "val"}


def test_new_videos_never_move_others_to_another_split(tmp_path: Path) -> None:
    drawn: set[str] = set()
    there: set[str] = set()
    for i in range(60):
        new = f"{'abc'[i % 3]}/{i}.mp4"
        mini.write(tmp_path / "v" / new)
        now = val_of(tmp_path / "v", val_fraction="0.2")
        assert now & there == drawn
        drawn, there = now, there | {new}
    assert len(drawn) == 15
    assert drawn <= val_of(tmp_path / "v", val_fraction="0.3")
    assert drawn != val_of(tmp_path / "v", val_fraction="0.2", seed="1")
    assert val_of(tmp_path / "v", val_fraction="0") == set()


def test_a_class_without_a_video_in_val_is_reported(tmp_path: Path) -> None:
    for i in range(30):
        mini.write(tmp_path / f"v/many/{i}.mp4")
    mini.write(tmp_path / "v/few/0.mp4")
    report = read("folder", None, tmp_path / "v", {"seed": "3"}).report
    assert [places for kind, places in report.examples.items() if kind.startswith("class without")] == [("few",)]


def test_files_in_split_folders_have_no_labels(tmp_path: Path) -> None:
    for path in ("train/a.mp4", "train/b.mp4", "val/c.mp4", "test/d.mp4"):
        mini.write(tmp_path / path)
    found = read("folder", None, tmp_path)
    assert found.classes == {}
    assert {row.video: row.split for row in found.rows} == {
        "train/a.mp4": "train",
        "train/b.mp4": "train",
        "val/c.mp4": "val",
        "test/d.mp4": "test",
    }


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (("train/a/1.mp4", "val/a/2.mp4", "3.mp4"), r"3\.mp4: a video beside the split folder train must be in one of"),
        (("train/a/1.mp4", "val/a/2.mp4", "extra/3.mp4"), r"extra/3\.mp4: .* move it, or rename train if that is a cl"),
        (("train/a/1.mp4", "val/2.mp4"), r"val/2\.mp4: a video beside class folders must be in one of them; move it"),
        (("a/1.mp4", "b/2.mp4", "3.mp4"), r"3\.mp4: a video beside class folders must be in one of them"),
    ],
)
def test_mixed_layouts_are_refused(paths: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    for path in paths:
        mini.write(tmp_path / path)
    with pytest.raises(AnnotationError, match=problem):
        read("folder", None, tmp_path)


@pytest.mark.parametrize("name", ["train", "Train", "val", "valid", "validation", "test"])
def test_names_of_split_folders(name: str, tmp_path: Path) -> None:
    mini.write(tmp_path / name / "a/1.mp4")
    (row,) = read("folder", None, tmp_path).rows
    assert row.split == {"valid": "val", "validation": "val"}.get(name, name.lower())


def test_csv_of_paths(tmp_path: Path) -> None:
    m = mini.own_folder(tmp_path, "csv").touch()
    found = read(m.dataset, m.annotations, m.videos)
    assert {row.video for row in found.rows if row.split == "val"} == {"cats/0.mp4", "dogs/0.mp4"}
    assert found.report.missing == ("dogs/gone.mp4",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("../a.mp4,x,train", "mine.csv:2: path"),
        ("pipe:0,x,train", "URL"),
        ("a.mp4,x,dev", r"mine.csv:2: split \('dev'\)"),
        ("a.mp4,x", "cells"),
        ("", "must list videos"),
    ],
)
def test_malformed_csv(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(AnnotationError, match=problem):
        read("folder", mini.write(tmp_path / "mine.csv", "path,label,split", line), tmp_path / "v")


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    mini.write(tmp_path / "v/a/1.webm")
    table = mini.write(tmp_path / "mine.csv", "path,label", "a/1.mp4,x", "v/a/1.mp4,y")
    with pytest.raises(AnnotationError, match=r"mine.csv:3: path \('v/a/1.mp4'\) must be another file than line 2"):
        read("folder", table, tmp_path / "v")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("path,lable,split", r"mine.csv:1: column \('lable'\) must be one of path, label, split.*did you mean label"),
        ("path,label,Split", "did you mean split"),
        ("path,label,fps", r"column \('fps'\).*remove this column"),
        ("path,label,label", r"column \('label'\).*each once"),
        ("file,label,split", r"column \('file'\)"),
    ],
)
def test_columns_that_are_not_known_are_refused(header: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read("folder", mini.write(tmp_path / "mine.csv", header, "a.mp4,x,train"), tmp_path)


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        mini.write(tmp_path / "v" / name)
    table = mini.write(tmp_path / "mine.csv", "path,label", "a.mp4,x", "b.mp4,", "c.mp4, ")
    report = read("folder", table, tmp_path / "v", {"val_fraction": "0"}).report
    assert report.oddities == {"row without a label": 2}
    assert report.examples["row without a label"] == ("mine.csv:3: b.mp4", "mine.csv:4: c.mp4")
    found = read("folder", mini.write(tmp_path / "mine.csv", "path", "a.mp4"), tmp_path / "v", {"val_fraction": "0"})
    assert found.report.oddities == {}
    assert found.report.layout == "CSV of paths and labels; no labels"


def test_what_is_not_used_is_reported(tmp_path: Path) -> None:
    deep = "/".join("abcdefghi")
    for path in (
        "a/1.asf",
        "a/2.ogg",
        "a/3.f4v",
        "a/4.rmvb",
        "a/notes.txt",
        ".hidden/5.mp4",
        "a/._6.mp4",
        f"{deep}/7.mp4",
    ):
        mini.write(tmp_path / "v" / path)
    found = read("folder", None, tmp_path / "v", {"val_fraction": "0"})
    assert sorted(found.videos) == ["a/1.asf", "a/2.ogg", "a/3.f4v"]
    assert found.report.examples == {
        "not used: hidden folder": (".hidden/",),
        "not used: hidden file": ("a/._6.mp4",),
        "not used: suffix .rmvb; convert or rename it": ("a/4.rmvb",),
        "not used: folder more than 8 levels deep": (f"{deep}/",),
    }
    m = mini.hmdb51(tmp_path / "hmdb").touch()
    mini.write(m.videos / ".cache/x.avi")
    assert read(m.dataset, m.annotations, m.videos).report.oddities["not used: hidden folder"] == 1


def test_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="must hold video files"):
        read("folder", None, tmp_path / "empty")
    mini.write(tmp_path / "empty/a.rmvb")
    with pytest.raises(AnnotationError, match=r"must hold video files .*\(not used: suffix \.rmvb"):
        read("folder", None, tmp_path / "empty")
    with pytest.raises(AnnotationError, match="must be a readable folder"):
        read("folder", None, tmp_path / "nowhere")


def test_listing_touches_no_file_and_follows_links_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(50):
        mini.write(tmp_path / f"v/class {i % 5}/{i}.mp4")
    mini.write(tmp_path / "elsewhere/z.mkv")
    os.symlink(tmp_path / "elsewhere", tmp_path / "v/link")
    os.symlink(tmp_path / "v", tmp_path / "v/loop")
    calls: list[object] = []
    original = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    monkeypatch.setattr(Path, "stat", lambda *args, **kwargs: calls.append(args))
    listing = list_videos(tmp_path / "v")
    assert calls == []
    assert listing.unstorable == ()
    assert listing.left_out == (("loop/", "link to a folder that is listed already"),)
    assert "link/z.mkv" in listing.paths
    assert len(listing.paths) == 51


def test_a_link_to_itself_is_one_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("v/a.mp4", "v/b.mp4"):
        mini.write(tmp_path / name)
    os.symlink("loop.mp4", tmp_path / "v/loop.mp4")
    os.symlink("loop.csv", tmp_path / "v/loop.csv")
    assert list_videos(tmp_path / "v").paths == ("a.mp4", "b.mp4", "loop.mp4")  # the third is refused by the ingest
    assert annotation_files(mini.write(tmp_path / "v/train.csv", "x").parent, (".csv",)) == [tmp_path / "v/train.csv"]


def test_files_of_one_name_are_told_apart_or_told(tmp_path: Path) -> None:
    for name in ("480/x.mp4", "full/x.mp4", "full/y.mp4"):
        mini.write(tmp_path / name)
    report = ReportBuilder("test")
    index = VideoIndex(tmp_path, report)
    assert [index.find("x"), index.find("x.mkv"), index.find("y")] == ["480/x.mp4", "480/x.mp4", "full/y.mp4"]
    built = report.build(0)
    assert built.oddities == {"several files of this name, the first taken": 1}
    assert any("480/x.mp4, full/x.mp4" in line for line in built.lines())
    other = ReportBuilder("test")
    assert VideoIndex(tmp_path, other).find("x", prefer=lambda path: path.startswith("480")) == "full/x.mp4"
    assert other.build(0).oddities == {}


def test_names_that_no_store_can_hold_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in (b"good.mp4", b"bad\n.mp4", b"back\\slash.mp4", b"latin\xe9.mp4"):
        (Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name))).touch()
    assert list_videos(tmp_path).paths == ("a/good.mp4",)
    report = read("folder", None, tmp_path, {"val_fraction": "0"}).report
    assert report.oddities == {"video file with a name that no store can hold": 3}


def test_suffixes() -> None:
    assert strip_suffix("P01_01.MP4") == "P01_01"
    assert strip_suffix("a.b.webm") == "a.b"
    assert strip_suffix("a.b") == "a.b"
    assert strip_suffix(".mp4") == ""


def test_options_are_converted_and_checked(tmp_path: Path) -> None:
    assert options_of("kinetics400") == {"classes": "Path | None = None", "untrimmed": "bool = False"}
    assert set(options_of("ava")) == {"version", "min_score", "min_iou", "detections", "cut_start_s"}
    assert set(options_of("folder")) == {"val_fraction", "seed"}
    with pytest.raises(AnnotationError, match=r"option \(min_scor\) must be one of .*did you mean min_score"):
        read("ava", tmp_path, tmp_path, {"min_scor": "1"})
    with pytest.raises(AnnotationError, match=r"option untrimmed \(yes\) must be true or false"):
        read("kinetics400", tmp_path, tmp_path, {"untrimmed": "yes"})
    with pytest.raises(AnnotationError, match=r"option seed \(x\) must be a whole number"):
        read("folder", tmp_path, tmp_path, {"seed": "x"})
    with pytest.raises(AnnotationError, match=r"data set \(kinetics\) must be one of .*did you mean kinetics"):
        read("kinetics", tmp_path, tmp_path)


@pytest.mark.parametrize("name", [name for name in READERS if name != "folder"])
def test_readers_without_their_files_say_which_are_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="give --annotations"):
        read(name, None, tmp_path)
    with pytest.raises(AnnotationError, match=r"annotations .* must"):
        read(name, tmp_path, tmp_path)
    with pytest.raises(AnnotationError, match="check --annotations"):
        read(name, tmp_path / "nowhere", tmp_path)


def test_text_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_LINE_BYTES", 64)
    with pytest.raises(AnnotationError, match=r"x.csv:2: line \('64 bytes'\)"):
        list(text_module.read_lines(mini.write(tmp_path / "x.csv", "a", "b" * 100)))
    monkeypatch.setattr(text_module, "MAX_FILE_BYTES", 10)
    with pytest.raises(AnnotationError, match="at most 1 GiB"):
        list(text_module.read_lines(tmp_path / "x.csv"))
    (tmp_path / "y.csv").write_bytes(b"a\n\xff\xfe\n")
    monkeypatch.setattr(text_module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(AnnotationError, match=r"y.csv:2: text .* must be UTF-8"):
        list(text_module.read_lines(tmp_path / "y.csv"))


def test_lines_of_quoted_cells_with_line_breaks_are_counted(tmp_path: Path) -> None:
    path = mini.write(tmp_path / "x.csv", 'a,"b', 'c"', "d,e", 'f,"g')
    rows = text_module.read_cells(path)
    assert next(rows) == (1, ["a", "b\nc"])
    assert next(rows) == (3, ["d", "e"])
    with pytest.raises(AnnotationError, match=r"x.csv:4"):
        next(rows)


@pytest.mark.parametrize("name", ["id.mp4.webm", "id.mp4.mkv", "id.f137.mp4", "id.mp4.f251-drc.webm", "id.webm"])
def test_what_downloaders_make_of_a_name_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).touch()
    index = VideoIndex(tmp_path, ReportBuilder("test"))
    assert index.find("id") == index.find("id.mp4") == index.find_path("train/id.mp4") == f"train/{name}"


def test_the_name_as_it_is_comes_before_what_a_downloader_made_of_it(tmp_path: Path) -> None:
    for name in ("goal.f1.mp4", "goal.mp4"):
        (tmp_path / name).touch()
    index = VideoIndex(tmp_path, ReportBuilder("test"))
    assert (index.find("goal"), index.find("goal.f1")) == ("goal.mp4", "goal.f1.mp4")


def test_accents_written_apart_are_the_same_class(tmp_path: Path) -> None:
    for number, name in enumerate(("Café", "Cafe\u0301", "Tea")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{number}.mp4").touch()
    data = read("folder", None, tmp_path, {"val_fraction": "0"})
    assert data.classes["action"] == ("Café", "Tea")
    assert sorted(row.labels["action"] for row in data.rows) == [(0,), (0,), (1,)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("folder", "listed"), [("Café", "Café/id.mp4"), ("Niño", "Niño/id.mp4"), ("가위", "가위/id.mp4")]
)
def test_accents_of_paths_may_be_written_apart(folder: str, listed: str, apart: bool, tmp_path: Path) -> None:
    form: Literal["NFC", "NFD"] = "NFD" if apart else "NFC"
    other: Literal["NFC", "NFD"] = "NFC" if apart else "NFD"
    place = tmp_path / unicodedata.normalize(form, folder)
    place.mkdir()
    (place / "id.mp4.webm").touch()
    found = VideoIndex(tmp_path, ReportBuilder("test")).find_path(unicodedata.normalize(other, listed))
    assert found == f"{place.name}/id.mp4.webm"
    (tmp_path / unicodedata.normalize(other, folder)).mkdir()
    (tmp_path / unicodedata.normalize(other, folder) / "b.mp4").touch()
    data = read("folder", None, tmp_path, {"val_fraction": "0"})
    assert data.classes["action"] == (unicodedata.normalize("NFC", folder),)
    assert [row.labels["action"] for row in data.rows] == [(0,), (0,)]
