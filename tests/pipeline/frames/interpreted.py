"""The kernel and its maker by Triton's interpreter, which `test_device.py` runs in a process of its own: not collected.

Every comparison is bit for bit with the CPU's operation.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.clip import ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.frames import triton_frames
from pipeline.frames.device import DeviceFrameMaker
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.frames import Case, clip_of, random_batch, random_planes
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=2, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(
    crop_size_px=24, jitter_min_px=24, jitter_max_px=40, num_threads=1, num_workers=0, rotation=True, frames="fused"
)
CPU = torch.device("cpu")


def by_kernel(cases: list[Case]) -> Any:
    """(B, S, T, H, W, C) of one batch."""
    maker = DeviceFrameMaker(half=cases[0].half, channels=cases[0].channels, device=CPU)
    return maker.begin([case.clip for case in cases]).result().numpy()


def assert_same(cases: list[Case]) -> None:
    """Compare a batch with each of its clips by the CPU's operation."""
    made = by_kernel(cases)
    for got, case in zip(made, cases, strict=True):
        expected = case.fused()
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int) -> None:
    assert_same(random_batch(np.random.default_rng(seed), 40))


@pytest.mark.parametrize("size", [(1, 1), (8, 32), (9, 33)])
@pytest.mark.parametrize("stored", [(1, 1), (1, 9), (9, 1), (17, 18)])
def test_edges_of_tiles_and_pictures(size: tuple[int, int], stored: tuple[int, int]) -> None:
    """Whole pictures, and windows that end where the picture does or a rounding beyond it."""
    height, width = stored
    planes = random_planes(np.random.default_rng(height * 100 + width), 2, height, width)
    whole = CropWindow(0.0, 0.0, float(width), float(height))
    beyond = CropWindow(-0.009, -0.009, width + 0.018, height + 0.018)
    corner = CropWindow(width - 0.5, height - 0.5, 0.5, 0.5)
    assert_same([Case(clip_of(*planes, (whole, beyond, corner), size, flip), channels=4) for flip in (False, True)])


def test_a_frame_of_a_training() -> None:
    planes = random_planes(np.random.default_rng(1), 1, 256, 340)
    assert_same([Case(clip_of(*planes, (CropWindow(31.3, 20.7, 199.1, 199.1),), (224, 224), True), True, 4)])


def test_both_orders_of_a_resize_are_taken() -> None:
    """Rows first where pictures become lower than they become narrower, and the other way round."""
    planes = random_planes(np.random.default_rng(0), 2, 64, 64)
    whole = (CropWindow(0.0, 0.0, 64.0, 64.0),)
    for size in ((8, 64), (64, 8), (33, 47)):
        assert_same([Case(clip_of(*planes, whole, size))])


def test_planes_may_lie_in_larger_memory() -> None:
    luma, chroma = random_planes(np.random.default_rng(2), 6, 32, 48)
    views = luma[::2, 2:30, 4:40], chroma[::2, 1:15, 2:20]
    assert_same([Case(clip_of(*views, (CropWindow(1, 2, 20, 18),), (24, 24)))])


def test_frames_may_lie_further_apart_than_32_bits_tell(tmp_path: Path) -> None:
    step = (1 << 32) + 64
    sparse = np.memmap(tmp_path / "planes", np.uint8, "w+", shape=(step + 12 * 14,))
    apart = np.lib.stride_tricks.as_strided(sparse, (2, 12, 14, 1), (step, 14, 1, 1))
    luma, chroma = random_planes(np.random.default_rng(3), 2, 12, 14)
    apart[:] = luma
    assert_same([Case(clip_of(apart, chroma, (CropWindow(0, 0, 14, 12),), (9, 9)))])


def test_memory_beside_the_batch_is_not_written() -> None:
    planes = random_planes(np.random.default_rng(4), 5, 20, 20)
    case = Case(clip_of(*planes, (CropWindow(0, 0, 20, 20),), (9, 33)))
    around = torch.full((64 + 5 * 9 * 33 * 3 + 64,), 7.0)
    captured: list[torch.Tensor] = []
    launch = triton_frames.launch
    try:
        triton_frames.launch = lambda crops, out: captured.append(crops)  # type: ignore[assignment]
        by_kernel([case])
    finally:
        triton_frames.launch = launch
    launch(captured[0], around[64:-64].view(1, 1, 5, 9, 33, 3))
    assert torch.equal(around[64:-64].view(1, 5, 9, 33, 3), torch.from_numpy(case.fused()))
    assert (around[:64] == 7.0).all()
    assert (around[-64:] == 7.0).all()


def test_nothing_is_launched_for_no_frames() -> None:
    triton_frames.launch(torch.zeros(0, 25, dtype=torch.int64), torch.empty(0, 1, 2, 8, 8, 3))
    empty = Case(clip_of(*random_planes(np.random.default_rng(5), 0, 8, 8), (CropWindow(0, 0, 8, 8),), (4, 4)))
    assert by_kernel([empty]).shape == (1, 1, 0, 4, 4, 3)


# Whole loaders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    """Four media, of two sizes."""
    media = [(f"m{i}", numbered_frames(40, (64, 80)[i % 2], 64), noise(2, seed=i)) for i in range(4)]
    return write_store(tmp_path / "s", media)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Loaders whose maker is that of a GPU while the list says 1."""
    on, cpu = [0], TrainLoader._frame_maker

    def maker(loader: Any, stream: Any = None) -> Any:
        half, channels = loader.options.dtype == torch.float16, loader.options.memory_channels
        given = cpu(loader, stream)
        return DeviceFrameMaker(half=half, channels=channels, device=CPU) if on[0] and given is not None else given

    for kind in (TrainLoader, EvalLoader):
        monkeypatch.setattr(kind, "_frame_maker", maker)
    return on


@pytest.mark.parametrize("options", [{}, {"want_audio": False}, {"dtype": torch.float16, "pad_channels": True}])
def test_training_batches(split: StoreSplit, rehearsed: list[int], options: dict[str, Any]) -> None:
    found = []
    for rehearsed[0] in (0, 1):
        batches = TrainLoader(split, SPEC, CONFIG, LoaderOptions(2, **options), seed=3).batches()
        found.append([batch.clone() for batch in islice(batches, 2)])
        batches.close()
    for cpu, device in zip(*found, strict=True):
        assert cpu.ids == device.ids
        assert cpu.frames.stride() == device.frames.stride()
        assert torch.equal(cpu.frames, device.frames)


def test_an_evaluation(split: StoreSplit, rehearsed: list[int]) -> None:
    found = []
    for rehearsed[0] in (0, 1):
        views = ViewConfig(num_clips=1, num_crops=3, crop_size_px=24)
        loader = EvalLoader(split, SPEC, replace(CONFIG, rotation=False), LoaderOptions(3), views=views)
        found.append([batch.clone() for batch in loader])
    assert [len(batch) for batch in found[0]] == [9, 3]
    for cpu, device in zip(*found, strict=True):
        assert torch.equal(cpu.frames, device.frames)
