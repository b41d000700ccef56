"""The command line of ingest: options, exit statuses, progress on a terminal that is none."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments import prepare
from experiments.prepare import EXIT_PROBLEMS, EXIT_USAGE, main
from pipeline.annotations import READERS
from pipeline.ingest.item import Item
from pipeline.ingest.run import Progress as FileDone
from pipeline.store.reader import Store
from tests.pipeline.support import media_zoo as zoo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        zoo.make(folder / name / f"{name}.mp4", seconds=2.2)
    (folder / "dog" / "broken.mp4").write_bytes(b"no video")
    return folder


def test_every_data_set_has_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in READERS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "--short-side" in capsys.readouterr().out


def test_missing_folder_is_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert main(["folder", "--videos", str(tmp_path / "none"), "--out", str(tmp_path / "store")]) == EXIT_USAGE
    assert str(tmp_path / "none") in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gop", "99"], "gop (99) must be 1 to 16"),
        (["--option", "seed"], "option seed () must be a whole number"),
        (["--option", "sed=3"], "did you mean seed?"),
        (["--memory-gib", "0.01"], "memory_gib (0.01) must be 0.125 to"),
        (["--memory-gib", "inf"], "memory_gib (inf) must be"),
        (["--deadline-seconds", "nan"], "deadline_s (nan) must be"),
        (["--quality", "-5"], "quality (-5) must be 0 to 51 for h264"),
        (["--quality", "64", "--codec", "vp9"], "quality (64) must be 0 to 63 for vp9"),
        (["--quality", "0", "--codec", "mjpeg"], "quality (0) must be 1 to 31 for mjpeg"),
        (["--gop", "2", "--codec", "mjpeg"], "gop (2) must be 1 frame for mjpeg"),
        (["--no-fastdecode", "--codec", "vp9"], "fastdecode (off) must be on for codec vp9"),
        (["--max-fps", "1/0"], "max_fps (1/0) must be 1 to 1000"),
        (["--max-fps", "abc"], "max_fps (abc) must be 1 to 1000"),
        (["--clip-seconds", "nan"], "clip_s (nan) must be"),
        (["--chunk-seconds", "nan"], "chunks (nan s) and overlap (12 s) must be seconds >= 0"),
        (["--shard-mib", "0"], "shards (0 bytes) must be 64 KiB to"),
        (
            ["--chunk-seconds", "10", "--overlap-seconds", "8"],
            "overlap (8 s) must be at most half of the chunks (10 s)",
        ),
    ],
)
def test_wrong_options(
    options: list[str], words: str, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["folder", "--videos", str(videos), "--out", str(tmp_path / "store"), *options]) == EXIT_USAGE
    assert words in caplog.text
    assert not (tmp_path / "store").exists()


@pytest.mark.integration
def test_prepare_then_verify(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "store"
    command = [sys.executable, "-m", "experiments.prepare", "folder", "--videos", str(videos), "--out", str(out)]
    options = [
        "--codec",
        "vp9",
        "--short-side",
        "96",
        "--max-fps",
        "12.5",
        "--option",
        "val_fraction=0",
        "--workers",
        "2",
    ]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 inputs, 2 media in the store" in result.stderr
    assert f"report in {out}.report.json" in result.stderr
    assert "refused: dog/broken.mp4: container does not open" in result.stderr
    assert "3/3" in result.stderr
    report = json.loads((tmp_path / "store.report.json").read_text())
    assert report["classes"] == {"fine": 2, "repaired": 0, "short": 0, "silent": 0, "refused": 1}
    assert report["samples_dropped"] == {"video refused": 1}
    media = Store.open(out).media
    assert list(media.fps_num) == [25, 25]
    assert list(media.fps_den) == [2, 2]
    assert main(["verify", str(out)]) == 0
    shard = out / "shards" / "00000.bin"
    content = bytearray(shard.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 16
        shard.write_bytes(content)
        assert main(["verify", str(out)]) == EXIT_PROBLEMS
        content[place] ^= 16
    shard.write_bytes(content)
    assert main(["verify", str(out)]) == 0
    assert "1 problem in" in caplog.text
    assert main(["folder", "--videos", str(videos), "--out", str(out)]) == EXIT_USAGE
    assert "target must not exist" in caplog.text


def test_without_a_terminal_lines_are_whole_and_progress_comes_by_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(prepare.time, "monotonic", lambda: now[0])
    name = f"{'a long name ' * 12}.mp4"
    with prepare.Display(Console(file=out, soft_wrap=True)) as display:
        for done in range(1, 6):
            now[0] += 25.0
            display.show(FileDone(done, 50, 0, name, Item(refused="no video") if done == 1 else Item(), 1.0))
    lines = out.getvalue().splitlines()
    assert f"refused: {name}: no video" in lines
    assert [line for line in lines if " files, " in line] == ["3 of 50 files, 0.04 files/s, left 19m35s"]


def test_existing_store_is_said_before_the_videos_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, command = tmp_path / "store", ["folder", "--videos", str(tmp_path / "none"), "--out", str(tmp_path / "store")]
    out.mkdir()
    (out / "store.json").touch()
    assert main(command) == EXIT_USAGE
    assert f"{out}: target must not exist; choose another path or pass --overwrite" in caplog.text
    caplog.clear()
    (tmp_path / "store.work").mkdir()  # it may be the store that this very command finished before it was killed
    assert main(command) == EXIT_USAGE
    assert "must be a readable folder; check --videos" in caplog.text


def test_verify_of_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x").touch()
    for name, found in (("x", "a file"), ("y", "missing")):
        assert main(["verify", str(tmp_path / name)]) == EXIT_USAGE
        assert f"store ({tmp_path / name}, {found}) must be a folder; name the one" in caplog.text


def test_misspelt_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["folder", "--videos", "v", "--out", "o", "--gopp", "12"])
    assert capsys.readouterr().err.splitlines() == ["error: unrecognized arguments: --gopp 12; see --help"]


def test_options_are_checked_before_annotations_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = ["--videos", str(tmp_path / "none"), "--out", str(tmp_path / "store")]
    assert main(["folder", *where, "--quality", "999"]) == EXIT_USAGE
    assert "quality (999)" in caplog.text
    assert "none" not in caplog.text


def test_target_is_checked_before_annotations_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    assert main(["folder", "--videos", str(tmp_path / "none"), "--out", str(tmp_path)]) == EXIT_USAGE
    assert f"{tmp_path}: target (no store) must not exist; choose another path" in caplog.text


def test_no_heavy_imports() -> None:
    code = "import sys, experiments.prepare, pipeline.ingest.worker as _; print({'torch', 'nvidia'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
