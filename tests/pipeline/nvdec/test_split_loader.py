"""Whole batches through loader and graph are the same bit for bit, whoever decoded: with the CPU twin for NVDEC."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.graph import _Parted
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.nvdec.choice import choose_decoder
from pipeline.nvdec.decoder import FFmpegDecoder
from pipeline.nvdec.hardware import why_not
from pipeline.nvdec.pool import DecoderPool
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=20)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80, num_threads=2, num_workers=0)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Four videos, one of them too small for NVDEC."""
    sizes = [(144, 128), (160, 128), (144, 112), (144, 128)]
    media = [(f"m{i}", numbered_frames(60, *size), noise(2, seed=i)) for i, size in enumerate(sizes)]
    return write_store(tmp_path_factory.mktemp("split") / "s", media, codec="h264")


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg stands in for NVDEC; measuring takes no time."""
    monkeypatch.setattr("pipeline.feed.open_pool", lambda device, threads, deadline: DecoderPool(FFmpegDecoder, 2))
    monkeypatch.setattr("pipeline.nvdec.trial.MEASURED_S", 0.05)
    monkeypatch.setattr("pipeline.nvdec.trial._MEASURED", {})


def all_batches(loader: Any, decoder: str, count: int) -> list[Any]:
    """Clones of the first batches, decoded by `decoder`."""
    loader.decoder = decoder
    stream = loader.batches()
    found = [batch.clone() for batch, _ in zip(stream, range(count), strict=False)]
    stream.close()
    return found


@pytest.mark.parametrize("decoder", ["nvdec", "both"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_training_batches_do_not_depend_on_the_decoder(split: StoreSplit, decoder: str, workers: int) -> None:
    config = replace(CONFIG, num_workers=workers)
    found, wanted = (
        all_batches(TrainLoader(split, SPEC, config, LoaderOptions(3), seed=4), who, 5) for who in (decoder, "cpu")
    )
    assert len(found) == len(wanted) == 5
    for batch, other in zip(found, wanted, strict=True):
        assert batch.ids == other.ids
        assert torch.equal(batch.frames, other.frames)
        assert torch.equal(batch.log_mel, other.log_mel)


def test_evaluation_does_not_depend_on_the_decoder(split: StoreSplit) -> None:
    views = ViewConfig(2, 3, 64)
    found, wanted = (
        all_batches(EvalLoader(split, SPEC, CONFIG, LoaderOptions(3), views=views), who, 99) for who in ("both", "cpu")
    )
    assert [batch.position.tolist() for batch in found] == [batch.position.tolist() for batch in wanted]
    assert sum(len(batch.ids) for batch in found) == 4 * 2 * 3
    for batch, other in zip(found, wanted, strict=True):
        assert torch.equal(batch.frames, other.frames)


def test_the_loader_tells_who_decoded(split: StoreSplit) -> None:
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(4), seed=4)
    assert loader.decoding == {}
    all_batches(loader, "both", 3)
    told = loader.decoding
    assert {"nvdec_clips", "cpu_clips", "again_clips"} <= set(told)
    assert told["nvdec_clips"] + told["cpu_clips"] >= 12
    assert told["nvdec_clips_per_second"] > 0
    assert told["cpu_clips_per_second"] > 0


def test_two_sources_of_one_graph_each_get_their_part_of_every_batch() -> None:
    """Planes in device memory are a source of their own; which of the two DALI asks first is DALI's affair."""
    given = iter([([1], ["a"], [10]), ([2], ["b"], [20])])
    parted = _Parted(lambda: next(given), [False, True, False])
    assert parted.second() == (["a"],)
    assert parted.first() == ([1], [10])
    assert parted.first() == ([2], [20])
    assert parted.second() == (["b"],)
    with pytest.raises(StopIteration):
        parted.first()


# Who is chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture
def with_nvdec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose NVDEC can be used."""
    monkeypatch.setattr("pipeline.nvdec.choice.why_not", lambda device: "")


@pytest.mark.usefixtures("with_nvdec")
def test_auto_takes_both_where_there_is_nvdec(split: StoreSplit, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_decoder(split, "auto", "cuda:0") == "both"
    assert choose_decoder(split, "nvdec", "cuda:0") == "nvdec"
    assert choose_decoder(split, "auto", "cpu") == "cpu"
    why = "1 of 4 videos are smaller than 128x128 px, the least that NVDEC takes, the first is m2 (144x112)"
    messages = [record.getMessage() for record in caplog.records]
    assert set(messages) <= {f"some videos of split 'train' are decoded by the CPU, not by NVDEC: {why}"}


@pytest.mark.usefixtures("with_nvdec")
def test_what_nvdec_cannot_decode_whole_is_for_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vp9 = write_store(tmp_path / "v", [("m", numbered_frames(24, 144, 128), noise(1))])
    for _ in range(2):
        assert choose_decoder(vp9, "auto", "cuda:0") == "cpu"
    with pytest.raises(ValueError, match=r"data.decoder \(nvdec\) cannot decode split 'train': cuts of vp9 cannot"):
        choose_decoder(vp9, "nvdec", "cuda:0")
    small = write_store(tmp_path / "s", [("m", numbered_frames(24, 112, 128), noise(1))], codec="h264")
    assert choose_decoder(small, "auto", "cuda:0") == "cpu"
    with pytest.raises(ValueError, match=r"1 of 1 videos are smaller than 128x128 px.*use data.decoder=cpu"):
        choose_decoder(small, "nvdec", "cuda:0")
    assert sum("cuts of vp9" in record.getMessage() for record in caplog.records) == 1  # said once


def test_a_machine_without_nvdec_says_what_is_missing(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "package PyNvVideoCodec (missing) must be installed; pip install PyNvVideoCodec"
    monkeypatch.setattr("pipeline.nvdec.choice.why_not", lambda device: reason)
    assert choose_decoder(split, "auto", "cuda:0") == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"videos of split 'train' are decoded by the CPU, not by NVDEC: {reason}"
    ]
    with pytest.raises(ValueError, match=r"pip install PyNvVideoCodec; use data\.decoder=cpu"):
        choose_decoder(split, "nvdec", "cuda:0")


def test_nvdec_needs_a_gpu(split: StoreSplit) -> None:
    with pytest.raises(ValueError, match=r"data.decoder \(nvdec\) cannot decode on cpu: NVDEC needs a GPU"):
        choose_decoder(split, "nvdec", "cpu")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("decoder", ["nvdec", "both"])
def test_batches_on_a_gpu_do_not_depend_on_the_decoder(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    """NVDEC itself: the graph is the same and so are the planes, so not one bit of a batch differs."""
    if reason := why_not(0):
        pytest.skip(reason)
    monkeypatch.undo()
    options = LoaderOptions(3, device="cuda:0")
    found, wanted = (all_batches(TrainLoader(split, SPEC, CONFIG, options, seed=4), who, 6) for who in (decoder, "cpu"))
    for batch, other in zip(found, wanted, strict=True):
        assert batch.ids == other.ids
        assert torch.equal(batch.frames, other.frames)
        assert torch.equal(batch.log_mel, other.log_mel)
