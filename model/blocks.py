"""Residual blocks of Table 1. Legend: N clips, C channels, T frames, H W pixels, M audio frames, F mel bins.

Visual maps are (N, C, T, H, W) channels_last_3d, audio maps (N, C, M, F) channels_last; nothing changes a layout.
"""

from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.modules import GhostBatchNorm
from model.config import EXPANSION, ModelConfig
from model.convolutions import Conv2d, FactoredConv3d


class Norm(Protocol):
    """What follows a convolution: `GhostBatchNorm`, or its remainder once it is folded away."""

    def __call__(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_norm: "Norm | None" = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Tensor: ...


Pair = tuple[Tensor, Tensor]  # one map for two readers, each with a gradient of its own: see `GhostBatchNorm`


def conv(in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...] | int = 1) -> nn.Module:
    """A convolution without bias, padded so that its centre tap stays on the input grid; 2-D or 3-D by `kernel`.

    Args:
        kernel: (T, H, W) or (M, F) taps, all odd.
        stride: per axis, or one for all.
    """
    padding = tuple(k // 2 for k in kernel)
    kind = FactoredConv3d if len(kernel) == 3 else Conv2d
    return kind(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)


class ConvNorm(nn.Module):
    """Convolution, then normalisation (which ends with ReLU unless told otherwise)."""

    def __init__(self, convolution: nn.Module, config: ModelConfig, *, zero_init: bool = False) -> None:
        super().__init__()
        self.conv = convolution
        channels = int(convolution.out_channels)  # type: ignore[arg-type]
        self.norm: nn.Module = GhostBatchNorm(channels, clips_per_group=config.clips_per_bn_group, zero_init=zero_init)

    def forward(self, x: Tensor, relu: bool = True, pool: bool = False) -> Tensor:
        """Map (N, C, ...) to (N, C', ...), same layout; with pool also halve H and W (pool1 of Table 1)."""
        out: Tensor = self.norm(self.conv(x), relu=relu, pool=pool)
        return out

    def end_block(
        self, x: Tensor, block_input: Tensor, shortcut: "ConvNorm | None", fork: bool = False
    ) -> Tensor | Pair:
        """End a residual block: ReLU(norm(conv(x)) + shortcut), the shortcut's norm in the same operation."""
        given = {"fork": True} if fork else {}
        y = self.conv(x)
        if shortcut is None:
            out: Tensor | Pair = self.norm(y, residual=block_input, relu=True, **given)
        else:
            out = self.norm(y, residual=shortcut.conv(block_input), residual_norm=shortcut.norm, relu=True, **given)
        return out


class Bottleneck(nn.Module):
    """k_t x 1x1 / 1 x 3x3 / 1 x 1x1 (visual), or 1x1 / 3x3 / 1x1 (audio res4, res5): Table 1.

    Args:
        in_channels, width: C of the input and of the inner convolutions; 4 x width come out.
        reduce: taps of the first convolution, e.g. (3, 1, 1).
        middle: taps of the second, e.g. (1, 3, 3).
        stride: of the second convolution and of the shortcut, which is projected when the shape changes.
        dilation: of the second convolution's spatial taps (AVA's res5: 2).
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        config: ModelConfig,
        *,
        reduce: tuple[int, ...],
        middle: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: int = 1,
    ) -> None:
        super().__init__()
        point = (1,) * len(middle)
        out_channels = EXPANSION * width
        spatial = conv(width, width, middle, stride)
        if dilation > 1:
            spatial.dilation, spatial.padding = (1, dilation, dilation), (0, dilation, dilation)  # type: ignore[assignment]
        self.a = ConvNorm(conv(in_channels, width, reduce), config)
        self.b = ConvNorm(spatial, config)
        self.c = ConvNorm(conv(width, out_channels, point), config, zero_init=True)
        projected = in_channels != out_channels or stride != point
        self.shortcut = ConvNorm(conv(in_channels, out_channels, point, stride), config) if projected else None

    def forward(self, x: Tensor, again: Tensor | None = None, fork: bool = False) -> Tensor | Pair:
        """(N, C, ...) -> (N, 4 width, ...), rectified.

        Args:
            x: the input.
            again: the same map for the shortcut, where the block before gave it twice.
            fork: give the output twice, for the next block's two readers.
        """
        return self.c.end_block(self.b(self.a(x)), x if again is None else again, self.shortcut, fork)


class TimeFrequencyBlock(nn.Module):
    """The block of audio res2 and res3, as the paper's GFLOPs have it: 3 taps in time beside 3 in frequency.

    Two parallel convolutions straight from the block input, each with BN and ReLU, concatenated, then 1x1. BN is per
    channel: one over the concatenation is the same as one on each, with half the launches. `literal` is Table 1 as
    printed: 1x1 first, then both convolutions, summed before one BN.
    """

    def __init__(self, in_channels: int, width: int, config: ModelConfig, *, stride: int, literal: bool) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.reduce = ConvNorm(conv(in_channels, width, (1, 1)), config) if literal else None
        inner = width if literal else in_channels
        self.split = TwoAxes(inner, width, taps=3, stride=stride, config=config, joined="sum" if literal else "concat")
        inner = width if literal else 2 * width
        self.c = ConvNorm(conv(inner, out_channels, (1, 1)), config, zero_init=True)
        projected = in_channels != out_channels or stride != 1
        self.shortcut = ConvNorm(conv(in_channels, out_channels, (1, 1), stride), config) if projected else None

    def forward(self, x: Tensor, again: Tensor | None = None, fork: bool = False) -> Tensor | Pair:
        """(N, C, M, F) -> (N, 4 width, M / stride, F / stride), rectified; arguments as those of `Bottleneck`."""
        y = x if self.reduce is None else self.reduce(x)
        return self.c.end_block(self.split(y), x if again is None else again, self.shortcut, fork)


class TwoAxes(nn.Module):
    """Two parallel convolutions of a spectrogram, along time and along frequency, joined, then one BN and ReLU."""

    def __init__(
        self, in_channels: int, width: int, *, taps: int, stride: int, config: ModelConfig, joined: str
    ) -> None:
        super().__init__()
        self.joined = joined  # "sum" or "concat"
        self.time = conv(in_channels, width, (taps, 1), stride)
        self.frequency = conv(in_channels, width, (1, taps), stride)
        channels = width if joined == "sum" else 2 * width
        self.norm: nn.Module = GhostBatchNorm(channels, clips_per_group=config.clips_per_bn_group)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, M, F) -> (N, width or 2 width, M / stride, F / stride), rectified."""
        time, frequency = self.time(x), self.frequency(x)
        y = time + frequency if self.joined == "sum" else torch.cat([time, frequency], 1)
        out: Tensor = self.norm(y, relu=True)
        return out


FORKS = (Bottleneck, TimeFrequencyBlock)


class Stage(nn.Sequential):
    """Blocks of one stage; with `checkpointed` each block's activations are computed again in backward.

    Blocks are named 0, 1, ...; a Non-local block is named after the block that it follows (nonlocal6), so that weights
    of a model without it fit by name.
    """

    def __init__(self, blocks: dict[str, nn.Module], checkpointed: bool) -> None:
        super().__init__(OrderedDict(blocks))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C', ...); running statistics are updated once either way (see GhostBatchNorm).

        In training a block whose successor reads its output twice, by a convolution and by the shortcut, forks it: the
        two gradients are added where the block's own backward begins.
        """
        training = self.training and torch.is_grad_enabled()
        blocks = list(self)
        given: tuple[Tensor, ...] = (x,)
        for block, successor in zip(blocks, [*blocks[1:], None], strict=True):
            fork = training and isinstance(block, FORKS) and isinstance(successor, FORKS)
            options = {"fork": True} if fork else {}
            if training and self.checkpointed:  # preserve_rng_state=False: no block draws random numbers
                out = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                out = block(*given, **options)
            given = out if fork else (out,)
        return given[0]
