"""NVDEC as a stage: with FFmpeg in its place, a slowed decoder is found by name, and both sides share the clips."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from numpy.typing import NDArray

from benchmarks.stages.measure import DECODE, STORAGE, Measured, _video
from benchmarks.stages.model import verdict
from benchmarks.stages.nvdec import NVDEC, Cut, cuts_of, nvdec_rounds, share_of
from benchmarks.stages.report import pipeline_of, summary, what_ifs
from experiments.config import Config
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.media.annexb import AnnexB
from pipeline.nvdec.decoder import ClipPlanes, FFmpegDecoder
from pipeline.nvdec.pool import DecoderPool
from pipeline.plan import TrainPlan
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, write_store

DELAY_S = 0.03
THREADS = 2


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Two videos, one of them too small for NVDEC."""
    media = [(f"m{i}", numbered_frames(60, 144, height), noise(2, seed=i)) for i, height in enumerate((128, 112))]
    return write_store(tmp_path_factory.mktemp("nvdec") / "s", media, codec="h264")


class Slow(FFmpegDecoder):
    """The CPU twin after a pause."""

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        time.sleep(DELAY_S)
        return super().decode(stream, wanted)


def opened(make: Callable[[Any], FFmpegDecoder]) -> Callable[[int, int, float], DecoderPool]:
    """Opens a pool of stand-ins."""
    return lambda device, threads, deadline_s: DecoderPool(make, threads, deadline_s=deadline_s)


def loader_of(split: StoreSplit, decoder: str) -> Any:
    """What the stage asks of a loader."""
    config = SimpleNamespace(num_threads=1)
    return SimpleNamespace(dataset=split, decoder=decoder, config=config, options=SimpleNamespace(device_id=None))


def stages_of(split: StoreSplit, decoder: str, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """The stages of video with a slow stand-in."""
    real = nvdec_rounds
    monkeypatch.setattr("benchmarks.stages.measure.NUM_THREADS", THREADS)
    monkeypatch.setattr(
        "benchmarks.stages.measure.nvdec_rounds", lambda *given: real(*given, open_decoders=opened(Slow))
    )
    spec = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=20)
    plan = TrainPlan(split, spec, DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80), seed=5)
    found, plans = Measured(cores=4), [plan.at(position, 0) for position in range(10)]
    _video(found, loader_of(split, decoder), plans, 2, 8, 1)
    return found


def test_a_slow_nvdec_binds_by_name(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stages_of(split, "nvdec", monkeypatch)
    assert [stage.name for stage in found.stages] == [STORAGE, NVDEC]
    assert found.servers[NVDEC] == THREADS
    own = found.stages[1]
    assert own.ms >= 1e3 * DELAY_S * 0.95
    assert own.cpu_ms < own.ms
    assert verdict(pipeline_of(found)).binding == NVDEC
    assert found.nvdec_share == 1.0
    gop = next(change for change in what_ifs(Config(), found, on_gpu=True, graph_is_off=False) if change.name == "gop")
    assert gop.factors[NVDEC] < 1


def test_with_both_each_side_has_its_share_and_ends_together(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stages_of(split, "both", monkeypatch)
    assert [stage.name for stage in found.stages] == [STORAGE, DECODE, NVDEC]
    decode, nvdec = found.stages[1:]
    assert 0 < found.nvdec_share < 0.5
    assert nvdec.ms / THREADS == pytest.approx(decode.ms / found.servers[decode.site], rel=1e-6)
    assert "NVDEC has" in found.notes[-1]


def test_share_follows_the_rates() -> None:
    assert share_of("nvdec", 50.0, 8, 1.0, 4) == 1.0
    assert share_of("both", 20.0, 8, 10.0, 4) == pytest.approx(0.5)  # 400 and 400 clips a second
    assert share_of("both", 10.0, 8, 10.0, 8) == pytest.approx(0.5)


def test_clips_that_nvdec_refuses_are_left_out_and_cuts_are_read_as_they_lie(split: StoreSplit) -> None:
    plans = [SimpleNamespace(media=media, frames=(4, 6, 8)) for media in (0, 1)]
    cuts = [split.read_video(plan.media, 4, 8) for plan in plans]
    (kept,) = cuts_of(split, plans, cuts)
    assert isinstance(kept, Cut)
    assert tuple(kept.kind) == ("h264", 144, 128)
    assert list(kept.wanted + cuts[0].first_frame) == [4, 6, 8]
    walls, cpu_ms = nvdec_rounds([kept] * 5, 1, None, opened(FFmpegDecoder))
    assert len(walls) == 5
    assert min(walls) > 0
    assert cpu_ms > 0


def test_nvdec_is_a_name_that_the_summary_shows() -> None:
    assert NVDEC in summary(
        {
            "name": "r50", "notes": [], "what_if": [], "crowded": False,
            "stages": [{"name": NVDEC, "site": NVDEC, "ms": 3.3, "cpu_ms": 0.1, "clips_per_second": 300.0}],
            "end_to_end": {"clips_per_second": 290.0, "data_wait_share": 0.5, "core_wait_share": 0.0},
            "verdict": {"rate": 300.0, "resource": NVDEC, "binding": NVDEC, "next": "", "tie": False,
                        "rate_without": 600.0},
        }
    )  # fmt: skip
