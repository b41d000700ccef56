"""Traps of AVA v2.1 and v2.2."""

from pathlib import Path

import pytest

from pipeline.annotations import AnnotationError, Annotations, Row, read
from pipeline.annotations.ava_files import overlap, read_action_list
from tests.pipeline.support import miniatures as mini

LINE = "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1"


def read_lines(tmp_path: Path, *lines: str, boxes: tuple[str, ...] = (), **options: str) -> Annotations:
    mini.write(tmp_path / "a/ava_val_v2.2.csv", *lines)
    if boxes:
        mini.write(tmp_path / "a/ava_val_predicted_boxes.csv", *boxes)
    mini.write(tmp_path / "videos/-5KQ66BBWC4.mkv")
    return read("ava", tmp_path / "a", tmp_path / "videos", options)


def by_id(found: Annotations) -> dict[str, Row]:
    return {row.id: row for row in found.rows}


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_boxes_labels_and_times(version: str, tmp_path: Path) -> None:
    m = mini.ava(tmp_path, version).touch()
    found = read(m.dataset, m.annotations, m.videos)
    row = by_id(found)["-5KQ66BBWC4,0902"]
    assert (row.split, row.video, row.key_time_s, row.start_s, row.end_s) == ("train", "-5KQ66BBWC4.mkv", 2.0, 0.5, 3.5)
    first, second, matched = row.boxes
    assert (first.x1, first.y1, first.x2, first.y2) == (0.077, 0.151, 0.283, 0.811)
    assert (first.labels, first.person, first.score) == ((8, 79), 1, 1.0)  # ids 9 and 80, counted from 1 in the file
    assert (second.labels, second.person) == ((11,), 2)
    assert (matched.labels, matched.person, matched.score) == ((8, 79), -1, 0.99)
    assert f"AVA v{version}" in found.report.layout
    assert "files start at second 900 of the film" in found.report.layout


def test_columns_7_and_8_mean_other_things_in_detections(tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    rows = by_id(read(m.dataset, m.annotations, m.videos))
    truth, *detections = rows["1j20qq1JyX4,0902"].boxes
    assert (truth.labels, truth.score, truth.person) == ((11, 79), 1.0, 0)
    assert [(box.labels, box.score) for box in detections] == [((), 0.995518), ((), 0.8)]
    assert [bool(box.labels) for box in rows["1j20qq1JyX4,0903"].boxes] == [True]


def test_excluded_missing_and_lost_are_counted(tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    report = read(m.dataset, m.annotations, m.videos).report
    assert report.dropped == {"excluded time stamp": 2}
    assert report.missing == ("GONE0000000",)
    counts = {c.what: (c.found, c.expected) for c in report.counts}
    assert counts["detected boxes of val used"] == (3, None)
    assert counts["detected boxes of val below score 0.8"] == (1, None)
    assert counts["detected boxes of val on key frames without ground truth"] == (1, None)
    assert counts["detected boxes of train below IoU 0.9"] == (1, None)
    assert counts["videos of train"] == (2, 235)
    assert counts["videos of val"] == (2, 64)
    assert counts["evaluated classes"] == (60, 60)


def test_class_lists(tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    classes = read(m.dataset, m.annotations, m.videos).classes
    assert len(classes["action"]) == 80
    assert classes["action"][79] == "act 80 (a thing)"
    evaluated = [classes["action"].index(name) for name in classes["action_evaluated"]]
    assert evaluated == [i - 1 for i in range(1, 81) if i % 4]
    (short,) = m.annotations.rglob("*activitynet*.pbtxt")
    short.rename(short.with_name("ava_action_list_v2.2_for_activitynet_2018.pbtxt.txt"))  # as the evaluator calls it
    again = read(m.dataset, m.annotations, m.videos)
    assert again.classes == classes
    assert "no list of the 60 evaluated actions" not in again.report.oddities


def test_whole_films_keep_the_seconds_of_the_film(tmp_path: Path) -> None:
    row = read_lines(tmp_path, LINE).rows[0]
    assert (row.key_time_s, row.start_s, row.end_s) == (902.0, 900.5, 903.5)
    row = read_lines(tmp_path, LINE, cut_start_s="900").rows[0]
    assert row.key_time_s == 2.0
    with pytest.raises(AnnotationError, match=r"must lie after cut_start_s \(1000\)"):
        read_lines(tmp_path, LINE, cut_start_s="1000")


def test_thresholds_are_options(tmp_path: Path) -> None:
    boxes = ("-5KQ66BBWC4,0902,0.1,0.1,0.2,0.2,,0.5", "-5KQ66BBWC4,0902,0.3,0.1,0.4,0.2,3,0.3")
    assert len(read_lines(tmp_path, LINE, boxes=boxes).rows[0].boxes) == 1
    assert len(read_lines(tmp_path, LINE, boxes=boxes, min_score="0.4").rows[0].boxes) == 2
    found = read_lines(tmp_path, LINE, boxes=boxes, min_score="0.3").rows[0].boxes
    assert [box.labels for box in found] == [(79,), (), ()]  # labels of a detection file are no ground truth in val
    with pytest.raises(AnnotationError, match="min_score"):
        read_lines(tmp_path, LINE, min_score="nan")


@pytest.mark.parametrize("column", ["", "9"])
def test_min_iou_holds_whatever_column_7_says(column: str, tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    box = f"-5KQ66BBWC4,0902,0.077,0.151,0.283,0.641,{column},0.99"  # IoU 0.742 with a box of labels 9 and 80
    mini.write(m.annotations / "ava_train_predicted_boxes.csv", box)

    def detected(min_iou: str) -> list[tuple[int, ...]]:
        row = by_id(read(m.dataset, m.annotations, m.videos, {"min_iou": min_iou}))["-5KQ66BBWC4,0902"]
        return [box.labels for box in row.boxes if box.score < 1]

    assert detected("0.75") == []
    assert detected("0.74") == [(8, 79)]


def test_two_detection_files_of_a_split_need_a_choice(tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    plain = m.annotations / "ava_val_predicted_boxes.csv"
    for folder, score in (("iou75", "0.9"), ("iou90", "0.95")):
        mini.write(m.annotations / folder / plain.name, f"1j20qq1JyX4,0902,0.1,0.1,0.5,0.5,,{score}")
    plain.unlink()
    problem = r"detected boxes of val \(iou75/ava_val.*csv, iou90/ava_val.*\) must be one file .*detections=iou90"
    with pytest.raises(AnnotationError, match=problem):
        read(m.dataset, m.annotations, m.videos)
    (m.annotations / "ava_train_predicted_boxes.csv").rename(m.annotations / "iou90" / "ava_train_predicted_boxes.csv")
    found = read(m.dataset, m.annotations, m.videos, {"detections": "iou90"})
    assert [box.score for box in by_id(found)["1j20qq1JyX4,0902"].boxes] == [1.0, 0.95]
    assert "detected boxes of val: iou90/ava_val_predicted_boxes.csv" in found.report.layout
    with pytest.raises(AnnotationError, match=r"detections \(iou80\) must be part of one of"):
        read(m.dataset, m.annotations, m.videos, {"detections": "iou80"})


def test_cut_folder_is_known_from_inside_and_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = mini.ava(tmp_path).touch()
    monkeypatch.chdir(m.videos)
    (tmp_path / "link").symlink_to(m.videos)
    m.videos.rename(tmp_path / "else")
    (tmp_path / "videos_15min").symlink_to(tmp_path / "else")
    assert by_id(read("ava", m.annotations, tmp_path / "videos_15min"))["-5KQ66BBWC4,0902"].key_time_s == 2.0
    (tmp_path / "videos_15min").unlink()
    (tmp_path / "else").rename(tmp_path / "videos_15min")
    for videos in (Path("."), tmp_path / "link"):
        assert by_id(read("ava", m.annotations, videos))["-5KQ66BBWC4,0902"].key_time_s == 2.0


def test_cut_parts_that_may_begin_early_are_named(tmp_path: Path) -> None:
    m = mini.ava(tmp_path).touch()
    examples = read(m.dataset, m.annotations, m.videos).report.examples
    assert [places for kind, places in examples.items() if "begins at the key frame before" in kind] == [
        ("-5KQ66BBWC4.mkv", "1j20qq1JyX4.webm")
    ]
    assert not any("key frame before" in kind for kind in read_lines(tmp_path / "whole", LINE).report.oddities)


def test_two_versions_need_a_choice(tmp_path: Path) -> None:
    m = mini.ava(tmp_path, "2.1").touch()
    mini.ava(tmp_path, "2.2")
    with pytest.raises(AnnotationError, match=r"one version, not 2.1, 2.2; say version=2.1 or 2.2"):
        read(m.dataset, m.annotations, m.videos)
    assert "AVA v2.1" in read(m.dataset, m.annotations, m.videos, {"version": "2.1"}).report.layout
    with pytest.raises(AnnotationError, match=r"version \(2.3\)"):
        read(m.dataset, m.annotations, m.videos, {"version": "2.3"})


def test_rounding_empty_frames_and_boxes_without_area(tmp_path: Path) -> None:
    found = read_lines(
        tmp_path,
        "-5KQ66BBWC4,0902,-0.001,0.151,1.004,0.811,80,1",
        "-5KQ66BBWC4,0903,0.2,0.2,0.2,0.4,80,1",
        "-5KQ66BBWC4,0904,,,,,,",
    )
    assert (found.rows[0].boxes[0].x1, found.rows[0].boxes[0].x2) == (0.0, 1.0)
    assert len(found.rows) == 1
    assert found.report.dropped == {"key frame without a person": 1}
    assert found.report.oddities["box without area, left out"] == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            LINE.replace(",80,", ",81,"),
            r"ava_val_v2.2.csv:1: action \(column 7\) \('81'\) must be an integer in \[1, 80\]",
        ),
        (LINE.replace(",80,", ",0,"), "column 7"),
        (LINE.replace("80,1", ",0.99"), r"action \(column 7\)"),  # a box file given as ground truth
        (LINE.replace("80,1", "80,0.99"), r"person \(column 8\)"),
        (LINE.replace("0.283", "283"), r"box corner \('283'\)"),
        (LINE.replace("0.283", "0.05"), "x1 < x2"),
        (LINE.replace("0902", "09x2"), "second"),
        (LINE.replace("-5KQ66BBWC4", "../../x"), "video"),
        (LINE + ",9", "9 cells"),
    ],
)
def test_malformed_lines(line: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read_lines(tmp_path, line)


def test_one_box_with_two_scores_is_refused(tmp_path: Path) -> None:
    boxes = ("-5KQ66BBWC4,0902,0.1,0.1,0.2,0.2,,0.9", "-5KQ66BBWC4,0902,0.1,0.1,0.2,0.2,,0.95")
    with pytest.raises(AnnotationError, match=r"ava_val_predicted_boxes.csv:2: score"):
        read_lines(tmp_path, LINE, boxes=boxes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('item { name: "a" id: 1', "end with"),
        ('item { name: "a" }', "action id"),
        ("item { id: 3 }", "name"),
        ('item { name: "a" id: 81 }', "action id"),
        ('item { name: "a" id: 1 } item { name: "b" id: 1 }', "id of its own"),
        ("thing { }", "item {"),
        ('item { name "a" }', "name: value"),
        ('item { name: "a }', "name, number or string"),
        ("", "have entries"),
    ],
)
def test_malformed_action_lists(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read_action_list(mini.write(tmp_path / "list.pbtxt", text))


def test_action_lists_with_comments_and_both_id_names(tmp_path: Path) -> None:
    path = mini.write(
        tmp_path / "l.pbtxt", "# all", 'item { name: "bend/bow (at the waist)" id: 1 }', "label {", '  name: "x"'
    )
    path.write_text(path.read_text() + "  label_id: 80 # last\n  label_type: PERSON_MOVEMENT\n}\n")
    assert read_action_list(path) == {1: "bend/bow (at the waist)", 80: "x"}


def test_overlap_of_known_boxes() -> None:
    assert overlap((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)) == 1.0
    assert overlap((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)) == 0.0


def test_detections_on_key_frames_without_ground_truth_are_scored_in_validation_alone(tmp_path: Path) -> None:
    """The official evaluator counts them as wrong; excluded key frames and those nobody labels are left out."""
    box = "0.1,0.1,0.5,0.5,,0.9"
    keys = ("-5KQ66BBWC4,0910", "-5KQ66BBWC4,0911", "-5KQ66BBWC4,0901", "-5KQ66BBWC4,1799")
    mini.write(tmp_path / "a/ava_val_excluded_timestamps_v2.2.csv", "-5KQ66BBWC4,0911")
    found = read_lines(tmp_path, LINE, boxes=tuple(f"{key},{box}" for key in keys))
    assert [(row.id, len(row.boxes)) for row in found.rows] == [("-5KQ66BBWC4,0902", 1), ("-5KQ66BBWC4,0910", 1)]
    assert found.rows[1].boxes[0].labels == ()
    mini.write(tmp_path / "a/ava_train_v2.2.csv", LINE)
    mini.write(tmp_path / "a/ava_train_predicted_boxes.csv", *(f"{key},{box}" for key in keys))
    rows = read("ava", tmp_path / "a", tmp_path / "videos", {}).rows
    assert [row.id for row in rows if row.split == "train"] == ["-5KQ66BBWC4,0902"]
