"""What predict writes: JSON, CSV, pictures and annotated copies of files, folders and films."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from experiments.cli.command_line import run_command
from experiments.engine.predictor import Predictor
from experiments.predict import main as predict
from experiments.predict import parse, videos_of
from pipeline.folder.describe import describe
from tests.pipeline.support.cases import CASES, needs_cases
from tests.pipeline.support.odd_media import write_tracks
from tests.pipeline.support.plain_videos import write_video

pytestmark = pytest.mark.integration
THREADS = "data.num_workers=0"  # no worker processes: their start takes seconds


def changing(path: Path, seconds: int = 4, **more: Any) -> Path:
    """Noise of rising contrast at 25 fps, 48 x 64 px, with a rising tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 40 + i, (48, 64, 3), dtype=np.uint8) for i in range(25 * seconds)]
    return write_video(path, frames=frames, **more)


def test_a_folder_with_a_broken_file(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    first, second = changing(videos / "a.mp4"), changing(videos / "b" / "a.mkv", audio_codec=None)
    broken = videos / "b" / "broken.mp4"
    broken.write_bytes(first.read_bytes()[:2000])
    (videos / "notes.txt").write_text("no video")
    command = [
        str(tiny_run),
        str(videos),
        THREADS,
        "views.num_clips=3",
        "--top",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--json", str(out / "found.json"), "--csv", str(out / "found.csv")]
    command += ["--pictures", str(out / "pictures"), "--video", str(out / "videos")]
    assert run_command(predict, command) == 2
    said = capsys.readouterr()
    assert f"{broken}: not scored: " in said.out
    assert "1 of 3 files had a problem" in said.err
    assert "1 files are no videos by their suffix: notes.txt" in said.err
    found = json.loads((out / "found.json").read_text())
    assert (found["complete"], found["step"], found["classes"]) == (True, 2, [f"class_{k}" for k in range(4)])
    good, silent, bad = found["files"]
    assert [item["file"] for item in found["files"]] == [str(first), str(second), str(broken)]
    assert (good["with_sound"], silent["with_sound"], good["problem"]) == (True, False, "")
    assert bad.keys() == {"file", "problem"}
    assert bad["problem"]
    assert len(good["best"]) == 2
    assert [moment["start_s"] for moment in good["over_time"]] == sorted({m["start_s"] for m in good["over_time"]})
    mean = np.mean([m["best"][0]["score"] for m in good["over_time"]])
    if all(m["best"][0]["class"] == good["best"][0]["class"] for m in good["over_time"]):
        assert good["best"][0]["score"] == pytest.approx(mean, abs=1e-5)
    rows = list(csv.DictReader((out / "found.csv").read_text().splitlines()))
    whole = [row for row in rows if row["start_s"] == "" and row["rank"]]
    assert [(row["file"], row["rank"]) for row in whole] == [(str(f), r) for f in (first, second) for r in "12"]
    assert float(whole[0]["score"]) == good["best"][0]["score"]
    assert [row["problem"] for row in rows if row["file"] == str(broken)] == [bad["problem"]]
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    expected = ["pictures/a.png", "pictures/b/a.png", "videos/a.mp4", "videos/b/a.mp4"]
    assert made == ["found.csv", "found.json", *expected]


def test_pieces_of_a_film_cover_it(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    film = changing(tmp_path / "film.mp4", seconds=5)
    (found,) = Predictor.open(tiny_run, overrides=[THREADS]).predict([film], every_s=1.5)
    assert found.times_s.tolist() == [[0, 1.5], [1.5, 3], [3, 4.5], [4.5, 5]]
    assert found.views == 4
    assert found.heard.all()
    assert np.abs(found.moments.mean(0) - found.scores).max() < 1e-6
    assert np.ptp(found.moments, axis=0).max() > 0
    assert found.best(99)[0][1] == found.scores.max()
    assert run_command(predict, [str(tiny_run), str(film), THREADS, "--every", "1.5"]) == 0
    assert " 0:00 to 0:0" in capsys.readouterr().out


def test_views_are_those_of_an_evaluation(tiny_run: Path, tmp_path: Path) -> None:
    """Three crops of each clip are one moment; a file of one clip's length has one, however many views there are."""
    long, short = changing(tmp_path / "long.mp4"), changing(tmp_path / "short.mp4", seconds=1)
    keys = [THREADS, "views.num_clips=4", "views.num_crops=3"]
    found, brief = Predictor.open(tiny_run, overrides=keys).predict([long, short])
    assert (found.views, len(found.moments), brief.views, len(brief.moments)) == (12, 4, 12, 1)
    assert found.times_s[0, 0] == 0
    assert found.times_s[-1, 1] == pytest.approx(4.0, abs=0.05)
    assert np.abs(found.moments.mean(0) - found.scores).max() < 1e-6
    assert np.abs(brief.moments[0] - brief.scores).max() < 1e-6


def test_an_annotated_copy_has_the_frames_and_times_of_its_source(tiny_run: Path, tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 30]
    frames = [np.full((96, 160, 3), 200, np.uint8)] * len(times)
    film = write_video(tmp_path / "film.mp4", frames=frames, times=times, fps=25)
    assert run_command(predict, [str(tiny_run), str(film), THREADS, "--video", str(tmp_path / "out")]) == 0
    with av.open(str(tmp_path / "out" / "film.mp4")) as made:
        assert (made.streams.video[0].width, made.streams.video[0].height) == (480, 288)
        shown = list(made.decode(video=0))
        sound = made.streams.audio[0]
        length_s = float(sound.duration * sound.time_base)
    assert [frame.time for frame in shown] == pytest.approx([time / 25 for time in times], abs=1e-3)
    assert length_s == pytest.approx(describe(film).num_samples / 16_000, abs=0.1)
    grey = shown[5].to_ndarray(format="gray").astype(float)
    assert abs(grey[20:100].mean() - 200) < 5
    assert grey[-60:].mean() < 150  # the panel


def test_what_may_be_named(tmp_path: Path) -> None:
    for name in ("x/a.mp4", "y/a.avi", "y/A.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    named, notes = videos_of([tmp_path / "x" / "a.mp4", tmp_path / "y", tmp_path / "x" / "a.mp4"])
    assert [item.name for item in named] == ["a", "A-2", "a-3"]
    assert notes == []
    with pytest.raises(ValueError, match="must be an existing file or folder"):
        videos_of([tmp_path / "z"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must hold at least one video"):
        videos_of([tmp_path / "none"])
    options = parse(["run", "a.mp4", "views.num_clips=2", "--batch", "3", "--set", "data.num_threads=1"])
    assert options.files == [Path("a.mp4")]
    assert options.overrides == ["data.num_threads=1", "views.num_clips=2", "eval.clips_per_batch=3"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--every", "0"], "--every (0) must be more than 0 seconds"),
        (["--top", "0"], "--top (0) must be at least 1"),
        (["--json", "{folder}"], "must be a file; choose another one"),
        (["--video", "{film}"], "must be a folder; choose another one"),
        (["--boxes", "{folder}/none.csv"], "must be a readable CSV file"),
        (["--boxes", "{boxes}"], "must be given for model.head=detection alone, not softmax"),
        (["views.num_clip=2"], "num_clips"),
    ],
)
def test_mistakes_are_said_before_anything_is_scored(
    tiny_run: Path, tmp_path: Path, capsys: Any, more: list[str], message: str
) -> None:
    film, boxes = changing(tmp_path / "film.mp4", seconds=1), tmp_path / "boxes.csv"
    boxes.write_text("film,0.5,0.1,0.1,0.9,0.9\n")
    places = {"folder": str(tmp_path), "film": str(film), "boxes": str(boxes)}
    given = [text.format(**places) if "{" in text else text for text in more]
    assert run_command(predict, [str(tiny_run), str(film), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_copy_does_not_replace_its_source(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    film = changing(tmp_path / "film.mp4", seconds=1)
    before = film.read_bytes()
    assert run_command(predict, [str(tiny_run), str(film), THREADS, "--video", str(tmp_path)]) == 2
    assert "must not be the video itself" in capsys.readouterr().out
    assert film.read_bytes() == before


def test_the_script_of_the_page_runs(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    page = Path(__file__).parents[2] / "docs" / "predict.md"
    (script,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    film = changing(tmp_path / "some.mp4")
    for old, new in (("avslowfast.", ""), ("runs/quickstart", str(tiny_run)), ("some.mp4", str(film))):
        assert old in script
        script = script.replace(old, new)
    assert len([line for line in script.splitlines() if line]) <= 10
    exec(compile(script, str(page), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.]+ %", "x", line[:7] + line[7:]) for line in lines[:3]] == [
        f"{line[:7]}: x" for line in lines[:3]
    ]
    assert lines[3].startswith("0 to ")


@needs_cases
def test_files_of_public_bug_reports_are_scored_over_their_whole_length(tiny_run: Path) -> None:
    known = {
        "webm-claims-1000fps/recorder.webm": (6.0, True),
        "paff-field-packets/paff_field.ts": (2.4, True),
        "max-fps-not-nearest/fps240.mp4": (0.625, False),
        "avi-bframes-av-offset/bframes_xvid_3s.avi": (3.0, True),
        "longer-unselected-track/long_second_audio.mp4": (6.0, True),
        "announced-but-empty-audio/ghost_audio.ts": (6.0, False),
    }
    found = Predictor.open(tiny_run, overrides=[THREADS]).predict([CASES / name for name in known])
    for prediction, (duration_s, has_audio) in zip(found, known.values(), strict=True):
        assert prediction.problem == ""
        assert prediction.duration_s == pytest.approx(duration_s, abs=1e-6)
        assert prediction.has_audio == has_audio


def test_a_silent_stream_beside_one_with_sound_is_said(tiny_run: Path, tmp_path: Path, caplog: Any) -> None:
    path = write_tracks(tmp_path / "a.mkv", "flac", (0, 9000))
    (found,) = Predictor.open(tiny_run, overrides=[THREADS]).predict([path])
    assert found.problem == ""
    said = [record.getMessage() for record in caplog.records if "silent audio stream" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{path}: silent audio stream: 1 is used and silent, 2 has sound")
