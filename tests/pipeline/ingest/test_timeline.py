"""Time stamps of decoded frames: those that are missing, fall, or jump; and a worker that stays small."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.ingest.findings import Tally
from pipeline.ingest.source import Source
from pipeline.ingest.timeline import Timeline
from pipeline.media import audio_track
from pipeline.media.packets import PacketScan
from pipeline.media.probe import MediaInfo, RefusedError, VideoInfo
from pipeline.media.retime import Rate
from pipeline.store.format import AUDIO_BLOCK_SAMPLES, StoreInfo

TIME_BASE = Fraction(1, 1000)


def source(container: str = "mov,mp4", *, is_constant: bool = True) -> Source:
    """A source of 25 fps with stamps in milliseconds."""
    video = VideoInfo(0, "h264", 64, 64, "yuv420p", Fraction(1), (Fraction(25),), None)
    info = MediaInfo("a.mp4", container, Fraction(0), None, video, None)
    scan = PacketScan(np.arange(0, 400, 40), TIME_BASE, True, (0,), 0, 0, 0.4)
    return Source(info, scan, Rate(Fraction(25), is_constant))


def frame(pts: int | None, dts: int | None = None, time_base: Fraction = TIME_BASE, duration: int = 40) -> Any:
    return SimpleNamespace(pts=pts, dts=dts, time_base=time_base, duration=duration)


def play(timeline: Timeline, frames: list[Any]) -> list[tuple[int, int]]:
    """Push frames; returns (number of the frame, how often it is shown)."""
    shown = [timeline.push(one, timeline.ticks(one)) for one in frames]
    shown.append(timeline.finish())
    return [(frames.index(one[0]), one[1]) for one in shown if one is not None]


def test_frames_on_the_grid_are_shown_once_each() -> None:
    timeline = Timeline(source(), 60, tally := Tally())
    assert play(timeline, [frame(1000 + 40 * n) for n in range(5)]) == [(n, 1) for n in range(5)]
    assert (timeline.num_frames, timeline.origin_s) == (5, 1)
    assert (tally.not_rising, tally.far_behind, tally.repeated, tally.dropped) == (0, 0, 0, 0)


def test_a_missing_stamp_is_one_frame_after_the_one_before() -> None:
    timeline = Timeline(source(), 60, Tally())
    assert timeline.ticks(frame(None)) == 0
    timeline.push(frame(200), 200)
    assert timeline.ticks(frame(None)) == 240
    assert timeline.ticks(frame(None, dts=7)) == 7


def test_avi_counts_by_the_order_of_the_packets_and_other_clocks_are_converted() -> None:
    timeline = Timeline(source("avi"), 60, Tally())
    assert [timeline.ticks(frame(5, dts=80)), timeline.ticks(frame(6, dts=120))] == [0, 40]
    timeline.skip()  # a packet that gave an error
    assert timeline.ticks(frame(8, dts=200)) == 120
    timeline = Timeline(source(), 60, Tally())
    assert timeline.ticks(frame(5, dts=80)) == 5
    assert timeline.ticks(frame(9000, time_base=Fraction(1, 90_000))) == 100


def test_stamps_that_fall_are_counted_and_holes_are_filled() -> None:
    timeline = Timeline(source(is_constant=False), 60, tally := Tally())
    frames = [frame(ticks) for ticks in (0, 40, 40, 5000, 80, 5080)]
    assert sum(times for _, times in play(timeline, frames)) == timeline.num_frames == 128
    assert (tally.not_rising, tally.far_behind) == (2, 1)
    assert tally.repeated > 100


def test_a_gap_beyond_the_limit_is_refused() -> None:
    timeline = Timeline(source(), 2, Tally())
    timeline.push(frame(0), 0)
    with pytest.raises(RefusedError, match=r"time stamps jump by 2\.1 s, more than 2 s"):
        timeline.push(frame(2100), 2100)


def test_one_rate_of_sound_everywhere() -> None:
    rates = {audio_track.SAMPLE_RATE_HZ, AUDIO_BLOCK_SAMPLES, StoreInfo("vp9", 12, 64, "x", {}).sample_rate_hz}
    assert rates == {SAMPLE_RATE_HZ}


def test_the_worker_imports_neither_torch_nor_dali_nor_what_the_parent_alone_needs() -> None:
    code = (
        "import sys, pipeline.ingest.worker\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'nvidia', 'pyarrow', 'sqlite3'}))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
