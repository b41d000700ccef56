"""Batches of one clip, maps of one frame and narrow pathways: layouts are ambiguous there, libraries fragile."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.layout import merge_axes, split_axis
from kernels.modules import set_backend
from model.convolutions import Conv2d, FactoredConv3d
from tests.model.support.cases import BACKENDS, built, inputs, tiny, visual

pytestmark = pytest.mark.integration  # whole models or pipelines run

ROOT = Path(__file__).resolve().parents[2]
CASES: list[dict[str, Any]] = [
    {},
    {"beta_audio": 0.25},
    {"fusion": "a_f_s"},
    {"fusion": "av_nonlocal"},
    {"num_frames": 1},
    {"lateral_kernel": 1, "lateral_stages": ("pool1", "res2", "res3", "res4")},
    {"pathways": ("audio",), "fusion": "none"},
    {"pathways": ("slow", "fast"), "fusion": "none", "num_frames": 1},
]


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", CASES)
def test_one_clip_scores_as_in_a_batch_and_trains(changes: dict[str, Any], precision: str, backend: str) -> None:
    config = tiny(backend=backend, **changes)
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config, clips=3)
    given = (frames if config.has_visual else None, log_mel if config.has_audio else None)
    first = tuple(x if x is None else x[:1] for x in given)
    near = {"rtol": 0.1, "atol": 0.1} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            torch.testing.assert_close(model(*first).scores, model(*given).scores[:1], **near)
        model.train()(*first).logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []


@pytest.mark.parametrize(
    ("axis", "sizes"), [(0, (1, 1)), (0, (1, 6)), (0, (3, 1)), (1, (6, 4)), (2, (4, 5)), (2, (1, 1))]
)
@pytest.mark.parametrize("clips", [1, 2])
def test_views_keep_the_strides_of_channels_last(clips: int, axis: int, sizes: tuple[int, int]) -> None:
    shape = [clips, 6, 4, 5]
    shape[axis : axis + 2] = sizes if axis else (clips, sizes[1])
    n, t, h, w = shape
    x = torch.randn(n, 8, t, h, w).to(memory_format=torch.channels_last_3d)
    merged = merge_axes(x, axis)
    assert merged.data_ptr() == x.data_ptr()
    assert merged.stride() == merged.contiguous(memory_format=torch.channels_last).stride()
    back = split_axis(merged, axis, shape[axis : axis + 2])
    assert torch.equal(back, x)
    assert back.stride() == x.stride()


NARROW = """
import torch
from model.convolutions import Conv2d, FactoredConv3d
torch.set_num_threads(1)
for channels in (1, 2, 4, 8, 12, 15):
    for stride in ((2, 2), (8, 1), (4, 1), (1, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = Conv2d(channels, 2 * channels, (1, 1), stride=stride, bias=False).to(dtype)
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
            for _ in range(4):
                x = torch.randn(2, channels, 32, 40).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
                layer(x).float().square().sum().backward()
print("whole")
"""


SMALL = """
import itertools
import torch
from model.convolutions import Conv2d, FactoredConv3d
torch.set_num_threads(1)
torch.manual_seed(0)
worst = 0.0
def check(layer, shape, last):
    global worst
    layer.weight.data = layer.weight.data.contiguous(memory_format=last)
    x = torch.randn(shape).to(memory_format=last)
    given = x.requires_grad_(), layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=last), (y.dtype, y.stride())
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, given, cotangent)
    plain = super(type(layer), layer).forward
    expected = torch.autograd.grad(plain(x), given, cotangent.float())
    for a, b in zip(found, expected):
        error = ((a - b).norm() / b.norm()).item()
        assert error < 0.02, (type(layer).__name__, layer.weight.shape, shape, error)
        worst = max(worst, error)
for taps, t, hw in itertools.product(((5, 7, 7), (3, 3, 3)), (1, 2, 3, 4, 5, 8), (2, 8)):
    layer = FactoredConv3d(3, 8, taps, stride=(1, 2, 2), padding=tuple(k // 2 for k in taps), bias=False)
    check(layer, (2, 3, t, hw, hw), torch.channels_last_3d)
for taps, t, hw in itertools.product(((3, 1, 1), (7, 1, 1), (1, 3, 3)), (1, 2, 8), (1, 2, 8)):
    layer = FactoredConv3d(8, 16, taps, stride=(1, 2, 2), padding=tuple(k // 2 for k in taps), bias=False)
    check(layer, (2, 8, t, hw, hw), torch.channels_last_3d)
for taps, m, f in itertools.product(((3, 3), (9, 1), (1, 9), (7, 7)), (1, 2, 6), (1, 2, 6)):
    layer = Conv2d(8, 16, taps, stride=(2, 2), padding=tuple(k // 2 for k in taps), bias=False)
    check(layer, (2, 8, m, f), torch.channels_last)
assert worst > 1e-5, worst
print("whole")
"""


@pytest.mark.parametrize("program", [NARROW, SMALL], ids=["narrow", "small"])
def test_convolutions_stay_in_their_memory(program: str) -> None:
    """The allocator fills and checks every block: with PyTorch's own weight gradients these processes fail.

    SMALL also compares bfloat16 gradients of maps shorter than the kernel with float32's.
    """
    environment = os.environ | {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "128", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-500:]


@pytest.mark.parametrize("channels", [1, 3, 8, 15, 16])
@pytest.mark.parametrize("stride", [(2, 2), (4, 1), (1, 3), (1, 1)])
def test_strided_convolutions_are_those_of_the_definition(channels: int, stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for layer, shape, plain in (
        (Conv2d(channels, 6, (1, 1), stride=stride), (2, channels, 9, 10), torch.nn.functional.conv2d),
        (FactoredConv3d(channels, 6, 1, stride=(1, *stride)), (2, channels, 3, 9, 10), torch.nn.functional.conv3d),
    ):
        x = torch.randn(shape)
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        ours, wide = x.to(memory_format=last).requires_grad_(), x.double().requires_grad_()
        weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
        y, z = layer(ours), plain(wide, weight, bias, layer.stride)
        torch.testing.assert_close(y, z.float())
        cotangent = torch.randn_like(z)
        z.backward(cotangent)
        y.backward(cotangent.float())
        for found, expected in ((ours.grad, wide.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):
            torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["a_fs", "a_f_s", "av_nonlocal"])
def test_keep_drops_one_clip(fusion: str) -> None:
    from model.folding import fold

    model = built(tiny(fusion=fusion, sync_loss="contrastive"), settled=True).eval()
    frames, log_mel = inputs(model.config, clips=2)
    keep = torch.tensor([True, False])
    with torch.no_grad():
        expected = torch.cat([model(frames, log_mel).scores[:1], model(frames).scores[1:]])
        for options in ({}, {"negative_log_mel": log_mel.flip(0)}):
            found = model(frames, log_mel, audio_keep=keep, **options).scores
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fold(model)(frames, log_mel, audio_keep=keep).scores, expected, rtol=1e-4, atol=1e-5)


def test_log_mels_of_any_strides_are_taken() -> None:
    model = built(tiny(), settled=True).eval()
    frames, log_mel = inputs(model.config, clips=2)
    turned = log_mel.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        assert torch.equal(model(frames, turned).scores, model(frames, log_mel).scores)
        shared = log_mel[:1].expand(2, -1, -1, -1)
        assert torch.equal(model(frames, shared).scores, model(frames, shared.contiguous()).scores)


def test_a_pathway_of_one_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width x beta_fast \(1\.0\) must be a whole number of channels, at least 2"):
        visual(beta_fast=1 / 8)
