"""Convolutions of grouped pixels for tests: the shapes of the models, layers, inputs, gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.convolutions import Conv2d, FactoredConv3d, set_grouping
from model.pixel_groups import (
    PixelGroups,
    fit_groups,
    widest_groups,
)

EXACT = 1e-12
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


def run(layer: Any, x: Tensor, grouping: Any) -> Tensor:
    set_grouping(layer, grouping)
    out: Tensor = layer(x)
    return out


def groups_of(name: str) -> tuple[Tensor, PixelGroups, int]:
    layer, x = layer_and_input(name)
    preferred = widest_groups(layer.in_channels, layer.out_channels)
    found = fit_groups(preferred, x.shape[-1], layer.kernel_size[-1], layer.stride[-1], layer.padding[-1])
    assert found is not None
    return layer.weight.detach(), found, 4 if layer.in_channels == 3 else layer.in_channels


def view_of_four(frames: Tensor) -> Tensor:
    """The same frames (N, 3, T, H, W), as three of four channels in memory, the fourth zero."""
    rows = F.pad(frames.movedim(1, -1), (0, 1)).contiguous()
    return rows[..., :3].movedim(-1, 1)
