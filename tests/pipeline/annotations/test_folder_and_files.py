"""Folders of one's own, the listing of videos, options from the command line, and text limits."""

import os
from collections import Counter
from pathlib import Path

import pytest

from pipeline.annotations import READERS, AnnotationError, options_of, read
from pipeline.annotations import text as text_module
from pipeline.annotations.files import VideoIndex, list_videos, strip_suffix
from tests.pipeline import miniatures as mini


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


def test_the_drawn_part_is_stable_per_class_and_changes_with_the_seed(tmp_path: Path) -> None:
    for label, number in (("a", 20), ("b", 10), ("c", 1)):
        for i in range(number):
            mini.write(tmp_path / f"v/{label}/{i}.mp4")

    def val(**options: str) -> set[str]:
        return {row.video for row in read("folder", None, tmp_path / "v", options).rows if row.split == "val"}

    first = val(val_fraction="0.2")
    assert Counter(video[0] for video in first) == {"a": 4, "b": 2}
    assert first == val(val_fraction="0.2")
    assert first != val(val_fraction="0.2", seed="1")
    assert val(val_fraction="0") == set()
    mini.write(tmp_path / "v/b/new.mp4")
    assert {video for video in val(val_fraction="0.2") if video[0] == "a"} == {
        video for video in first if video[0] == "a"
    }


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


def test_stray_files_and_empty_folders(tmp_path: Path) -> None:
    for path in ("a/1.mp4", "b/2.mp4", "3.mp4", "a/notes.txt", ".hidden/4.mp4"):
        mini.write(tmp_path / "v" / path)
    report = read("folder", None, tmp_path / "v").report
    assert report.dropped == {"video beside the class folders, without a label": 1}
    assert report.listed == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="must hold video files"):
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
    paths, refused = list_videos(tmp_path / "v")
    assert calls == []
    assert refused == ()
    assert "link/z.mkv" in paths
    assert len(paths) == 51


def test_names_that_no_store_can_hold_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in (b"good.mp4", b"bad\n.mp4", b"back\\slash.mp4", b"latin\xe9.mp4"):
        (Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name))).touch()
    index = VideoIndex(tmp_path)
    assert index.paths == ("a/good.mp4",)
    assert len(index.refused) == 3
    assert read("folder", None, tmp_path).report.oddities == {"video file with a name that no store can hold": 3}


def test_suffixes() -> None:
    assert strip_suffix("P01_01.MP4") == "P01_01"
    assert strip_suffix("a.b.webm") == "a.b"
    assert strip_suffix("a.b") == "a.b"
    assert strip_suffix(".mp4") == ""


def test_options_are_converted_and_checked(tmp_path: Path) -> None:
    assert options_of("kinetics400") == {"classes": "Path | None = None", "untrimmed": "bool = False"}
    assert set(options_of("ava")) == {"version", "min_score", "min_iou", "cut_start_s"}
    assert set(options_of("folder")) == {"val_fraction", "seed"}
    with pytest.raises(AnnotationError, match=r"option \(min_scor\) must be one of .*did you mean min_score"):
        read("ava", tmp_path, tmp_path, {"min_scor": "1"})
    with pytest.raises(AnnotationError, match=r"option untrimmed \(yes\) must be true or false"):
        read("kinetics400", tmp_path, tmp_path, {"untrimmed": "yes"})
    with pytest.raises(AnnotationError, match=r"option seed \(x\) must be int"):
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
