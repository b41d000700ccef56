"""Rows, boxes and path confinement: what is accepted, and what each refusal says."""

import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.annotations import AnnotationError, Annotations, Box, Report, Row, TimedLabel, confine

REFUSED = [
    ("", "empty"),
    ("  ", "empty"),
    ("/etc/passwd", "absolute"),
    ("/", "absolute"),
    ("../x.mp4", r"'\.\.'"),
    ("a/../../x.mp4", r"'\.\.'"),
    ("a/..", r"'\.\."),
    ("http://host/x.mp4", "URL"),
    ("pipe:0", "URL"),
    ("pipe:", "URL"),
    ("./pipe:0", "URL"),
    ("file:x.mp4", "URL"),
    ("concat:a.mp4|b.mp4", "URL"),
    ("subfile,,start,0,end,9,,:x.mp4", "URL"),
    ("C:\\x.mp4", "backslash"),
    ("..\\x.mp4", "backslash"),
    ("a\x00.mp4", "NUL"),
    ("a\nb.mp4", "control"),
    ("\ud800.mp4", "Unicode"),
    ("a" * 300, "255"),
    ("a/" * 600, "1024"),
    (".", "name a file"),
    (" /", "name a file"),
]


@pytest.mark.parametrize(("path", "rule"), REFUSED)
def test_paths_that_leave_the_folder_are_refused(path: str, rule: str) -> None:
    with pytest.raises(AnnotationError, match=rule):
        confine(path)
    with pytest.raises(AnnotationError):
        confine(path, "/videos")


def test_accepted_paths_are_normalised() -> None:
    assert confine("a//./b.mp4") == "a/b.mp4"
    assert confine("#20_(Rhythm)_clap!_&;$x.avi") == "#20_(Rhythm)_clap!_&;$x.avi"
    assert confine("-5KQ66BBWC4.mkv") == "-5KQ66BBWC4.mkv"
    assert confine("/videos/a/b.mp4", "/videos") == "a/b.mp4"
    assert confine("/videos/a/b.mp4", "/videos/") == "a/b.mp4"


@pytest.mark.parametrize(
    "path", ["/videos", "/videos2/b.mp4", "/other/b.mp4", "/videos/../etc/passwd", "/videos/pipe:0"]
)
def test_absolute_paths_outside_the_root_are_refused(path: str) -> None:
    with pytest.raises(AnnotationError):
        confine(path, "/videos")


@settings(deadline=None, database=None, max_examples=300)
@example(" /")
@given(st.text(st.sampled_from("a./\\:~ \x00\n-é|%"), max_size=24))
def test_whatever_is_accepted_stays_below_the_root(path: str) -> None:
    try:
        accepted = confine(path)
    except ValueError:
        return
    joined = Path("/root/videos") / accepted
    assert joined.is_relative_to("/root/videos")
    assert ".." not in joined.parts
    assert confine(accepted) == accepted


@pytest.mark.parametrize(
    "corners",
    [(0.5, 0, 0.4, 1), (0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1.1, 1), (math.nan, 0, 1, 1), (0, 0, 1, 640)],
)
def test_bad_boxes_are_refused(corners: tuple[float, float, float, float]) -> None:
    with pytest.raises(AnnotationError, match="box"):
        Box(*corners)


def test_bad_rows_are_refused() -> None:
    for start, end in ((-1.0, None), (2.0, 2.0), (3.0, 2.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(AnnotationError, match="span"):
            Row("a", "train", "a.mp4", start, end)
    with pytest.raises(AnnotationError, match="split"):
        Row("a", "../train", "a.mp4")
    with pytest.raises(AnnotationError, match="id"):
        Row("a\nb", "train", "a.mp4")
    with pytest.raises(AnnotationError, match="plain path"):
        Row("a", "train", "x//a.mp4")
    with pytest.raises(AnnotationError, match="key frame"):
        Row("a", "train", "a.mp4", boxes=(Box(0, 0, 1, 1),))
    with pytest.raises(AnnotationError, match="label"):
        Row("a", "train", "a.mp4", labels={"action": (-1,)})
    with pytest.raises(AnnotationError, match="label set"):
        Row("a", "train", "a.mp4", labels={"a/b": (1,)})
    with pytest.raises(AnnotationError, match="times"):
        TimedLabel(0, 2.0, 1.0)


def test_annotations_check_ids_and_labels() -> None:
    report = Report("x")
    row = Row("a", "train", "a.mp4", labels={"action": (1,)})
    same = Row("a", "val", "a.mp4", labels={"action": (0,)})
    assert Annotations("x", (row, same), {"action": ("p", "q")}, report).splits == ("train", "val")
    assert Annotations("x", (row, same), {"action": ("p", "q")}, report).videos == ("a.mp4",)
    with pytest.raises(AnnotationError, match="unique"):
        Annotations("x", (row, row), {"action": ("p", "q")}, report)
    with pytest.raises(AnnotationError, match="below the 1 classes"):
        Annotations("x", (row,), {"action": ("p",)}, report)
    with pytest.raises(AnnotationError, match="below the 0 classes"):
        Annotations("x", (row,), {}, report)
    timed = Row("a", "train", "a.mp4", actions=(TimedLabel(2, 0, 1),))
    with pytest.raises(AnnotationError, match="action 2"):
        Annotations("x", (timed,), {"action": ("p", "q")}, report)
    boxed = Row("a", "train", "a.mp4", key_time_s=1.0, boxes=(Box(0, 0, 1, 1, (5,)),))
    with pytest.raises(AnnotationError, match="action 5"):
        Annotations("x", (boxed,), {"action": ("p", "q")}, report)
