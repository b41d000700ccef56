"""The comparison of a store's settings: PSNR, what a clip costs, and rows that become a table."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import storage
from benchmarks.peers import clips as loader_clips
from benchmarks.peers.clips import pictures, write_video
from benchmarks.report import TABLES
from benchmarks.storage import Setting, decoded_for, make_store, psnr, settings
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.ingest.item import TranscodeSettings
from pipeline.plan import TrainPlan
from pipeline.store.reader import Store


def test_settings_vary_one_thing_at_a_time() -> None:
    names = [setting.name for setting in settings()]
    assert len(set(names)) == len(names)
    base = {"codec": "h264", "gop": 12, "quality": 23, "fastdecode": True, "max_fps": None}
    for setting in settings():
        changed = [key for key, value in base.items() if getattr(setting.asked, key) != value]
        assert len(changed) + (setting.b_frames > 0) <= (1 if setting.asked.codec == "h264" else 3), setting.name


def test_psnr_of_known_errors() -> None:
    one = np.full((8, 8), 100, np.uint8)
    assert storage._psnr(one, one + 1) == pytest.approx(48.13, abs=0.01)
    assert storage._psnr(one, one + 10) == pytest.approx(28.13, abs=0.01)


@pytest.mark.integration
def test_stores_of_all_kinds_hold_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_clips, "NUM_FRAMES", 90)
    monkeypatch.setattr(loader_clips, "pictures", lambda seed: pictures(seed, 90))
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "000.mp4", 0, 250)
    h264 = TranscodeSettings(quality=18)
    asked = {
        "h264": Setting("a", h264), "b-frames": Setting("b", h264, b_frames=2),
        "15 fps": Setting("c", TranscodeSettings(quality=18, max_fps="15")),
        "mjpeg": Setting("d", TranscodeSettings(codec="mjpeg", quality=2)),
    }  # fmt: skip
    frames = {}
    for name, setting in asked.items():
        make_store(setting, tmp_path / "videos", tmp_path / name)
        split = Store.open(tmp_path / name).split("train")
        assert psnr(split, tmp_path / "videos") > 35, name
        clip = TrainPlan(split, ClipSpec(32, 2), DataConfig(), seed=0).clip(0)
        kib, frames[name] = decoded_for(split, clip)
        assert kib > 1000
    assert 63 <= frames["h264"] <= 74
    assert 32 <= frames["15 fps"] <= 43
    assert frames["mjpeg"] == 32


def test_rows_become_a_table() -> None:
    machine = {"cpu": "EPYC", "cpu_threads": 2, "date": "2026-11-26T12:00:00+00:00"}
    row = {"benchmark": "storage", "material": "m", "setting": "s", "mib_per_10_s": 0.8, "cpu_s_to_make_10_s": 0.9,
           "kib_per_clip": 199.8, "frames_decoded_per_clip": 68.3, "cpu_ms_per_clip": 12.9,
           "dali_cpu_ms_per_clip": None, "nvdec_clips_per_s": None, "psnr_db": 37.76, "machine": machine,
           "commit": "c", "file": "f.json"}  # fmt: skip
    text = TABLES["storage"]([row, row | {"setting": "VP9", "dali_cpu_ms_per_clip": 66.4}])
    assert "| m | s | 0.80 | 0.9 | 200 | 68 | 12.9 | - | unmeasured | 37.8 |" in text
    assert "| 12.9 | 66.4 | unmeasured |" in text
    assert TABLES["storage"]([]) == "Settings of a store: unmeasured."
    peer = {"benchmark": "loader peers", "loader": "p", "source": "files", "machine": machine, "commit": "c",
            "file": "f.json"}  # fmt: skip
    figures = {"cpu_s_per_clip": 0.05, "clips_per_s": 30.0, "peak_rss_mib": 900, "bytes_per_clip": 2048,
               "frames_decoded_per_clip": 70.2, "first_batch_s": 1.5}  # fmt: skip
    table = TABLES["loaders"]([peer | figures, peer | {"loader": "q", "failed": "not installed"}])
    assert "| p | files | 20.0 | 30.0 | 50 | 900 | 2 | 70 | 1.5 |" in table
    assert "| q | files | not installed | - | - |" in table
