"""Pieces of a prediction: stretches, boxes of a file, pictures and spectrograms, names that no font has."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from experiments.records import fonts
from experiments.records.boxes_file import BoxesFileError, read_boxes
from experiments.records.media_views import picture_size, pictures_at, spectrogram
from experiments.records.prediction_files import JsonPredictions, clock, entry, lines_of
from experiments.records.prediction_picture import curves, draw_prediction
from experiments.records.prediction_video import Annotator
from experiments.records.predictions import BoxPredictions, Prediction
from pipeline.folder.dataset import FolderSplit
from pipeline.folder.describe import describe
from pipeline.folder.moments import every_moment, key_frames
from tests.pipeline.support.plain_videos import write_video

NAMES = ("run", "弹钢琴 $5", "नाचना")


def of_moments(path: Path = Path("a.mp4")) -> Prediction:
    """Four moments of two seconds."""
    moments = np.array([[0.7, 0.2, 0.1], [0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]], np.float32)
    times = np.array([[0, 2], [2, 4], [4, 6], [6, 7]], float)
    return Prediction(path, NAMES, moments.mean(0).astype(float), 3, 4, True, "", 7.0, times, moments, times[:, 0] < 4)


def of_boxes() -> Prediction:
    """Two boxes at 1 s, one at 3 s."""
    corners = np.array([[0.1, 0.1, 0.4, 0.9], [0.5, 0.2, 0.9, 0.8], [0.2, 0.2, 0.7, 0.7]], np.float32)
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.3], [0.5, 0.5, 0.6]], np.float32)
    boxes = BoxPredictions(np.array([1.0, 1.0, 3.0]), corners, scores)
    return Prediction(Path("a.mp4"), NAMES, scores.max(0).astype(float), 3, 2, duration_s=4.0, boxes=boxes)


def test_neighbouring_moments_of_one_class_are_a_stretch() -> None:
    found = of_moments().stretches()
    assert [(start, end, name) for start, end, name, _ in found] == [(0, 4, "run"), (4, 6, NAMES[1]), (6, 7, "run")]
    assert [score for *_, score in found] == pytest.approx([0.8, 0.8, 0.6])
    assert [clock(seconds) for seconds in (7.9, 61, 3727)] == ["0:07", "1:01", "1:02:07"]


def test_scores_over_time_are_of_the_best_classes() -> None:
    times, classes, values = curves(of_moments(), 2)
    assert (times.tolist(), classes) == ([1, 3, 5, 6.5], [0, 1])
    assert values[:, 0].tolist() == pytest.approx([0.7, 0.9, 0.1, 0.6])
    times, classes, values = curves(of_boxes(), 3)
    assert (times.tolist(), classes) == ([1, 3], [0, 1, 2])
    assert values[0].tolist() == pytest.approx([0.9, 0.8, 0.3])
    named = entry(of_boxes(), 1)
    assert [box["best"][0]["class"] for box in named["boxes"]] == ["run", NAMES[1], NAMES[2]]


def test_a_file_that_was_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    writer = JsonPredictions(path, {"step": 2}, 1)
    writer.add(of_moments())
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    text = path.read_text()
    assert '"complete": false' in text
    assert text.count('"file"') == 1
    assert list(tmp_path.iterdir()) == [path]


def test_boxes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("a,2,0.1,0.2,0.3,0.4,,0.9\n\na.mp4,1.5,0,0,1,1\na,2,0.5,0.5,0.6,0.6,7,\nb,9,0,0,1,1\n")
    boxes = read_boxes(path)
    files = [Path("x/a.mp4"), Path("x/b.mkv"), Path("c.mkv")]
    frames = boxes.key_frames(files, [5.0, 5.0, 5.0])
    assert [(frame.media, frame.time_s, len(frame.corners)) for frame in frames] == [(0, 1.5, 1), (0, 2.0, 2)]
    assert frames[1].scores.tolist() == pytest.approx([0.9, 1.0])
    assert boxes.problem(files[0], 5.0) == ""
    assert "1 of 1 boxes of" in boxes.problem(files[1], 5.0)
    assert "rows that begin with c" in boxes.problem(files[2], 5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one row"),
        ("a,1,0,0,1", r"boxes.csv:1: must be video,second.*but: 5 columns"),
        ("a,1,0,0,1,1\na,x,0,0,1,1", r"boxes.csv:2: .*could not convert"),
        ("a,1,0.5,0,0.5,1", r"in 0..1 with x1 < x2"),
        ("a,-1,0,0,1,1", r"second \(-1\) must be at least 0"),
        ("a,1,0,0,96,48", "divide pixels by the picture's size"),
    ],
)
def test_rows_that_are_no_boxes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(BoxesFileError, match=message):
        read_boxes(path)


def test_moments_and_key_frames_are_samples(tmp_path: Path) -> None:
    file = describe(write_video(tmp_path / "a.mp4"))  # 75 frames at 25 fps
    split = FolderSplit.of_files([file, file], ["0", "1"])
    pieces = every_moment(split, 1.25)
    assert pieces.samples.media[3] == 1
    assert [float(x) for x in np.asarray(pieces.samples.end_s)] == [1.25, 2.5, 3.0] * 2
    assert pieces.samples.id(4) == "1 at 1.250 s"
    assert len(every_moment(split, 3.0).samples) == 2
    assert len(split.samples) == 2
    with pytest.raises(ValueError, match="must be at most 1000000; raise it"):
        every_moment(split, 1e-6)
    path = tmp_path / "boxes.csv"
    path.write_text("b,2,0.1,0.2,0.3,0.4\na,1,0,0,1,1\na,1,0,0,0.5,1\n")
    frames = read_boxes(path).key_frames([Path("a.mp4"), Path("b.mp4")], [3.0, 3.0])
    keyed = key_frames(split, frames)
    assert [keyed.samples.id(i) for i in range(2)] == ["0 at 1.000 s", "1 at 2.000 s"]
    assert keyed.samples.boxes(0).boxes.tolist() == [[0, 0, 1, 1], [0, 0, 0.5, 1]]
    assert keyed.samples.boxes(1).boxes.tolist() == [pytest.approx([0.1, 0.2, 0.3, 0.4])]
    assert keyed.samples.boxes(0).classes() == [(), ()]


def test_paths_from_here_and_from_the_root_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "there"):
        Path(name).mkdir()
    near, far = write_video(Path("here/a.mp4")), write_video(tmp_path / "there" / "a.mp4")
    split = FolderSplit.of_files([describe(near), describe(far)], ["0", "1"])
    assert [split.files[i].path for i in range(2)] == ["here/a.mp4", str(far)]
    assert [len(split.read_frames(i, np.arange(2))[0]) for i in range(2)] == [2, 2]


def test_pictures_and_spectrogram_are_of_their_times(tmp_path: Path) -> None:
    grey = [np.full((48, 96, 3), 4 * i + 20, np.uint8) for i in range(50)]
    tone = np.concatenate([np.zeros(16_000), 9000 * np.sin(2 * np.pi * 2000 * np.arange(16_000) / 16_000)])
    path = write_video(tmp_path / "a.mkv", frames=grey, audio=tone.astype(np.int16), rate_hz=16_000, audio_codec="flac")
    file = describe(path)
    assert picture_size(file, 48) == (48, 24)
    assert picture_size(file, 500, 192) == (192, 96)
    shown = [float(picture.mean()) for picture in pictures_at(file, (0.0, 0.8, 99.0), 96)]
    assert shown == pytest.approx([20, 100, 216], abs=2.5)
    power = spectrogram(file, 40)
    assert power.shape == (257, 40)
    assert np.argmax(power[:, 25]) == 64  # 2 kHz of 8
    assert power[:, :18].max() < -60
    assert power.max() == 0
    assert power.min() >= -80


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path: Path) -> None:
    file = describe(write_video(tmp_path / "a.mp4"))
    for found in (of_moments(tmp_path / "弹.mp4"), of_boxes()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_prediction(Prediction(**{**vars(found), "file": file}), tmp_path / "out.png")
            picture = Annotator(found, (480, 320)).drawn(np.zeros((320, 480, 3), np.uint8), 1.0)
        assert (tmp_path / "out.png").stat().st_size > 10_000
        assert picture.max() > 200


@pytest.fixture
def latin_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fonts.Font]]:
    """A machine with the font that comes with matplotlib, and no other."""
    used = [fonts._fonts()[0]]
    monkeypatch.setattr(fonts, "_fonts", lambda: used)
    monkeypatch.setattr(fonts, "_others", list)
    monkeypatch.setattr(fonts, "_told", [])
    fonts._find.cache_clear()
    yield used
    fonts._find.cache_clear()


def test_names_without_a_font_are_transcribed_behind_their_number_and_it_is_said_once(
    latin_only: list[fonts.Font], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert fonts.shown("弹a琴", 7) == "7: ?a?"
        assert fonts.shown("弹钢琴", 7) == "class 7"  # nothing is left of it
        assert fonts.shown("弹钢琴.mp4") == "?.mp4"
        assert [fonts.shown(name, 1) for name in ("नाचना", "춤추기", "おどるダンス")] == [
            "1: naacanaa", "1: chumchugi", "1: odorudansu",
        ]  # fmt: skip
        assert fonts.shown("Füße Δ", 7) == "Füße Δ"
        assert fonts.font_runs("弹") == [(latin_only[0].file, "弹")]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("no font of this machine has '弹' of '弹a琴': in pictures such names are transcribed")


def test_a_font_that_is_not_in_use_is_found_and_the_picture_begun_again(
    latin_only: list[fonts.Font], monkeypatch: pytest.MonkeyPatch
) -> None:
    han = fonts.Font("Some Han", "han.ttc", frozenset(map(ord, "弹钢琴")))
    monkeypatch.setattr(fonts, "_others", lambda: [("Bad", "bad.ttf"), ("Some Han", "han.ttc")])
    monkeypatch.setattr(fonts, "_font", lambda family, file: han if family == "Some Han" else None)
    families = []

    def draw() -> str:
        families.append(list(matplotlib.rcParams["font.family"]))
        return fonts.shown("弹钢琴 5", 3)

    assert fonts.in_plot_style(draw) == "弹钢琴 5"
    assert families == [[latin_only[0].family], [latin_only[0].family, "Some Han"]]
    assert fonts.font_runs("5 % 弹钢琴 x") == [
        (latin_only[0].file, "5 % "),
        ("han.ttc", "弹钢琴 "),
        (latin_only[0].file, "x"),
    ]


@pytest.mark.parametrize(
    ("has_audio", "takes_sound", "words", "value"),
    [
        (True, True, "with sound", True),
        (False, True, "without sound", False),
        (False, False, "sound not used", None),
    ],
)
def test_what_a_model_hears_is_told(has_audio: bool, takes_sound: bool, words: str, value: bool | None) -> None:
    found = Prediction(
        Path("a.mp4"), ("one", "two"), np.array([0.9, 0.1]), 2, 3, has_audio=has_audio, takes_sound=takes_sound
    )
    assert lines_of(found, 1, over_time=False)[0] == f"a.mp4: 3 views, {words}"
    assert entry(found, 1)["with_sound"] is value
