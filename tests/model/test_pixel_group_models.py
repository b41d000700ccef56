"""Models of grouped pixels: views, frames of four channels, autocast, compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.convolutions import set_grouping
from model.pixel_groups import (
    four_channels,
    group_pixels,
    ungroup_pixels,
    with_four_channels,
)
from tests.model.support.cases import built, inputs, tiny
from tests.model.support.operations import Operations
from tests.model.support.pixel_groups import EXACT, distance, layer_and_input, results, run, view_of_four

pytestmark = pytest.mark.integration  # whole models or pipelines run


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
