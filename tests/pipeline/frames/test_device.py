"""Frames on a GPU: the kernel by Triton's interpreter and its compiled text here, the kernel itself where a GPU is."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batch import has_padded_channels
from pipeline.clip import ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.frames import table
from pipeline.frames.device import DeviceFrameMaker, triton_problem
from pipeline.frames.native import library_text
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.frames import LEVEL, clip_of, random_batch, random_planes
from tests.pipeline.support.stores import noise, numbered_frames, write_store

ROOT = Path(__file__).resolve().parents[3]
SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80, num_threads=2, rotation=True, frames="fused")
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch for CPUs has no Triton")
with_library = pytest.mark.skipif(bool(library_text()), reason="no library of frames is built")


@with_triton
@with_library
@pytest.mark.integration
def test_the_interpreted_kernel_makes_the_bits_of_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pipeline/frames/interpreted.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b30 passed\b", done.stdout), done.stdout[-500:]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.frames import triton_frames as frames
names = {"crops": "*i64", "out": sys.argv[1], "frames": "i32", "height": "i32", "width": "i32"}
constants = {"C": int(sys.argv[2]), "ROWS": frames.ROWS, "COLUMNS": frames.COLUMNS, "FRAMES": frames.FRAMES}
source = ASTSource(frames._make, names | dict.fromkeys(constants, "constexpr"), constants)
options = {"enable_fp_fusion": False, "num_warps": 4}
print(triton.compile(source, GPUTarget("cuda", int(sys.argv[3]), 32), options).asm["ptx"])
"""


@with_triton
@pytest.mark.integration
@pytest.mark.parametrize(
    ("dtype", "channels", "capability"), [("*fp16", "4", "90"), ("*fp32", "3", "80"), ("*fp16", "3", "100")]
)
def test_the_compiled_kernel_rounds_every_operation(tmp_path: Path, dtype: str, channels: str, capability: str) -> None:
    """No GPU is needed to compile for one. What the interpreter lets pass, the compiler may refuse."""
    command = [sys.executable, "-c", COMPILE, dtype, channels, capability]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    floats = set(re.findall(r"\b(?:add|sub|mul|div|fma|mad)\.[a-z.]*f32(?:x2)?\b", done.stdout))
    pairs = {"add.rn.f32x2", "sub.rn.f32x2", "mul.rn.f32x2"} if capability == "100" else set()  # of numbers at once
    assert floats - pairs == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert "ftz" not in done.stdout
    if not pairs:  # what rounds is added and taken away
        assert done.stdout.count("0f4B400000") == done.stdout.count("0fCB400000") > 9


def test_windows_and_sizes_that_the_cpu_refuses_are_refused() -> None:
    planes = random_planes(np.random.default_rng(0), 1, 16, 20)
    maker = DeviceFrameMaker(half=False, channels=3, device=torch.device("cpu"))
    good = clip_of(*planes, (CropWindow(0, 0, 20, 16), CropWindow(0, 0, 20, 16)), (8, 8))
    for left, top, width, height in (
        (-0.1, 0, 20, 16), (0, -0.1, 20, 16), (0, 0, 20.1, 16), (0, 0, 20, 16.1), (0, 8, 20, 0), (0, 9, 20, -1),
        (float("nan"), 0, 20, 16), (0, 0, float("inf"), 16),
    ):  # fmt: skip
        bad = replace(
            good, plan=replace(good.plan, id="bad", crops=(good.plan.crops[0], CropWindow(left, top, width, height)))
        )
        with pytest.raises(ValueError, match=r"frames of bad \(picture 16x20.*every crop window must be finite, not"):
            maker.begin([good, bad])
    with pytest.raises(ValueError, match=r"sizes must be 1..32768 px"):
        maker.begin([replace(good, plan=replace(good.plan, size_px=(0, 8)))])
    luma, chroma = planes
    for wrong, name in (
        ((luma[..., 0:0], chroma), "luma"),
        ((luma.astype(np.int16), chroma), "luma"),
        ((luma[:, :, ::2], chroma), "luma"),
        ((luma.repeat(2, 0), chroma), "luma"),
        ((luma, chroma[:, 1:]), "chroma"),
        ((luma, chroma.repeat(2, 0)), "chroma"),
    ):
        with pytest.raises(ValueError, match=rf"{name} of .* must be .* with dense rows; hand out planes"):
            maker.begin([replace(good, luma=wrong[0], chroma=wrong[1])])


def test_a_row_of_the_table() -> None:
    plan = clip_of(*random_planes(np.random.default_rng(0), 1, 40, 60), (CropWindow(8, 4, 32, 16),), (8, 4), True).plan
    given = table.Plane(1 << 40, 2400, 60, 40, 60), table.Plane(7, 1200, 60, 20, 30)
    (row,) = table.crop_table([plan], [given])
    floats = row.astype(np.int32).view(np.float32)
    assert row[:5].tolist() == list(given[0])
    assert row[12:17].tolist() == list(given[1])
    assert row[24] == 1
    assert floats[[6, 9, 18, 21]].tolist() == [
        2.0,
        8.0,
        1.0,
        4.0,
    ]  # px of luma and chroma a row, and a column
    # Rows 3..22 and columns 7..42 are touched; rows first: 5 * 35 * 8 + 32 = 1432 is not less than 6 * 4 * 19 = 456.
    assert row[[5, 8, 11]].tolist() == [0, 3, 0]
    assert floats[[7, 10]].tolist() == [(4 - 3) + (0.5 * 2 - 1.5), 8 + (0.5 * 8 - 1.5)]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of streams that stand in for CUDA's, in its order."""
    calls: list[str] = []
    step = SimpleNamespace(wait_event=lambda event: calls.append(f"step waits for {event}"), name="step")
    launched = SimpleNamespace(launch=lambda crops, out: calls.append("launch"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(calls.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: calls.append(f"{t.dim()}-d used by {s.name}"))
    monkeypatch.setitem(sys.modules, "pipeline.frames.triton_frames", launched)  # type: ignore[arg-type]
    return calls


def test_nobody_waits_but_the_stream_that_uses_the_frames(order: list[str]) -> None:
    def record_event() -> str:
        order.append("event")
        return "event"

    planes = SimpleNamespace(name="planes", record_event=record_event)
    maker = DeviceFrameMaker(half=True, channels=4, device=torch.device("cpu"), stream=planes)
    clip = clip_of(*random_planes(np.random.default_rng(0), 2, 8, 8), (CropWindow(0, 0, 8, 8),), (4, 4))
    pending = maker.begin([clip])
    assert order == ["on planes", "launch", "4-d used by planes", "4-d used by planes", "event"]
    order.clear()
    frames = pending.result()
    assert order == ["step waits for event", "6-d used by step"]
    assert (frames.shape, frames.dtype) == ((1, 1, 2, 4, 4, 4), torch.float16)
    with pytest.raises(AssertionError, match="handed out once"):
        pending.result()


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler (gcc, clang) found" in triton_problem.__wrapped__()
    monkeypatch.setenv("CC", "cc")
    assert triton_problem.__wrapped__() == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_problem.__wrapped__().startswith("package triton (missing) must be installed")


# On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    """Five H.264 media, of two sizes that NVDEC takes."""
    media = [(f"m{i}", numbered_frames(60, (144, 128)[i % 2], 128), noise(2, seed=i)) for i in range(5)]
    return write_store(tmp_path / "s", media, codec="h264")


@with_library
@pytest.mark.needs_cuda
@pytest.mark.parametrize("seed", range(40))
def test_a_gpu_makes_the_bits_of_the_cpu(seed: int) -> None:
    """Every operation is rounded as IEEE says on both, division included: not one bit may differ."""
    cases = random_batch(np.random.default_rng(seed), 300)
    maker = DeviceFrameMaker(half=cases[0].half, channels=cases[0].channels, device=torch.device("cuda", 0))
    made = maker.begin([case.clip for case in cases]).result().cpu().numpy()
    for got, case in zip(made, cases, strict=True):
        assert np.array_equal(got, case.fused())


def train(split: StoreSplit, frames: str, device: str = "cuda:0", **options: Any) -> Iterator[Any]:
    """Batches of a training with flips and turns."""
    config = replace(CONFIG, frames=frames)  # type: ignore[arg-type]
    return iter(TrainLoader(split, SPEC, config, LoaderOptions(3, device=device, **options), seed=3).batches())


@with_library
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("audio", [True, False])
def test_training_batches_on_a_gpu(split: StoreSplit, dtype: torch.dtype, audio: bool) -> None:
    """Those of the CPU's operation bit for bit; DALI's at most as far away as its CPU operators, and 3 levels more."""
    options = {"dtype": dtype, "want_audio": audio}
    cpu = train(split, "fused", "cpu", pad_channels=True, **options)
    ways = cpu, train(split, "fused", **options), train(split, "graph", **options)
    for of_cpu, fused, graph in islice(zip(*ways, strict=True), 6):
        assert of_cpu.ids == fused.ids == graph.ids
        assert has_padded_channels(fused.frames)
        assert fused.frames.stride() == graph.frames.stride()
        assert torch.equal(fused.frames.cpu(), of_cpu.frames)
        apart = (fused.frames.float() - graph.frames.float()).abs() / LEVEL
        assert float(apart.max()) <= 4.05 + 3.0
        assert float(apart.mean()) <= 0.5


@pytest.mark.needs_cuda
@pytest.mark.parametrize("decoder", ["cpu", "auto"])
def test_an_evaluation_on_a_gpu(split: StoreSplit, decoder: str) -> None:
    views = ViewConfig(num_clips=2, num_crops=3, crop_size_px=64)
    config = replace(CONFIG, decoder=decoder, rotation=False)  # type: ignore[arg-type]
    ways = [
        EvalLoader(split, SPEC, replace(config, frames=way), LoaderOptions(4, device="cuda:0"), views=views)  # type: ignore[arg-type]
        for way in ("fused", "graph")
    ]
    seen = 0
    for fused, graph in zip(*ways, strict=True):
        assert fused.ids == graph.ids
        assert fused.frames is not None
        assert graph.frames is not None
        assert float((fused.frames - graph.frames).abs().max()) / LEVEL <= 4.05 + 3.0
        seen += len(fused)
    assert seen == 5 * 2 * 3


@with_library
@pytest.mark.needs_cuda
@pytest.mark.parametrize("decoder", ["cpu", "auto"])
def test_memory_is_not_used_again_while_a_stream_works_on_it(split: StoreSplit, decoder: str) -> None:
    """The device is far behind the host, which has dropped a batch before its sum is begun, and holds two others."""
    config = replace(CONFIG, decoder=decoder)  # type: ignore[arg-type]
    expected = [batch.frames for batch in islice(train(split, "fused", "cpu", pad_channels=True), 12)]
    batches = TrainLoader(split, SPEC, config, LoaderOptions(3, device="cuda:0"), seed=3).batches()
    held: list[Any] = []
    copies = []
    for batch in islice(batches, 12):
        torch.cuda._sleep(50_000_000)  # about 30 ms
        copies.append(batch.frames.clone())
        held = [*held[-1:], batch]
    for batch, frames in zip(held, expected[-2:], strict=True):
        assert torch.equal(batch.frames.cpu(), frames)
    batches.close()
    for copy, frames in zip(copies, expected, strict=True):
        assert torch.equal(copy.cpu(), frames)
