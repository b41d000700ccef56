"""The store benchmark: its material is what it says, and its counts are right (no times are asserted)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import store as benchmark
from benchmarks.store_cases import FPS, HEIGHT_PX, WIDTH_PX, make_million, make_sources
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.plan import NegativeSchedule, TrainPlan
from pipeline.store.reader import Store
from pipeline.store.verify import verify_store

NUM_FRAMES = 150


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"), 1, NUM_FRAMES, ("h264",), num_threads=1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_million(tmp_path_factory.mktemp("large") / "s", 1000, num_frames=180)


@pytest.mark.integration
def test_both_sides_hold_the_same_videos(sources: dict[str, Path]) -> None:
    plain, store = (benchmark.open_source(name, sources[name]) for name in ("plain", "h264"))
    assert list(plain.media.num_frames) == list(store.media.num_frames) == [NUM_FRAMES]
    assert (plain.media.width[0], plain.media.height[0]) == (WIDTH_PX, HEIGHT_PX)
    numbers = np.array([0, 77, 149])
    first, second = plain.read_frames(0, numbers)[0], store.read_frames(0, numbers)[0]
    assert np.abs(first.astype(int) - second).mean() < 4
    sounds = [source.read_audio(0, 16_000, 16_000).astype(float) for source in (plain, store)]
    assert np.corrcoef(sounds)[0, 1] > 0.98


@pytest.mark.integration
def test_counts_per_clip(sources: dict[str, Path]) -> None:
    result = benchmark.compare(sources, num_clips=4)
    clips = benchmark.draw_clips(benchmark.open_source("plain", sources["plain"]), 4)
    last = [first + benchmark.CLIP_FRAMES - 2 for _, first in clips]
    ends = [min(NUM_FRAMES, (end // 12 + 1) * 12) for end in last]
    covered = [end - first // 12 * 12 for (_, first), end in zip(clips, ends, strict=True)]
    assert result["h264"]["decoded_frames_per_clip"] == round(float(np.mean(covered)), 1)
    # one GOP of 250: plain files decode from the start to the frame after the last one
    assert result["plain"]["decoded_frames_per_clip"] >= np.mean(last)
    assert result["h264"]["kib_per_clip"] > 0
    assert result["plain"]["kib_per_clip"] > 0


@pytest.mark.integration
def test_the_large_index_reads_like_a_store(large: Path) -> None:
    store = Store.open(large)
    split = store.split("train")
    assert len(store.media) == len(split.samples) == 1000
    assert split.samples.id(999) == store.media.id(999) == "clip-00000999"
    assert split.read_video(999, 100, 163).num_frames == 72
    assert split.media.duration_s(5) == 180 / FPS
    assert verify_store(store.path) == []


@pytest.mark.integration
def test_measures_of_the_large_index(large: Path) -> None:
    code = "import json, pathlib, sys; from benchmarks.store import measure_million as measure; "
    code += "print(json.dumps(measure(pathlib.Path(sys.argv[1]), num_cuts=50)))"
    # A process of its own: the peak of this one is that of all tests before.
    done = subprocess.run([sys.executable, "-c", code, str(large)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["media"] == 1000
    assert result["memory_mib"]["imports"]["all"] > 20
    assert set(result["cut_ms"]) == {"p50", "p90", "p99"}
    assert result["growth_over_imports_mib"] < 200
    memory = result["memory_mib"]
    assert result["peak_mib"] == memory["after_clips"]["peak"] >= memory["open"]["peak"] >= memory["open"]["all"] - 1


def mapped_mib(path: Path) -> float:
    """Resident pages of the maps of the tables of a store."""
    kib, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counts = str(path) in line and line.endswith(".arrow")
        elif counts and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib / 1024


@pytest.mark.integration
def test_clips_map_nothing_of_large_tables(tmp_path: Path) -> None:
    path = make_million(tmp_path / "s", 200_000, num_frames=180)
    assert (path / "samples-train.arrow").stat().st_size > 16 << 20
    split = Store.open(path).split("train")
    assert mapped_mib(path) < 2  # the checks looked at some 30 MiB
    spec = ClipSpec(num_frames=8, frame_stride=8)
    plan = TrainPlan(split, spec, DataConfig(), seed=0, negatives=NegativeSchedule(enabled=True))
    for position in range(200):
        benchmark.read_clip(split, plan.clip(position))
    assert mapped_mib(path) < 2
    assert np.asarray(split.samples.media).sum() == 200_000 * 199_999 // 2
    assert mapped_mib(path) > 1.5  # what looks at whole columns maps them


def test_table_shows_the_figures() -> None:
    side = {"kib_per_clip": 11.5, "decoded_frames_per_clip": 70.0, "clips_per_s": 9.0}
    times = {"p50": 0.1, "p90": 0.2, "p99": 0.3}
    text = benchmark.table(
        {
            "per_clip": {"plain": side, "vp9": side, "h264": side},
            "cut": {"video_ms": times, "audio_ms": times},
            "last_over_first": {
                "store": {"cut_ratio": 1.01, "cut_and_decode_ratio": 1.02},
                "plain": {"cut_and_decode_ratio": 2.6},
            },
            "million": {
                "media": 7,
                "open_s": 0.01,
                "plan_batch_of_64_ms": times,
                "plan_batch_of_64_with_negatives_ms": times,
                "peak_mib": 180.0,
                "growth_over_imports_mib": 99.0,
            },
        }
    )
    lines = [line.split("  ") for line in text.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["KiB read per clip", "frames decoded per clip"]
    assert "0.1 / 0.3" in text
    assert "2.6" in text


def test_percentiles() -> None:
    assert benchmark.percentiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p90": 2.8, "p99": 2.98}
