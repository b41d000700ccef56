"""Batches whose frames the fused operation makes: those of the graph, in memory that lives as long as its views."""

import gc
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.graph
from pipeline.batch import Batch, has_padded_channels
from pipeline.clip import ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.frames.maker import FrameMaker
from pipeline.frames.native import library_text
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.frames import LEVEL, Case, clip_of, random_planes
from tests.pipeline.support.stores import noise, numbered_frames, write_store

pytestmark = pytest.mark.skipif(bool(library_text()), reason="no library of frames is built")
SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80, num_threads=2, rotation=True, decoder="cpu")


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    """Five media, of two sizes."""
    media = [(f"m{i}", numbered_frames(60, (96, 128)[i % 2], 80), noise(2, seed=i)) for i in range(5)]
    return write_store(tmp_path / "s", media)


def train(split: StoreSplit, frames: str, **options: object) -> Iterable[Batch]:
    """Batches of a training with flips and turns."""
    config = replace(CONFIG, frames=frames)  # type: ignore[arg-type]
    return TrainLoader(split, SPEC, config, LoaderOptions(3, **options), seed=3).batches()  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_channels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_training_batches_are_those_of_the_graph(split: StoreSplit, dtype: torch.dtype, pad_channels: bool) -> None:
    ways = [islice(train(split, way, dtype=dtype, pad_channels=pad_channels), 4) for way in ("fused", "graph")]
    for fused, graph in zip(*ways, strict=True):
        assert fused.frames is not None
        assert graph.frames is not None
        assert fused.frames.stride() == graph.frames.stride()
        assert has_padded_channels(fused.frames) == pad_channels
        assert fused.frames.dtype == dtype
        assert (fused.frames.float() - graph.frames.float()).abs().max() <= 3.05 * LEVEL
        assert (fused.frames != graph.frames).float().mean() <= 1e-3
        assert fused.ids == graph.ids
        assert torch.equal(fused.log_mel, graph.log_mel)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_crops", [0, 1, 3])
def test_evaluation_batches_are_those_of_the_graph(split: StoreSplit, num_crops: int) -> None:
    views = ViewConfig(num_clips=2, num_crops=num_crops, crop_size_px=64)
    ways = [
        EvalLoader(split, SPEC, replace(CONFIG, frames=way), LoaderOptions(4), views=views)  # type: ignore[arg-type]
        for way in ("fused", "graph")
    ]
    seen = 0
    for fused, graph in zip(*ways, strict=True):
        assert fused.frames is not None
        assert graph.frames is not None
        assert fused.frames.shape == graph.frames.shape
        assert (fused.frames - graph.frames).abs().max() <= 3.05 * LEVEL
        assert (fused.frames != graph.frames).float().mean() <= 1e-3
        assert fused.view.tolist() == graph.view.tolist()
        seen += len(fused)
    assert seen == 5 * 2 * max(1, num_crops)


def test_a_batch_outlives_those_after_it_and_its_memory_is_used_again(split: StoreSplit) -> None:
    batches = iter(train(split, "fused"))
    first = next(batches)
    assert first.frames is not None
    kept = first.frames.clone()
    places = {first.frames.data_ptr()}
    for _ in range(12):
        batch = next(batches)
        assert batch.frames is not None
        assert batch.frames.data_ptr() != first.frames.data_ptr()
        places.add(batch.frames.data_ptr())
    assert torch.equal(first.frames, kept)
    assert len(places) <= 2 + CONFIG.prefetch_batches + 2  # the kept one, the one in hand, and those ahead


def test_memory_is_held_by_any_view_of_a_batch() -> None:
    planes = random_planes(np.random.default_rng(0), 2, 32, 32)
    clips = [clip_of(*planes, (CropWindow(0, 0, 32, 32),), (16, 16))] * 2
    maker = FrameMaker(half=False, channels=3, num_threads=2)
    tensor = maker.begin(clips).result()
    part, place = tensor[1, 0, 0, 3:5], tensor.data_ptr()
    array = tensor.numpy()
    kept = part.clone()
    del tensor
    gc.collect()
    others = [maker.begin(clips).result() for _ in range(3)]
    assert place not in {other.data_ptr() for other in others}
    del part
    gc.collect()
    assert maker.begin(clips).result().data_ptr() != place  # the array still shows it
    assert np.array_equal(array[1, 0, 0, 3:5], kept.numpy())
    del array
    gc.collect()
    places = set()
    again = [maker.begin(clips).result() for _ in range(2)]
    places |= {tensor.data_ptr() for tensor in again}
    assert place in places
    assert np.array_equal(again[0][0].numpy(), Case(clips[0]).fused())
    maker.close()


def test_without_sound_no_graph_is_built(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [batch.frames for batch in islice(train(split, "fused"), 5)]
    monkeypatch.setattr(pipeline.graph, "build_graph", None)
    got = list(islice(train(split, "fused", want_audio=False), 5))
    for batch, frames in zip(got, expected, strict=True):
        assert batch.log_mel is None
        assert torch.equal(batch.frames, frames)  # type: ignore[arg-type]
    views = ViewConfig(num_clips=3, num_crops=3, crop_size_px=64)
    loader = EvalLoader(split, SPEC, replace(CONFIG, rotation=False), LoaderOptions(4, want_audio=False), views=views)
    assert sum(len(batch) for batch in loader) == 5 * 9


def test_a_clip_that_the_operation_refuses_ends_the_loader(split: StoreSplit) -> None:
    loader = TrainLoader(split, SPEC, replace(CONFIG, frames="fused", num_workers=0), LoaderOptions(3))
    plan = loader.plan.clip
    outside = (CropWindow(40.0, 0.0, 64.0, 64.0),)
    loader.plan.clip = lambda position: replace(plan(position), crops=outside)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"every crop window must be finite, not empty and inside the picture"):
        for _ in islice(loader.batches(), 3):
            pass
