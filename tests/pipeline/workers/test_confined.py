"""Plain files are looked at in child processes: what crashes, hangs or leaks costs that file only."""

import logging
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig, ViewConfig
from pipeline.folder.dataset import PlainFolder
from pipeline.folder.describe import describe
from pipeline.loader import EvalLoader, LoaderOptions
from pipeline.open import describe_confined, limits_of, open_source
from pipeline.workers.confined import Confinement, call_confined
from tests.pipeline.support.odd_calls import odd_describe
from tests.pipeline.support.plain_videos import write_video
from tests.pipeline.workers.test_workers import CONFIG, SPEC, children, open_descriptors

pytestmark = pytest.mark.integration  # starts processes

LIMITS = Confinement(memory_bytes=64 << 20, deadline_s=4.0)
REASONS = {
    "segv": r"its decoder crashed \(signal SIGSEGV\), twice; transcode it",
    "hang": r"decoding took longer than 4 s \(data.clip_deadline_s\); transcode it",
    "leak": r"decoding needs more memory than data.clip_memory_mib allows \(64\); raise it",
    "text": r"container does not open",
    "bug": r"'of our own'",
}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain video."""
    return write_video(tmp_path_factory.mktemp("video") / "good.mp4")


def test_each_file_has_its_own_fate(video: Path, tmp_path: Path) -> None:
    before, running = open_descriptors(), children()
    names = ["good-0", "segv", "once", "hang", "text", "good-1", "leak", "bug", "good-2"]
    paths = [Path(shutil.copy(video, tmp_path / f"{name}.mp4")) for name in names]
    (tmp_path / "text.mp4").write_text("no video")
    found = dict(zip(names, call_confined(odd_describe, paths, LIMITS, 2), strict=True))
    for name, result in found.items():
        if name in REASONS:
            assert isinstance(result, Exception)
            assert re.search(REASONS[name], str(result))
        else:
            assert result == describe(tmp_path / f"{name}.mp4")
    assert (open_descriptors(), children()) == (before, running)


def test_a_folder_is_the_same_looked_at_in_processes(video: Path, tmp_path: Path) -> None:
    for name in ("train/a/x.mp4", "train/b/y.mp4", "val/a/z.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp_path / name)
    (tmp_path / "train" / "a" / "broken.mp4").write_text("no video")
    here, confined = PlainFolder.open(tmp_path), open_source(tmp_path)
    assert isinstance(confined, PlainFolder)
    assert (confined.files, confined.refused, confined.splits) == (here.files, here.refused, here.splits)
    assert [name for name, _ in here.refused] == ["train/a/broken.mp4"]


def test_what_is_not_used_is_told_once(video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(video, tmp_path / "x.mp4")
    for name in ("broken.mp4", "broken.mkv"):
        (tmp_path / name).write_text("no video")
    with caplog.at_level(logging.WARNING, "pipeline.open"):
        for _ in range(2):
            open_source(tmp_path)
    lines = [record.getMessage().split(":")[0] for record in caplog.records if record.name == "pipeline.open"]
    assert lines == ["broken.mkv is not used", "broken.mp4 is not used"]


def test_mistakes_of_the_program_are_raised(video: Path, tmp_path: Path) -> None:
    shutil.copy(video, tmp_path / "bug.mp4")
    with pytest.raises(KeyError, match="of our own"):
        PlainFolder.open(tmp_path, describe_files=lambda paths: call_confined(odd_describe, paths, LIMITS, 1))


def test_pictures_too_large_for_memory_are_quarantined(video: Path, tmp_path: Path) -> None:
    shutil.copy(video, tmp_path / "a.mp4")
    frames = [np.zeros((2048, 4096, 3), np.uint8)] * 24
    write_video(tmp_path / "large.mp4", frames=frames, options={"preset": "ultrafast"})
    config = replace(CONFIG, num_workers=1, clip_memory_mib=90)
    folder = PlainFolder.open(tmp_path, describe_files=describe_confined(1, limits_of(config)))
    loader = EvalLoader(folder.split("all"), SPEC, config, LoaderOptions(2), views=ViewConfig(1, 1, 48))
    assert [name for batch in loader for name in batch.ids] == ["a.mp4"]
    ((name, reason),) = loader.quarantine
    assert name == "large.mp4"
    assert "a clip (8 frames of 4096x2048 px, 96 MiB) must be at most data.clip_memory_mib (90)" in reason


def test_limits_are_those_of_the_configuration() -> None:
    assert limits_of(DataConfig(clip_memory_mib=64, clip_deadline_s=2.0)) == Confinement(64 << 20, 2.0)


def test_whoever_stops_early_waits_for_no_second_try(tmp_path: Path) -> None:
    """The child that looks at a file when the caller goes is killed, and that is no crash of its decoder."""
    paths = [tmp_path / "text.mp4", tmp_path / "wait.mp4"]
    found = call_confined(odd_describe, paths, replace(LIMITS, deadline_s=20.0), 2)
    next(found)
    while not (tmp_path / "wait.begun").exists():
        time.sleep(0.01)
    found.close()
    assert (tmp_path / "wait.begun").read_text() == "x"
