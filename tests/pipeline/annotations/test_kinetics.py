"""Traps of Kinetics-400/600/700, Kinetics-Sounds and the lists of `path label`."""

from pathlib import Path

import pytest

from pipeline.annotations import READERS, AnnotationError, Annotations, Row, read
from pipeline.annotations.kinetics_sounds import CLASSES
from pipeline.annotations.report import UNUSED_FILE
from tests.pipeline.support import miniatures as mini

HEADER = "label,youtube_id,time_start,time_end,split"


def by_id(found: Annotations) -> dict[str, Row]:
    return {row.id: row for row in found.rows}


def read_text(tmp_path: Path, *lines: str, name: str = "train.csv", **options: str) -> Annotations:
    (tmp_path / "videos").mkdir(exist_ok=True)
    return read("kinetics400", mini.write(tmp_path / name, *lines), tmp_path / "videos", options)


@pytest.mark.parametrize("layout", ["cvdf", "crawler", "underscores", "untrimmed"])
def test_labels_are_the_same_in_every_layout(layout: str, tmp_path: Path) -> None:
    m = mini.kinetics400(tmp_path, layout).touch()
    found = read(m.dataset, m.annotations, m.videos, m.options)
    names = found.classes["action"]
    assert names == (
        "abseiling",
        "massaging person's head",
        "playing guitar",
        "skiing (not slalom or crosscountry)",
        "tapping pen, slowly",
    )
    rows = by_id(found)
    assert names[rows["0m6PGKmsHAA_000000_000010"].labels["action"][0]] == "massaging person's head"
    assert rows["--0edUL8zmA_000005_000015"].labels == {"action": (2,)}
    assert rows["2JyVF4ZhYLQ_000007_000017"].labels == {"action": (4,)}
    assert rows["4bykoxx-IOU_000020_000030"].labels == {}
    assert found.report.missing == ("GONE0000000_000001_000011",)


def test_replacements_override(tmp_path: Path) -> None:
    m = mini.kinetics400(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    rows = by_id(found)
    assert rows["_4YTwq0-73Y_000018_000028"].video == "replacement_for_corrupted_k400/_4YTwq0-73Y_000018_000028.mp4"
    assert rows["-3B32lodo2M_000059_000069"].video == "train/-3B32lodo2M_000059_000069.mp4"
    assert "replacements of corrupted clips" in found.report.layout
    assert "flat folders" in found.report.layout


def test_layouts_are_named(tmp_path: Path) -> None:
    for layout, words in (("crawler", "class folders"), ("underscores", "class folders with underscores")):
        m = mini.kinetics400(tmp_path / layout, layout).touch()
        assert words in read(m.dataset, m.annotations, m.videos).report.layout.split("; ")


def test_trimmed_clips_are_whole_files_and_untrimmed_ones_are_cut(tmp_path: Path) -> None:
    m = mini.kinetics400(tmp_path / "a").touch()
    row = by_id(read(m.dataset, m.annotations, m.videos))["-3B32lodo2M_000059_000069"]
    assert (row.start_s, row.end_s) == (0.0, None)
    m = mini.kinetics400(tmp_path / "b", "untrimmed").touch()
    row = by_id(read(m.dataset, m.annotations, m.videos, m.options))["-3B32lodo2M_000059_000069"]
    assert (row.video, row.start_s, row.end_s) == ("-3B32lodo2M.mp4", 59.0, 69.0)
    found = read(m.dataset, m.annotations, m.videos)
    assert found.rows == ()
    assert any("untrimmed=true" in kind for kind in found.report.oddities)


def test_a_file_in_its_class_folder_is_preferred(tmp_path: Path) -> None:
    for folder in ("yoga", "zumba", "abseiling"):
        mini.write(tmp_path / f"videos/train/{folder}/AAAAAAAAAA1_000001_000011.mp4")
    found = read_text(tmp_path, HEADER, "zumba,AAAAAAAAAA1,1,11,train")
    assert found.rows[0].video == "train/zumba/AAAAAAAAAA1_000001_000011.mp4"


def test_case_sensitive_sorting_and_doubles_of_kinetics600(tmp_path: Path) -> None:
    m = mini.kinetics600(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    assert found.classes["action"] == (
        "air drumming",
        "passing American football (in game)",
        "passing american football (not in game)",
    )
    rows = by_id(found)
    assert rows["AAAAAAAAAA2_000003_000013"].labels == {"action": (1,)}
    assert rows["AAAAAAAAAA2_000003_000013#2"].labels == {"action": (2,)}
    assert rows["AAAAAAAAAA1_000010_000020"].labels == {"action": (2,)}
    assert rows["AAAAAAAAAA4_000001_000011"].split == "val"
    assert found.report.dropped == {"id destroyed by a spreadsheet": 1, "row repeated": 1}
    assert found.report.oddities["YouTube id with several clips"] == 1
    assert found.report.oddities["clip with two labels, both kept"] == 1


def test_counts_are_put_beside_the_published_ones(tmp_path: Path) -> None:
    m = mini.kinetics400(tmp_path).touch()
    report = read(m.dataset, m.annotations, m.videos).report
    differences = {count.what: (count.found, count.expected) for count in report.differences}
    assert differences == {"rows of train": (8, 246_534), "rows of val": (2, 19_906), "classes": (5, 400)}
    assert "rows of val: 2 (published: 19,906; -19,904)" in report.lines()


def test_files_of_kinetics600_without_header(tmp_path: Path) -> None:
    mini.write(tmp_path / "videos/AAAAAAAAAA1_000001_000011.mp4")
    found = read_text(tmp_path, "zumba,AAAAAAAAAA1,1,11,train", "yoga,AAAAAAAAAA2,1,11,train", name="train.txt")
    assert found.classes["action"] == ("yoga", "zumba")
    assert found.rows[0].labels == {"action": (1,)}
    found = read_text(tmp_path, "AAAAAAAAAA1,1,11,test", name="test.txt")
    assert (found.rows[0].split, found.rows[0].labels) == ("test", {})


def test_a_class_list_fixes_the_labels(tmp_path: Path) -> None:
    mini.write(tmp_path / "videos/AAAAAAAAAA1_000001_000011.mp4")
    names = mini.write(tmp_path / "names.txt", "zumba", "yoga")
    found = read_text(tmp_path, HEADER, "yoga,AAAAAAAAAA1,1,11,train", classes=str(names))
    assert found.rows[0].labels == {"action": (1,)}
    with pytest.raises(AnnotationError, match=r"train.csv:2: label \('polo'\)"):
        read_text(tmp_path, HEADER, "polo,AAAAAAAAAA1,1,11,train", classes=str(names))


def test_byte_order_mark_crlf_and_empty_lines(tmp_path: Path) -> None:
    mini.write(tmp_path / "videos/AAAAAAAAAA1_000001_000011.mp4")
    path = tmp_path / "val.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n\r\nyoga,AAAAAAAAAA1,1,11,validate\r\n".encode())
    found = READERS["kinetics400"](path, tmp_path / "videos")
    assert [(row.split, row.labels) for row in found.rows] == [("val", {"action": (0,)})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("yoga,AAAAAAAAAA,1,11,train", r"train.csv:2: youtube_id \('AAAAAAAAAA'\) must be 11"),
        ("yoga,../AAAAAAAA,1,11,train", r"train.csv:2: youtube_id"),
        ("yoga,AAAAAAAAAA1,x,11,train", r"train.csv:2: time_start \('x'\) must be a number"),
        ("yoga,AAAAAAAAAA1,nan,11,train", r"time_start \('nan'\)"),
        ("yoga,AAAAAAAAAA1,1_0,11,train", r"time_start \('1_0'\)"),
        ("yoga,AAAAAAAAAA1,11,11,train", r"time_end \('11'\) must lie after"),
        ("yoga,AAAAAAAAAA1,1,11,dev", r"split \('dev'\)"),
        (",AAAAAAAAAA1,1,11,train", r"label \(''\)"),
        ("yoga,AAAAAAAAAA1,1,11", r"row \('4 cells'\) must have the 5 cells"),
        ('yoga"x,"AAAAAAAAAA1,1,11,train', "must be CSV"),
        ("yoga\x00,AAAAAAAAAA1,1,11,train", "NUL"),
    ],
)
def test_malformed_lines_name_file_line_value_rule_and_remedy(line: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem) as caught:
        read_text(tmp_path, HEADER, line)
    assert ";" in str(caught.value)


def test_lists_keep_blanks_and_take_absolute_paths_below_the_root(tmp_path: Path) -> None:
    m = mini.kinetics_lists(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos)
    assert [row.video for row in found.rows if row.split == "train"] == [
        "abseiling/a 1.mp4",
        "abseiling/b.mp4",
        "yoga/c.mp4",
    ]
    assert [row.video for row in found.rows if row.split == "val"] == ["abseiling/d.mp4", "yoga/e.mp4"]
    assert found.report.missing == ("yoga/gone.mp4",)
    assert len(found.classes["action"]) == 400


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/etc/passwd 0", "train.csv:1: path"),
        ("../x.mp4 0", "train.csv:1: path"),
        ("pipe:0 0", "URL"),
        ("http://host/x.mp4 0", "URL"),
        ("a.mp4 -2", r"train.csv:1: label \('-2'\)"),
        ("a.mp4 999999999", "train.csv:1: label"),
    ],
)
def test_lists_refuse_paths_outside(line: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=problem):
        read_text(tmp_path, line)


def test_neither_csv_nor_list(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="give the official files"):
        read_text(tmp_path, "nothing of the kind")
    mini.write(tmp_path / "a/train.csv", HEADER, "yoga,AAAAAAAAAA1,1,11,train")
    mini.write(tmp_path / "a/val.csv", "x.mp4 1")
    with pytest.raises(AnnotationError, match="not both"):
        read("kinetics400", tmp_path / "a", tmp_path)


@pytest.mark.parametrize(
    "line", ["label,youtubeid,time_start,time_end,split", "x.mp4", "yoga,AAAAAAAAAA1,1.5,11,val", "zumba,A,1,11,val"]
)
def test_a_file_of_a_split_that_cannot_be_read_is_an_error(line: str, tmp_path: Path) -> None:
    mini.write(tmp_path / "a/train.csv", HEADER, "yoga,AAAAAAAAAA1,1,11,train")
    mini.write(tmp_path / "a/val.csv", "", line, "yoga,AAAAAAAAAA2,1,11,val")
    with pytest.raises(AnnotationError, match=r"a/val.csv:2: first line \('.*'\) must be the header .*; give"):
        read("kinetics400", tmp_path / "a", tmp_path)
    mini.write(tmp_path / "b/train.txt", "yoga/a.mp4 0")
    mini.write(tmp_path / "b/val.txt", "yoga/b.mp4", "yoga/c.mp4 0")
    with pytest.raises(AnnotationError, match=r"b/val.txt:1: first line"):
        read("kinetics400", tmp_path / "b", tmp_path)


def test_other_files_beside_the_official_ones_are_reported(tmp_path: Path) -> None:
    mini.write(tmp_path / "train.csv", HEADER, "yoga,AAAAAAAAAA1,1,11,train")
    mini.write(tmp_path / "k400_train_path.txt", "https://s3.amazonaws.com/kinetics/400/train/part_0.tar.gz")
    mini.write(tmp_path / "labels.csv", "id,name", "0,yoga")
    mini.write(tmp_path / "._val.csv", "\x01 what macOS puts beside a file")
    report = read("kinetics400", tmp_path, tmp_path).report
    kind = "file not read: no CSV of clips, no list of a split"
    assert report.examples[kind] == ("k400_train_path.txt", "labels.csv")


def test_a_quoted_label_with_a_comma_in_a_file_without_header(tmp_path: Path) -> None:
    mini.write(tmp_path / "a/train.csv", HEADER, "yoga,AAAAAAAAAA1,1,11,train")
    mini.write(tmp_path / "a/val.csv", '"tapping pen, slowly",AAAAAAAAAA2,5,15,val')
    mini.write(tmp_path / "videos/AAAAAAAAAA2_000005_000015.mp4")
    found = read("kinetics400", tmp_path / "a", tmp_path / "videos")
    assert [(row.split, row.labels) for row in found.rows] == [("val", {"action": (0,)})]
    assert found.classes["action"] == ("tapping pen, slowly", "yoga")


def test_labels_of_a_part_of_the_classes_are_an_oddity(tmp_path: Path) -> None:
    kind = "labels are those of 1 classes, not of the 400 published ones; give classes=FILE with all names"
    names = mini.write(tmp_path / "names.txt", "polo", "yoga")
    assert read_text(tmp_path, HEADER, "yoga,AAAAAAAAAA1,1,11,train").report.examples[kind] == ("label 0 is 'yoga'",)
    with_names = read_text(tmp_path, HEADER, "yoga,AAAAAAAAAA1,1,11,train", classes=str(names))
    assert kind not in with_names.report.oddities


def test_kinetics_sounds_has_the_papers_classes_and_both_labels(tmp_path: Path) -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 32
    assert list(CLASSES) == sorted(CLASSES)
    m = mini.kinetics_sounds(tmp_path).touch()
    found = read(m.dataset, m.annotations, m.videos, m.options)
    assert found.classes["sounds"] == CLASSES
    assert found.classes["action"] == ("abseiling", *CLASSES, "zumba")
    labels = {row.id: dict(row.labels) for row in found.rows}
    assert labels["CCCCCCCCCC1_000000_000010"] == {"action": (3,), "sounds": (2,)}
    singing = CLASSES.index("singing")
    assert labels["DDDDDDDDDD0_000000_000010"] == {"action": (singing + 1,), "sounds": (singing,)}
    assert found.report.dropped == {"not one of the wanted classes": 3}
    assert found.report.missing == ()
    differences = {count.what: (count.found, count.expected) for count in found.report.differences}
    assert differences["clips of val"] == (1, 1594)
    assert differences["classes"] == (34, 400)
    assert not any("labels are those of" in kind for kind in found.report.oddities)  # the list numbers them


def test_kinetics_sounds_needs_all_classes_of_kinetics(tmp_path: Path) -> None:
    m = mini.kinetics_sounds(tmp_path).touch()
    (tmp_path / "names.txt").unlink()
    with pytest.raises(AnnotationError, match=r"classes of .* \(5\) must be all 400 of Kinetics-400.*classes=FILE"):
        read(m.dataset, m.annotations, m.videos)


def test_kinetics_sounds_reports_only_its_own_missing_clips(tmp_path: Path) -> None:
    m = mini.kinetics_sounds(tmp_path).touch()
    (m.videos / "train/CCCCCCCCCC0_000000_000010.mp4").unlink()  # abseiling
    (m.videos / "train/CCCCCCCCCC2_000000_000010.mp4").unlink()  # singing
    found = read(m.dataset, m.annotations, m.videos, m.options)
    assert found.report.missing == ("CCCCCCCCCC2_000000_000010",)


def test_kinetics_sounds_from_lists_with_names(tmp_path: Path) -> None:
    m = mini.kinetics_lists(tmp_path).touch()
    names = mini.write(tmp_path / "names.txt", "abseiling", "singing")
    found = read("kinetics_sounds", m.annotations, m.videos, {"classes": str(names)})
    assert [(row.video, dict(row.labels)) for row in found.rows] == [
        ("yoga/c.mp4", {"action": (1,), "sounds": (25,)}),
        ("yoga/e.mp4", {"action": (1,), "sounds": (25,)}),
    ]


def test_a_listed_file_is_never_taken_from_another_folder(tmp_path: Path) -> None:
    for path in ("yoga/1.mp4", "zumba/1.mp4", "yoga/2.mp4", "deep/er/abseiling/3.webm"):
        mini.write(tmp_path / "videos" / path)
    found = read_text(tmp_path, "yoga/1.mp4 0", "zumba/2.mp4 1", "abseiling/3.mp4 2", "k400/zumba/1.mp4 1", "1.mp4 3")
    assert [row.video for row in found.rows] == ["yoga/1.mp4", "deep/er/abseiling/3.webm", "zumba/1.mp4"]
    assert found.report.missing == ("zumba/2.mp4", "1.mp4")


def test_a_file_has_one_label_however_the_list_names_it(tmp_path: Path) -> None:
    mini.write(tmp_path / "videos" / "train" / "x.mp4")
    mini.write(tmp_path / "videos" / "train" / "y.mp4")
    found = read_text(tmp_path, "train/x.mp4 0", "a/train/x.mp4 1", "train/x.avi 0", "train/y.avi 2", "train/y.mp4 1")
    assert [(row.video, dict(row.labels)) for row in found.rows] == [
        ("train/x.mp4", {"action": (0,)}),
        ("train/y.mp4", {"action": (2,)}),
    ]
    counts = {"file listed before with another label": 2, "file listed before with the same label": 1}
    assert found.report.dropped == counts
    assert {kind: found.report.oddities[kind] for kind in counts} == counts
    assert found.report.listed == len(found.rows) + sum(counts.values())


def test_kinetics_sounds_needs_names(tmp_path: Path) -> None:
    m = mini.kinetics_lists(tmp_path).touch()
    with pytest.raises(AnnotationError, match="must contain the 32"):
        read("kinetics_sounds", m.annotations, m.videos)


@pytest.mark.parametrize(
    ("name", "lines", "labels"),
    [
        ("kinetics400_test_list_videos.txt", ("a_000005_000015.mp4 -1",), [None]),
        ("k700_val.txt", ("a_000005_000015.mp4 -1", "b_000001_000011.mp4 3"), [None, 3]),
        ("test.txt", ("test/b_000001_000011.mp4 -1", "test/a_000005_000015.mp4 -1"), [None, None]),
        ("train_list.txt", ('"b_000001_000011.mp4" 0', "a_000005_000015.mkv -1"), [0, None]),
    ],
)
def test_label_minus_one_is_no_label(
    name: str, lines: tuple[str, ...], labels: list[int | None], tmp_path: Path
) -> None:
    for file in ("a_000005_000015.mp4.webm", "b_000001_000011.f137.mp4"):
        mini.write(tmp_path / "videos" / "test" / file)
    mini.write(tmp_path / "lists" / name, *lines)
    data = read("kinetics400", tmp_path / "lists", tmp_path / "videos")
    assert [row.labels.get("action") for row in data.rows] == [None if x is None else (x,) for x in labels]


@pytest.mark.parametrize("count", [1, 9, 30])
def test_files_that_no_row_takes_are_counted_and_ten_are_named(count: int, tmp_path: Path) -> None:
    for number in range(count):
        mini.write(tmp_path / "videos" / f"spare{number:02}.mp4")
    mini.write(tmp_path / "videos" / "a.mp4.mkv")
    mini.write(tmp_path / "lists" / "train.txt", "a.mp4 0")
    lines = read("kinetics400", tmp_path / "lists", tmp_path / "videos").report.lines()
    start = lines.index(f"oddity, {count} times: {UNUSED_FILE}")
    named = [line for line in lines[start + 1 :] if line.startswith("  spare")]
    assert named == [f"  spare{number:02}.mp4" for number in range(min(count, 10))]


def test_list_of_a_test_split_has_no_labels_and_unused_files_are_named(tmp_path: Path) -> None:
    videos, lists = tmp_path / "v", tmp_path / "a"
    videos.mkdir()
    lists.mkdir()
    for name in ("-bcdefghijk_000005_000015.mp4.webm", "other.mp4"):
        (videos / name).touch()
    (lists / "kinetics400_test_list_videos.txt").write_text("-bcdefghijk_000005_000015.mp4 -1\n")
    data = read("kinetics400", lists, videos, {})
    assert [(row.video, row.split, row.labels) for row in data.rows] == [
        ("-bcdefghijk_000005_000015.mp4.webm", "test", {})
    ]
    assert data.report.oddities["video file that no row of the lists takes"] == 1
    assert data.report.examples["video file that no row of the lists takes"] == ("other.mp4",)
