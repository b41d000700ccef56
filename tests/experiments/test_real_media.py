"""Real clips of several codecs, rates and lengths, with and without sound: prepared, trained on, evaluated."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.store.reader import Store
from tests.experiments.support.processes import TRAIN, run

CLASSES = {
    "nasa_two_video_streams_aac.mp4": "sound",
    "mpeg4_mp3_25fps.avi": "sound",
    "kinetics_silent_28fps.mp4": "silent",
    "hevc_10fps_silent.mp4": "silent",
}
SETTINGS = [
    "train.steps=8", "optim.warmup_steps=2", "tracking.backend=none", "runtime.num_threads=1", "data.num_threads=2",
    "train.clips_per_step=4", "views.num_clips=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def videos(real_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files in class folders, in both splits."""
    folder = tmp_path_factory.mktemp("videos")
    for split in ("train", "val"):
        for name, label in CLASSES.items():
            target = folder / split / label / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real_media / name, target)
    return folder


def train(data: Path, out: Path) -> dict[str, object]:
    """Eight steps and the evaluation; returns the summary."""
    config = "experiments/configs/quickstart.yaml"
    code, output = run(["-m", TRAIN, config, "name=real", f"data.path={data}", f"output_dir={out}", *SETTINGS])
    assert code == 0, output[-3000:]
    summary: dict[str, object] = json.loads((out / "real" / "summary.json").read_text())
    return summary


@pytest.mark.integration
@pytest.mark.pictures
def test_prepared_into_a_store(videos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["folder", "--videos", str(videos), "--out", str(store), "--codec", "vp9"]
    code, output = run(["-m", "experiments.prepare", *command])
    assert code == 0, output[-3000:]
    report = json.loads((tmp_path / "store.report.json").read_text())
    assert report["inputs"] == sum(report["classes"].values()) == 8
    assert report["classes"]["refused"] == 0
    summary = train(store, tmp_path / "runs")
    assert summary["steps"] == 8
    assert summary["finished"] is True
    spec = ClipSpec(16, 2, 64, 40)
    config = DataConfig(crop_size_px=48, jitter_min_px=48, jitter_max_px=56, num_threads=2)
    split = Store.open(store).split("train")
    batch = next(TrainLoader(split, spec, config, LoaderOptions(4), seed=0).batches())
    heard = {Path(name).stem: flag for name, flag in zip(batch.ids, batch.has_audio.tolist(), strict=True)}
    assert heard == {Path(name).stem: label == "sound" for name, label in CLASSES.items()}


@pytest.mark.integration
def test_read_as_plain_files(videos: Path, tmp_path: Path) -> None:
    summary = train(videos, tmp_path / "runs")
    assert summary["steps"] == 8
    assert summary["finished"] is True
    assert summary["quarantined"] == []
