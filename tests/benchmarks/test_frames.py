"""The benchmark of frames: every way is there, its clips are what it says, and it runs at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import frames
from pipeline.frames.native import LEVELS, best_level, library_text


def test_clips_are_those_of_the_tasks() -> None:
    training = frames.clips_in_memory(4, 2, "training")
    assert [clip.plan.flip for clip in training] == [False, True, False, True]
    for clip in training:
        (window,) = clip.plan.crops
        assert 179 < window.width == window.height < 225
        assert clip.luma is not None
        assert clip.luma.shape == (2, 256, 340, 1)
    crops = frames.clips_in_memory(1, 2, "evaluation")[0].plan.crops
    assert [(crop.left, crop.width) for crop in crops] == [(0.0, 256.0), (42.0, 256.0), (84.0, 256.0)]


@pytest.mark.integration
@pytest.mark.skipif(bool(library_text()), reason="no library of frames is built")
def test_rows_of_every_way(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--device", "cpu", "--clips", "1", "--frames", "2", "--repeats", "2", "--threads", "1", "--out", str(out)]
    assert frames.main(words) == 0
    rows = json.loads(out.read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    ways = ["graph", "fused", *(f"one thread, {name}" for name in LEVELS[: best_level() + 1])]
    assert [(row["task"], row["way"]) for row in rows] == [(t, w) for t in ("training", "evaluation") for w in ways]
    assert all(row["clips_per_second"] > 0 and row["cpu_ms_a_clip"] > 0 for row in rows)
    for row in rows:
        views = 3 if row["task"] == "evaluation" else 1
        assert np.isclose(row["views_per_cpu_second"], views / row["cpu_ms_a_clip"] * 1e3, rtol=0.02)
