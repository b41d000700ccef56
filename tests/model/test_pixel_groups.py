"""Convolutions of grouped pixels equal plain ones: every shape of the models, odd sizes, layouts, dtypes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layout import is_channels_last
from model import pixel_groups
from model.convolutions import Conv2d, FactoredConv3d, set_grouping
from model.pixel_groups import (
    PixelGroups,
    TapIndices,
    expand_by_padding,
    expand_weight,
    fit_groups,
    four_channels,
    group_pixels,
    preferred_groups,
    ungroup_pixels,
    widest_groups,
    with_four_channels,
)
from model.variants import VARIANTS
from tests.model.support.cases import built, inputs, tiny
from tests.model.support.operations import Operations

pytestmark = pytest.mark.integration  # whole models or pipelines run

EXACT = 1e-12
# What a model convolves: taps, strides, channels and the width of its rows. R50 4x16 at 224 px, then the small preset
# at 64 px; laterals are those of variants that have them at pool1 and res2.
SHAPES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = {
    "fast stem": (3, 8, (5, 7, 7), (1, 2, 2), 224),
    "slow stem": (3, 64, (1, 7, 7), (1, 2, 2), 224),
    "audio stem, time": (1, 32, (9, 1), (1, 1), 80),
    "audio stem, frequency": (1, 32, (1, 9), (1, 1), 80),
    "audio stem, time, 40 bins": (1, 32, (9, 1), (1, 1), 40),
    "audio stem, frequency, 40 bins": (1, 32, (1, 9), (1, 1), 40),
    "fast res2 reduce": (8, 8, (3, 1, 1), (1, 1, 1), 56),
    "fast res2 3x3": (8, 8, (1, 3, 3), (1, 1, 1), 56),
    "fast res2 3x3, 256 px": (8, 8, (1, 3, 3), (1, 1, 1), 64),
    "fast res2 expand": (8, 32, (1, 1, 1), (1, 1, 1), 56),
    "fast res2 next reduce": (32, 8, (3, 1, 1), (1, 1, 1), 56),
    "fast res3 reduce": (32, 16, (3, 1, 1), (1, 1, 1), 56),
    "fast res3 strided 3x3": (16, 16, (1, 3, 3), (1, 2, 2), 56),
    "fast res3 3x3": (16, 16, (1, 3, 3), (1, 1, 1), 28),
    "fast res3 expand": (16, 64, (1, 1, 1), (1, 1, 1), 28),
    "fast res3 next reduce": (64, 16, (3, 1, 1), (1, 1, 1), 28),
    "F->S after pool1": (8, 16, (5, 1, 1), (8, 1, 1), 56),
    "F->S of 8x8": (8, 16, (7, 1, 1), (4, 1, 1), 56),
    "small fast stem": (3, 4, (5, 7, 7), (1, 2, 2), 64),
    "small slow stem": (3, 16, (1, 7, 7), (1, 2, 2), 64),
    "small audio stem": (1, 8, (1, 9), (1, 1), 40),
    "small fast res2": (4, 4, (1, 3, 3), (1, 1, 1), 16),
    "small fast res2 expand": (4, 16, (1, 1, 1), (1, 1, 1), 16),
    "small shortcut": (16, 32, (1, 1, 1), (1, 2, 2), 16),
    "small slow res2": (16, 16, (1, 3, 3), (1, 1, 1), 16),
    "small audio res2": (8, 8, (3, 1), (1, 1), 40),
    "small audio res2, frequency": (8, 8, (1, 3), (1, 1), 40),
    "small audio res3, strided": (32, 16, (1, 3), (2, 2), 40),
    "asymmetric": (5, 7, (3, 5), (1, 1), 24),
    "one group a row": (8, 8, (3, 3), (1, 1), 8),
}


def layer_and_input(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    """A convolution of `SHAPES` and a map with just enough of the other axes."""
    channels, out_channels, kernel, stride, width = SHAPES[name]
    return made(channels, out_channels, kernel, stride, width, dtype)


def made(
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    width: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    kind = FactoredConv3d if len(kernel) == 3 else Conv2d
    form = torch.channels_last_3d if len(kernel) == 3 else torch.channels_last
    layer: Any = kind(channels, out_channels, kernel, stride=stride, padding=tuple(k // 2 for k in kernel), bias=False)
    layer.to(dtype)
    layer.weight.data = layer.weight.data.contiguous(memory_format=form)
    other = [k + s for k, s in zip(kernel[:-1], stride[:-1], strict=True)]
    return layer, torch.randn(2, channels, *other, width, dtype=dtype).to(memory_format=form)


def results(layer: Any, x: Tensor, grouping: Any, cotangent: Tensor | None = None) -> list[Tensor]:
    """Output, and the gradients of input and weight for a random gradient of the output."""
    set_grouping(layer, grouping)
    x = x.detach().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y) if cotangent is None else cotangent
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight), cotangent)]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


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


def run(layer: Any, x: Tensor, grouping: Any) -> Tensor:
    set_grouping(layer, grouping)
    out: Tensor = layer(x)
    return out


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


# Fallbacks ------------------------------------------------------------------------------------------------------------


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


# Weights --------------------------------------------------------------------------------------------------------------


def groups_of(name: str) -> tuple[Tensor, PixelGroups, int]:
    layer, x = layer_and_input(name)
    preferred = widest_groups(layer.in_channels, layer.out_channels)
    found = fit_groups(preferred, x.shape[-1], layer.kernel_size[-1], layer.stride[-1], layer.padding[-1])
    assert found is not None
    return layer.weight.detach(), found, 4 if layer.in_channels == 3 else layer.in_channels


def test_the_picture_of_the_docstring() -> None:
    groups = fit_groups((4, 4), 16, 3, 1, 1)
    assert groups is not None
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    wide = expand_by_padding(weight, groups, 1)[:, :, 0].movedim(1, -1)  # (q, t, b)
    rows = ["".join(" .123"[int(value) + 1] for value in row) for row in wide.flatten(1)]
    assert rows == ["...123......", "....123.....", ".....123....", "......123..."]


@pytest.mark.parametrize("name", SHAPES)
def test_the_gather_is_the_definition_bit_for_bit(name: str) -> None:
    weight, groups, channels = groups_of(name)
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    for given in (weight, weight.contiguous(), weight.bfloat16()):
        expected = expand_by_padding(given, groups, channels)
        found = expand_weight(given, indices)
        assert torch.equal(found, expected)
        assert found.dtype == given.dtype
        assert found.movedim(1, -1).is_contiguous()
        assert found.count_nonzero() == groups.outputs * given.count_nonzero()


@pytest.mark.parametrize("name", ["fast stem", "slow stem", "fast res3 strided 3x3", "asymmetric"])
def test_gradient_of_the_weight_build(name: str) -> None:
    weight, groups, channels = groups_of(name)
    weight = weight[:2].contiguous(memory_format=torch.channels_last_3d if weight.dim() == 5 else torch.channels_last)
    if weight.dim() == 5:
        weight = weight[:, :, :1, :1]
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    build: Callable[[Tensor], Tensor] = lambda w: expand_weight(w, indices)  # noqa: E731
    assert torch.autograd.gradcheck(build, weight.clone().requires_grad_())


def test_the_weight_build_is_few_operations_and_none_that_adds_atomically() -> None:
    weight, groups, channels = groups_of("fast stem")
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    weight = weight.bfloat16().requires_grad_()
    expand_weight(weight, indices)
    views = {"view", "permute", "_unsafe_view", "detach", "alias", "t", "transpose"}
    with Operations() as operations:
        wide = expand_weight(weight, indices)
    assert [name for name in operations.names() if name not in views] == ["cat", "index_select"]
    with Operations() as operations:
        (gradient,) = torch.autograd.grad(wide, weight, torch.ones_like(wide))
    assert [name for name in operations.names() if name not in views | {"ones_like"}] == ["index_select", "sum"]
    assert torch.equal(gradient, torch.full_like(weight, groups.outputs))


def test_a_16_bit_gradient_is_summed_in_float32() -> None:
    weight, groups, channels = groups_of("fast res2 3x3")
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    half = weight.bfloat16().requires_grad_()
    wide = expand_weight(half, indices)
    cotangent = torch.randn(wide.shape).to(wide)
    (found,) = torch.autograd.grad(wide, half, cotangent)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(expand_weight(exact, indices), exact, cotangent.double())
    assert torch.equal(found, expected.bfloat16())


# Views and frames of four channels ------------------------------------------------------------------------------------


def test_grouping_is_a_view() -> None:
    for shape, form in (((2, 8, 3, 4, 16), torch.channels_last_3d), ((2, 8, 4, 16), torch.channels_last)):
        x = torch.randn(shape).to(memory_format=form)
        grouped = group_pixels(x, 4)
        assert grouped.data_ptr() == x.data_ptr()
        assert grouped.shape == (2, 32, *shape[2:-1], 4)
        assert grouped.is_contiguous(memory_format=form)
        assert torch.equal(grouped[:, 8:16], x[..., 1::4])
        back = ungroup_pixels(grouped, 4)
        assert torch.equal(back, x)
        assert back.stride() == x.stride()


def view_of_four(frames: Tensor) -> Tensor:
    """The same frames (N, 3, T, H, W), as three of four channels in memory, the fourth zero."""
    rows = F.pad(frames.movedim(1, -1), (0, 1)).contiguous()
    return rows[..., :3].movedim(-1, 1)


def test_frames_of_four_channels_are_recognised() -> None:
    frames = torch.randn(2, 3, 4, 6, 8).to(memory_format=torch.channels_last_3d)
    view = view_of_four(frames)
    parent = four_channels(view)
    assert parent is not None
    assert parent.data_ptr() == view.data_ptr()
    assert parent.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(parent[:, :3], frames)
    assert not parent[:, 3].any()
    assert with_four_channels(view, torch.float32).data_ptr() == view.data_ptr()
    assert four_channels(frames) is None
    assert four_channels(frames.contiguous()) is None
    assert four_channels(view[:, :, ::2]) is None  # every other frame: not dense
    assert four_channels(view[1:]) is not None
    short = torch.randn(2 * 4 * 6 * 8 * 4 - 1).as_strided(view.shape, view.stride())
    assert four_channels(short) is None  # without memory for the last pixel's fourth channel
    for given in (frames, view, short, frames.contiguous()):
        padded = with_four_channels(given, torch.float64)
        assert torch.equal(padded[:, :3], given.double())
        assert not padded[:, 3].any() or given is short
        assert padded.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("grouping", ["off", "always"])
@pytest.mark.parametrize("name", ["fast stem", "slow stem"])
def test_a_stem_takes_frames_of_four_channels(name: str, grouping: str) -> None:
    layer, frames = layer_and_input(name)
    view = view_of_four(frames)
    parent = four_channels(view)
    cotangent = torch.randn(run(layer, frames, "off").shape, dtype=torch.float64)
    found = {}
    for kind, given in {"frames": frames, "view": view, "parent": parent}.items():
        assert given is not None
        y = run(layer, given, grouping)
        found[kind] = y, torch.autograd.grad(y, layer.weight, cotangent)[0]
    for kind in ("view", "parent"):
        assert torch.equal(found[kind][0], found["frames"][0])
        assert torch.equal(found[kind][1], found["frames"][1])


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"width": 32, "beta_fast": 0.25, "slow_frame_sampling": "linspace"}])
def test_a_model_of_grouped_pixels_is_the_same_model(changes: dict[str, Any]) -> None:
    config = tiny(lateral_stages=("pool1", "res2", "res3", "res4"), backend="reference", **changes)
    frames, log_mel = (x.double() for x in inputs(config, clips=2, px=64))
    found: dict[str, list[Tensor]] = {}
    for grouping, given in (("off", frames), ("always", frames), ("always", view_of_four(frames))):
        model = built(config, settled=True).double()
        set_grouping(model, grouping)  # type: ignore[arg-type]
        out = model(given, log_mel).logits
        out.square().sum().backward()
        values = [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        found[f"{grouping} {given.stride(4)}"] = values
    plain, grouped, view = found.values()
    assert len(plain) == len(grouped) == 1 + len(list(model.parameters()))
    assert max(distance(a, b) for a, b in zip(grouped, plain, strict=True)) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(view, grouped, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frames_are_cast_once_for_both_stems(dtype: torch.dtype) -> None:
    config = tiny(backend="reference")
    model = built(config, settled=True).eval()
    set_grouping(model, "always")
    frames, log_mel = inputs(config, clips=2)
    frames = view_of_four(frames.to(dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        found = model(frames, log_mel).scores
    of_frames = [name for name, shape in operations.seen if len(shape) == 5 and shape[1] in (3, 4)]
    copies = [name for name in of_frames if name in ("_to_copy", "copy_", "clone", "contiguous", "constant_pad_nd")]
    # Slow's frames are picked by one copy, weights of the stems have five axes as well.
    assert copies.count("_to_copy") <= (dtype != torch.bfloat16) + 2, copies
    assert copies.count("clone") == 1
    set_grouping(model, "off")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(frames, log_mel).scores
    assert distance(found, expected) < 0.02


@pytest.mark.parametrize("name", ["fast stem", "fast res2 3x3", "fast res2 next reduce", "audio stem, frequency"])
def test_autocast(name: str) -> None:
    layer, x = layer_and_input(name, torch.float32)
    exact = results(layer, x, "off")
    cotangent = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = results(layer, x, "off", cotangent.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, x, "always", cotangent)
        assert found[0].dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [torch.float32, torch.float32]
    assert max(distance(a, b) for a, b in zip(found, exact, strict=True)) < 0.01


@pytest.mark.parametrize("name", ["fast stem", "fast res2 3x3", "audio stem, time"])
def test_compiles_whole(name: str) -> None:
    layer, x = layer_and_input(name)
    set_grouping(layer, "always")
    expected = results(layer, x, "always")
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    given = x.detach().requires_grad_()
    y = compiled(given)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    found = [y.detach(), *torch.autograd.grad(y, (given, layer.weight), cotangent)]
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < EXACT
    torch._dynamo.reset()


# CUDA -----------------------------------------------------------------------------------------------------------------


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
