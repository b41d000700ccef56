"""Narrow convolutions on wide vectors: neighbouring pixels of a row as one pixel of more channels.

GPU libraries have no good kernel for convolutions of fewer than 32 channels. In channels-last memory, n neighbouring
pixels of a row ARE one pixel of n*C channels in a row n times shorter. It is a view:

    a row of 8 pixels, C = 2     | a0 a1 | b0 b1 | c0 c1 | d0 d1 | e0 e1 | f0 f1 | g0 g1 | h0 h1 |
    grouped, n = 4               | a0 a1   b0 b1   c0 c1   d0 d1 | e0 e1   f0 f1   g0 g1   h0 h1 |

The same holds for the output, in groups of m pixels. Of a convolution y[o, x] = sum of w[o, c, k] * in[c, x*s + k - p]
(K taps, stride s, padding p along the row), output x = m*X + q takes input pixel n*(S*X + t - P) + b with the stride
S = m*s/n and the padding P = ceil(p / n) of the grouped convolution, if

    W[q*O + o, b*C + c, t] = w[o, c, k],   k = n*(t - P) + b + p - q*s,   and zero where k is outside 0 .. K-1.

Row q of W over (t, b) is thus w itself, moved by q*s to the right: a block-Toeplitz matrix. K = 3, s = 1, n = m = 4:

            t = 0         t = 1         t = 2
    q = 0   . . . 0   |   1 2 . .   |   . . . .        a number: the tap k of w
    q = 1   . . . .   |   0 1 2 .   |   . . . .        a dot:    zero
    q = 2   . . . .   |   . 0 1 2   |   . . . .
    q = 3   . . . .   |   . . 0 1   |   2 . . .

The zeros are multiplied as well; tensor cores have the room for it. Other axes of the kernel are untouched. Each tap of
w stands m times in W, once in each row q, so that the gradient of w is a sum of m values and of nothing else.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_GROUP = 8  # pixels
NARROW = 32  # channels: wider convolutions have kernels of their own
FRAME_CHANNELS = 3
MEMORY_CHANNELS = 4  # of frames in memory, the last one zero: 4 16-bit values are one aligned access


@dataclass(frozen=True)
class PixelGroups:
    """A convolution along a row and its grouped form; letters as at the top of this file."""

    taps: int  # K
    stride: int  # s
    padding: int  # p
    inputs: int  # n, pixels that are one input pixel of the grouped form
    outputs: int  # m, the same of the output
    grouped_taps: int  # K', range of t
    grouped_stride: int  # S
    grouped_padding: int  # P

    def shift(self, q: int) -> int:
        """Place of tap 0 of w in row q of W, counted over (t, b)."""
        return self.grouped_padding * self.inputs - self.padding + q * self.stride


def preferred_groups(
    in_channels: int, out_channels: int, kernel: tuple[int, ...], device_type: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Pixels in one group (n of the input, m of the output) of a convolution: (1, 1) where grouping does not pay.

    The rule on GPUs, from measurements on an H200 in bfloat16 (cuDNN 9.19; forward and both gradients):

    - frames (3 channels, 4 in memory): pairs of pixels, which are 8 channels; outputs up to 32 channels;
    - others with less than 32 channels on one side: the fewest pixels, at most 8, with 32 channels on the narrow side
      and more than 32 on the wide one. 8 -> 8 channels in groups of 8, 16 -> 16 and 8 -> 32 in groups of 4.

    Measured were 3 -> 8, 3 -> 64, 8 -> 8, 8 -> 32 and 16 -> 16; the rule goes on from these to their neighbours. Other
    dtypes on GPUs are unmeasured and stay plain.

    On CPUs (oneDNN, AVX-512) it pays for one convolution alone, Fast's stem with at most 4 output channels: a third
    less time in float32 and bfloat16. See experiments/LOG.md.
    """
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return widest_groups(in_channels, out_channels)
    fast_stem = in_channels == FRAME_CHANNELS and len(kernel) == 3 and kernel[0] > 1
    if device_type == "cpu" and dtype in (torch.bfloat16, torch.float32) and fast_stem and out_channels <= 4:
        return widest_groups(in_channels, out_channels)
    return 1, 1


def widest_groups(in_channels: int, out_channels: int) -> tuple[int, int]:
    """The GPU's rule of `preferred_groups`, by channels alone."""
    narrow, wide = sorted((in_channels, out_channels))
    if in_channels == FRAME_CHANNELS:
        outputs = 1
        while outputs < 4 and 2 * outputs * out_channels <= NARROW:
            outputs *= 2
        return 2, outputs
    group = 1
    while narrow < NARROW and group < MAX_GROUP and (narrow * group < NARROW or wide * group <= NARROW):
        group *= 2
    return group, group


def fit_groups(preferred: tuple[int, int], width: int, taps: int, stride: int, padding: int) -> PixelGroups | None:
    """The grouped form of a convolution along rows of `width` pixels, or None where there is none.

    Args:
        preferred: (n, m). Where a row is no multiple of them, half of each is tried.
        width: W of the input.
        taps, stride, padding: of the convolution, along the row.
    """
    for inputs, outputs in (preferred, (preferred[0] // 2, preferred[1] // 2)):
        if inputs > 1 and outputs >= 1:
            found = _fit(inputs, outputs, width, taps, stride, padding)
            if found is not None:
                return found
    return None


def _fit(inputs: int, outputs: int, width: int, taps: int, stride: int, padding: int) -> PixelGroups | None:
    out_width = (width + 2 * padding - taps) // stride + 1
    if width % inputs or (outputs * stride) % inputs or out_width < 1 or out_width % outputs:
        return None
    grouped_stride, left = outputs * stride // inputs, -(-padding // inputs)
    last_tap = taps - 1 - padding + (outputs - 1) * stride  # in pixels, from the first output's centre
    # As many taps as are needed, and so many more (of zeros) that the number of outputs is right.
    room = width // inputs + 2 * left - (out_width // outputs - 1) * grouped_stride
    grouped_taps = max(last_tap // inputs + left + 1, room - grouped_stride + 1)
    if grouped_taps > room:
        return None
    return PixelGroups(taps, stride, padding, inputs, outputs, grouped_taps, grouped_stride, left)


# Maps -----------------------------------------------------------------------------------------------------------------


def has_dense_rows(x: Tensor) -> bool:
    """Whether neighbouring pixels of a map (N, C, ..., W) are neighbours in memory."""
    channels = x.shape[1]
    return (channels == 1 or x.stride(1) == 1) and x.stride(-1) == channels


def group_pixels(x: Tensor, count: int) -> Tensor:
    """(N, C, ..., W) with dense rows -> (N, count*C, ..., W / count), a view in channels-last memory."""
    rows = x.movedim(1, -1)
    *outer, width, channels = rows.shape
    return rows.view(*outer, width // count, count * channels).movedim(-1, 1)


def ungroup_pixels(x: Tensor, count: int) -> Tensor:
    """Undo `group_pixels`."""
    rows = x.movedim(1, -1)
    *outer, width, channels = rows.shape
    return rows.view(*outer, width * count, channels // count).movedim(-1, 1)


def four_channels(frames: Tensor) -> Tensor | None:
    """The channels-last tensor of four channels that three-channel frames are a view of, or None if they are not.

    Args:
        frames: (N, 3, ..., H, W). Such a view has pixels four elements apart, and memory for the last fourth channel.
    Returns:
        (N, 4, ..., H, W), a view of the same memory, or None. While a program is compiled or exported the answer is
        None: nothing would check the size of the memory when it runs.
    """
    if torch.compiler.is_compiling() or not lies_in_four_channels(frames):
        return None
    last = frames.storage_offset() + sum((n - 1) * s for n, s in zip(frames.shape, frames.stride(), strict=True))
    if (last + 2) * frames.element_size() > frames.untyped_storage().nbytes():
        return None
    shape = (frames.shape[0], MEMORY_CHANNELS, *frames.shape[2:])
    return frames.as_strided(shape, frames.stride(), frames.storage_offset())


def lies_in_four_channels(frames: Tensor) -> bool:
    """Whether (N, 3, ..., H, W) has the strides of the first three channels of a dense channels-last tensor of four."""
    if frames.shape[1] != FRAME_CHANNELS or frames.stride(1) != 1:
        return False
    expected = MEMORY_CHANNELS
    for axis in (*range(frames.dim() - 1, 1, -1), 0):
        if frames.shape[axis] != 1 and frames.stride(axis) != expected:
            return False
        expected *= frames.shape[axis]
    return True


def with_four_channels(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames as the stems take them: four channels in memory, the fourth zero.

    Args:
        frames: (N, 3, ..., H, W) channels-last. A view of four channels is taken as it lies there.
        dtype: of the result.
    Returns:
        (N, 4, ..., H, W) channels-last: `frames`' own memory if nothing has to change, else one copy.
    """
    parent = None if frames.requires_grad else four_channels(frames)
    if parent is not None:
        return parent.to(dtype)
    rows = frames.movedim(1, -1)
    padded = rows.new_zeros((*rows.shape[:-1], MEMORY_CHANNELS), dtype=dtype)
    padded[..., :FRAME_CHANNELS] = rows
    return padded.movedim(-1, 1)


# Weights --------------------------------------------------------------------------------------------------------------


def expand_by_padding(weight: Tensor, groups: PixelGroups, channels: int) -> Tensor:
    """W of w as its definition says: w moved by q*s in each row q. For compilers, which fuse it, and for tests.

    Args:
        weight: (O, C, ..., K).
        groups: the grouped form.
        channels: of a pixel in memory, at least C; the weights of the others are zero.
    Returns:
        (m*O, n*channels, ..., K') channels-last.
    """
    rows = weight.movedim(1, -1)  # (O, ..., K, C)
    total = groups.grouped_taps * groups.inputs
    shifted = [
        F.pad(rows, (0, channels - weight.shape[1], groups.shift(q), total - groups.taps - groups.shift(q)))
        for q in range(groups.outputs)
    ]
    shape = (groups.outputs * weight.shape[0], *rows.shape[1:-2], groups.grouped_taps, groups.inputs * channels)
    return torch.stack(shifted).view(shape).movedim(-1, 1)


class TapIndices:
    """Where each value of W comes from, and where each value of w goes to: for weights of one shape, on one device.

    Both in memory order: w is (O, ..., K, C), W is (m, O, ..., K', n, channels).

    Args:
        shape: of the weight, (O, C, ..., K).
        groups: the grouped form.
        channels: of a pixel in memory.
        device: where the weights are.
    """

    def __init__(self, shape: torch.Size, groups: PixelGroups, channels: int, device: torch.device) -> None:
        rows = torch.arange(1, shape.numel() + 1).view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)  # 0 will be zero
        source = expand_by_padding(rows, groups, channels).movedim(1, -1)
        self.shape = source.shape  # (m*O, ..., K', n*channels)
        source = source.flatten()
        places = source.nonzero().squeeze(1)
        order = source[places].argsort(stable=True)
        self.source = (source - 1).remainder(shape.numel() + 1).to(device)  # zero is behind the last value
        self.places = places[order].view(shape.numel(), groups.outputs).t().contiguous().to(device)  # (m, numel of w)
        self._zeros: dict[torch.dtype, Tensor] = {}

    def zero(self, dtype: torch.dtype) -> Tensor:
        """The value (1,) that stands behind the last one of w."""
        if dtype not in self._zeros:
            self._zeros[dtype] = torch.zeros(1, dtype=dtype, device=self.source.device)
        return self._zeros[dtype]


def expand_weight(weight: Tensor, indices: TapIndices) -> Tensor:
    """W of w by one gather; its gradient by one gather and one sum in a fixed order, so without atomic additions.

    Args:
        weight: (O, C, ..., K), best in channels-last memory (any other is copied).
        indices: for this shape and device.
    Returns:
        (m*O, n*channels, ..., K') channels-last, in the dtype of `weight`.
    """
    rows = weight.movedim(1, -1)
    flat: Tensor = _Expand.apply(rows.reshape(-1), indices)
    return flat.view(indices.shape).movedim(-1, 1)


class _Expand(torch.autograd.Function):
    """w (numel,) in memory order -> W (numel,) in memory order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: TapIndices) -> Tensor:
        ctx.places = indices.places
        return torch.cat([weight, indices.zero(weight.dtype)]).index_select(0, indices.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # 16-bit values are summed in float32 and rounded once.
        return grad.index_select(0, ctx.places.view(-1)).view(ctx.places.shape).sum(0), None
