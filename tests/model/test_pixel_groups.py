"""Convolutions of grouped pixels equal plain ones: every shape of the models, odd sizes, layouts, dtypes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layout import is_channels_last
from model import pixel_groups
from model.convolutions import Conv2d, set_grouping
from model.pixel_groups import (
    PixelGroups,
    expand_by_padding,
    fit_groups,
    group_pixels,
    preferred_groups,
    ungroup_pixels,
    widest_groups,
)
from model.variants import VARIANTS
from tests.model.support.pixel_groups import (
    EXACT,
    SHAPES,
    distance,
    layer_and_input,
    made,
    results,
    run,
    view_of_four,
)

pytestmark = pytest.mark.integration  # whole models or pipelines run


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_convolution_equals_the_plain_one(name: str) -> None:
    layer, x = layer_and_input(name)
    assert layer._groups(x, layer.stride[-1], layer.padding[-1]) is None  # a CPU
    set_grouping(layer, "always")
    assert layer._groups(x, layer.stride[-1], layer.padding[-1]) is not None
    grouped, plain = results(layer, x, "always"), results(layer, x, "off")
    assert max(distance(found, expected) for found, expected in zip(grouped, plain, strict=True)) < EXACT
    assert is_channels_last(grouped[0])


@pytest.mark.parametrize("name", ["fast stem", "slow stem", "fast res2 3x3", "audio stem, frequency", "asymmetric"])
def test_a_bias_is_the_same_for_every_pixel(name: str) -> None:
    layer, x = layer_and_input(name)
    layer.bias = nn.Parameter(torch.randn(layer.out_channels, dtype=torch.float64))
    bias = [
        torch.autograd.grad(run(layer, x, grouping).square().sum(), layer.bias)[0] for grouping in ("always", "off")
    ]
    assert distance(*bias) < EXACT
    assert distance(run(layer, x, "always"), run(layer, x, "off")) < EXACT


@pytest.mark.parametrize("width", [7, 9, 12, 15, 18, 20, 30, 31, 36])
@pytest.mark.parametrize("name", ["fast stem", "slow stem", "fast res2 3x3", "fast res3 strided 3x3"])
def test_odd_widths(name: str, width: int) -> None:
    channels, out_channels, kernel, stride, _ = SHAPES[name]
    layer, x = made(channels, out_channels, kernel, stride, width)
    for found, expected in zip(results(layer, x, "always"), results(layer, x, "off"), strict=True):
        assert distance(found, expected) < EXACT


def test_any_row_and_any_groups() -> None:
    torch.manual_seed(0)
    tried = 0
    for taps, stride, padding, inputs_, outputs in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (2, 3), (1, 2, 4)
    ):
        for width in range(6, 25):
            groups = pixel_groups._fit(inputs_, outputs, width, taps, stride, padding)
            if groups is None:
                continue
            weight = torch.randn(2, 3, 2, taps, dtype=torch.float64)
            x = torch.randn(1, 3, 3, width, dtype=torch.float64).to(memory_format=torch.channels_last)
            expected = F.conv2d(x, weight, None, (1, stride), (0, padding))
            wide = expand_by_padding(weight, groups, 3)
            y = F.conv2d(group_pixels(x, inputs_), wide, None, (1, groups.grouped_stride), (0, groups.grouped_padding))
            found = ungroup_pixels(y.contiguous(memory_format=torch.channels_last), outputs)
            assert found.shape == expected.shape
            assert distance(found, expected) < EXACT
            tried += 1
    assert tried > 500


def test_which_widths_group() -> None:
    def sizes(preferred: tuple[int, int], width: int, *row: int) -> tuple[int, int] | None:
        found = fit_groups(preferred, width, *row)
        return None if found is None else (found.inputs, found.outputs)

    assert sizes((8, 8), 56, 3, 1, 1) == (8, 8)
    assert sizes((8, 8), 28, 3, 1, 1) == (4, 4)
    assert sizes((8, 8), 14, 3, 1, 1) is None
    assert sizes((4, 4), 56, 3, 2, 1) == (4, 4)
    assert sizes((4, 4), 28, 3, 2, 1) == (2, 2)
    assert sizes((2, 4), 224, 7, 2, 3) == (2, 4)
    assert sizes((2, 4), 220, 7, 2, 3) is None  # 110 output pixels
    assert sizes((2, 1), 220, 7, 2, 3) == (2, 1)
    assert sizes((2, 1), 219, 7, 2, 3) is None
    assert fit_groups((2, 4), 224, 7, 2, 3) == PixelGroups(7, 2, 3, 2, 4, 7, 4, 2)
    assert fit_groups((2, 1), 224, 7, 2, 3) == PixelGroups(7, 2, 3, 2, 1, 5, 1, 2)


def test_the_rule() -> None:
    expected = {
        (3, 8): (2, 4),
        (3, 16): (2, 2),
        (3, 32): (2, 1),
        (3, 64): (2, 1),
        (1, 32): (8, 8),
        (8, 8): (8, 8),
        (8, 16): (4, 4),
        (8, 32): (4, 4),
        (32, 8): (4, 4),
        (16, 16): (4, 4),
        (16, 64): (2, 2),
        (64, 16): (2, 2),
        (32, 16): (2, 2),
        (32, 32): (1, 1),
        (64, 64): (1, 1),
        (128, 256): (1, 1),
    }
    assert {pair: widest_groups(*pair) for pair in expected} == expected
    inner, stem = (8, 8, (1, 3, 3)), (3, 4, (5, 7, 7))
    halves, wider = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    assert {preferred_groups(*inner, "cuda", dtype) for dtype in halves} == {(8, 8)}
    assert {preferred_groups(*inner, "cuda", dtype) for dtype in wider} == {(1, 1)}
    assert {preferred_groups(*inner, "cpu", dtype) for dtype in (*halves, *wider)} == {(1, 1)}
    assert {preferred_groups(*stem, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)} == {(2, 4)}
    assert {preferred_groups(*stem, "cpu", dtype) for dtype in (torch.float16, torch.float64)} == {(1, 1)}
    for others in ((3, 8, (5, 7, 7)), (3, 4, (1, 7, 7)), (3, 4, (7, 7)), (4, 4, (5, 7, 7))):
        assert preferred_groups(*others, "cpu", torch.float32) == (1, 1)
    with pytest.raises(ValueError, match=r"grouping \(on\) must be one of auto, off, always"):
        set_grouping(Conv2d(8, 8, 1), "on")  # type: ignore[arg-type]


def test_which_convolutions_of_the_model_are_grouped() -> None:
    from model.avslowfast import AVSlowFast

    with torch.device("meta"):
        model = AVSlowFast(VARIANTS["avslowfast_r50_4x16"])
    grouped = {
        name: widest_groups(m.in_channels, m.out_channels)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Conv3d) and widest_groups(m.in_channels, m.out_channels) != (1, 1)
    }
    fast: dict[str, tuple[int, int]] = {"fast.stem.conv": (2, 4), "slow.stem.conv": (2, 1)}
    fast |= {"audio.stem.time": (8, 8), "audio.stem.frequency": (8, 8)}
    for block in range(3):
        stage = f"fast.stages.res2.{block}"
        fast[f"{stage}.a.conv"] = (4, 4) if block else (8, 8)
        fast |= {f"{stage}.b.conv": (8, 8), f"{stage}.c.conv": (4, 4)}
    fast["fast.stages.res2.0.shortcut.conv"] = (4, 4)
    for block in range(4):
        stage = f"fast.stages.res3.{block}"
        fast |= {f"{stage}.a.conv": (2, 2), f"{stage}.b.conv": (4, 4), f"{stage}.c.conv": (2, 2)}
    assert grouped == fast


def test_what_cannot_be_grouped_is_convolved_plainly() -> None:
    layer, x = layer_and_input("fast res2 3x3")
    rows = x.movedim(1, -1)
    wider = torch.cat([rows, rows], -1)[..., :8].movedim(-1, 1)  # a slice of channels
    every_other = torch.cat([x, x], -1)[..., ::2]
    row_major = x.contiguous()
    for view in (wider, every_other, row_major, x[..., :55]):
        expected = F.conv3d(view, layer.weight, None, layer.stride, layer.padding)
        assert distance(run(layer, view, "always"), expected) < EXACT
    assert run(layer, x[..., :24], "always").shape[-1] == 24  # rows of a wider map: pixels are dense, rows are not
    assert distance(run(layer, x[..., :24], "always"), run(layer, x[..., :24], "off")) < EXACT
    layer.dilation, layer.padding = (1, 2, 2), (0, 2, 2)
    expected = F.conv3d(x, layer.weight, None, 1, layer.padding, layer.dilation)
    assert distance(run(layer, x, "always"), expected) < EXACT


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", SHAPES)
def test_on_cuda(name: str) -> None:
    layer, x = layer_and_input(name)
    layer, x = layer.cuda(), x.bfloat16().double().cuda()
    layer.weight.data = layer.weight.data.bfloat16().double()
    exact = results(layer, x, "off")
    assert max(distance(a, b) for a, b in zip(results(layer, x, "always"), exact, strict=True)) < EXACT
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(exact[0].shape, dtype=torch.float64, generator=generator).cuda()
    layer.float()
    set_grouping(layer, "auto")
    with torch.autocast("cuda", torch.bfloat16):
        assert layer._groups(x, layer.stride[-1], layer.padding[-1]) is not None
        found = results(layer, x.float(), "auto", cotangent.bfloat16())
    assert found[0].dtype == torch.bfloat16
    assert is_channels_last(found[0])
    assert max(distance(a.double(), b) for a, b in zip(found, exact, strict=True)) < 0.01


@pytest.mark.needs_cuda
@pytest.mark.parametrize("training", [False, True])
def test_a_captured_stem_replays(training: bool) -> None:
    layer, frames = layer_and_input("fast stem", torch.float32)
    layer, view = layer.cuda(), view_of_four(frames.cuda().half())

    def run_once() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False), torch.set_grad_enabled(training):
            return layer(view) if not training else torch.autograd.grad(layer(view).sum(), layer.weight)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run_once()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run_once()
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert expected.any()
