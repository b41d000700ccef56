"""The first convolutions, stride 1,2,2: 3 -> 8 channels, 5x7x7 (Fast), and 3 -> 64 channels, 1x7x7 (Slow).

Frames have four channels in memory, the fourth zero.
Legend: N clips, T frames, H W pixels; H' = ceil(H / 2), W' = ceil(W / 2). cuDNN needs a hundred times the time that
Fast's bytes take; the library's kernels (kernels/csrc/cuda_stem.cu, cuda_stem_slow.cu) take 16-bit frames on CUDA.
Elsewhere torch convolves.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import KernelInputError, is_channels_last
from kernels.library import fused_devices
from kernels.nodes import gradient_rows, once_differentiable
from kernels.ops import channels_last_empty

__all__ = ["STEM_WEIGHTS", "STRIDE", "covers", "padding", "serves", "stem_conv"]
STEM_WEIGHTS: Final = ((8, 3, 5, 7, 7), (64, 3, 1, 7, 7))  # Fast's, Slow's
STRIDE: Final = (1, 2, 2)
_MEMORY_CHANNELS = 4
_HALF = (torch.bfloat16, torch.float16)


def padding(weight: Tensor) -> tuple[int, int, int]:
    """Half the kernel along T, H, W: sizes stay, or are halved by the stride and rounded up."""
    return weight.shape[2] // 2, weight.shape[3] // 2, weight.shape[4] // 2


def serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the library has kernels for frames of this dtype on this kind of device."""
    return device_type == "cuda" and "cuda" in fused_devices() and dtype in _HALF


def covers(frames: Tensor, weight: Tensor) -> bool:
    """Whether the library's own kernels take this convolution.

    Args:
        frames: (N, 4, T, H, W) channels_last_3d; any other channels give False.
        weight: one of `STEM_WEIGHTS`; any other shape gives False.

    Returns:
        True for bfloat16 or float16 frames of four dense channels on a CUDA device that the library serves, which need
        no gradient themselves, with a weight in float32, bfloat16 or float16 beside them.
    """
    return (
        serves(frames.device.type, frames.dtype)
        and tuple(weight.shape) in STEM_WEIGHTS
        and weight.dtype in (torch.float32, *_HALF)
        and weight.device == frames.device
        and _is_dense(frames)
        and not frames.requires_grad
    )


def stem_conv(frames: Tensor, weight: Tensor) -> Tensor:
    """Convolve frames, stride (1, 2, 2), padded by half the kernel, sums in float32; differentiable once, by weight.

    Where `covers` says so it is one kernel forward (and a tiny one that packs the weight) and one backward (and a tiny
    one that adds its partial sums in a fixed order): no host synchronisation, the same bits in every run on one kind of
    device. Its window is one pixel wider to the left than the convolution's, with a zero weight, as is the fourth
    channel: an infinity or NaN there reaches one output more than it would.

    Args:
        frames: (N, 4, T, H, W) channels_last_3d, dense, the fourth channel zero.
        weight: (O, 3, K, 7, 7) of `STEM_WEIGHTS`, rounded to the frames' dtype for the products.

    Returns:
        (N, O, T, H', W') channels_last_3d in the frames' dtype.

    Raises:
        KernelInputError: frames without four channels, or a weight of another shape.
    """
    if frames.dim() != 5 or frames.shape[1] != _MEMORY_CHANNELS:
        raise KernelInputError(f"frames {tuple(frames.shape)} must be (N, 4, T, H, W): three channels and a zero one")
    if tuple(weight.shape) not in STEM_WEIGHTS:
        raise KernelInputError(f"weight {tuple(weight.shape)} must be one of {STEM_WEIGHTS}")
    if covers(frames, weight):
        out: Tensor = torch.ops.avsf.stem_conv(frames, weight)
        return out
    return _plain(frames, weight)


def _plain(frames: Tensor, weight: Tensor) -> Tensor:
    out = F.conv3d(frames[:, : weight.shape[1]], weight.to(frames.dtype), None, STRIDE, padding(weight))
    return out.contiguous(memory_format=torch.channels_last_3d)


def _is_dense(frames: Tensor) -> bool:
    """Whether frames are (N, 4, T, H, W) with the pixels of a clip one after the other and clips at whole pixels."""
    if frames.dim() != 5 or frames.shape[1] != _MEMORY_CHANNELS or not is_channels_last(frames):
        return False
    pixels = next((frames.stride(axis) for axis in (4, 3, 2) if frames.shape[axis] != 1), _MEMORY_CHANNELS)
    clips = frames.shape[0] == 1 or frames.stride(0) % _MEMORY_CHANNELS == 0
    return pixels == _MEMORY_CHANNELS and clips and frames.storage_offset() % _MEMORY_CHANNELS == 0


def _out_shape(frames: Tensor, weight: Tensor) -> tuple[int, ...]:
    n, _, t, h, w = frames.shape
    return n, weight.shape[0], t, (h + 1) // 2, (w + 1) // 2


def _cpu_conv(frames: Tensor, weight: Tensor) -> Tensor:
    """The definition, for the CPU: products of values rounded to the frames' dtype, sums in float32."""
    out = channels_last_empty(_out_shape(frames, weight), frames)
    wide = weight.to(frames.dtype).float()
    with torch.autocast("cpu", enabled=False):
        return out.copy_(F.conv3d(frames[:, : weight.shape[1]].float(), wide, None, STRIDE, padding(weight)))


def _cpu_weight_grad(dy: Tensor, frames: Tensor, weight: Tensor) -> Tensor:
    rows, shape = frames[:, : weight.shape[1]].float(), list(weight.shape)
    with torch.autocast("cpu", enabled=False):
        grad = torch.nn.grad.conv3d_weight(rows, shape, dy.float(), STRIDE, padding(weight))
    return torch.empty_like(weight).copy_(grad)


def _fake_conv(frames: Tensor, weight: Tensor) -> Tensor:
    return channels_last_empty(_out_shape(frames, weight), frames)


def _fake_weight_grad(dy: Tensor, frames: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    frames, weight = saved
    if ctx.needs_input_grad[0]:
        raise KernelInputError("stem_conv has no gradient for its frames; use F.conv3d where they need one")
    if not ctx.needs_input_grad[1]:
        return None, None
    grad = gradient_rows(grad)
    if any(stride % 8 for stride in (grad.stride(0), grad.stride(3), grad.stride(4), grad.storage_offset())):
        grad = channels_last_empty(tuple(grad.shape), grad).copy_(grad)  # a slice of channels: pixels of 16 bytes again
    return None, torch.ops.avsf.stem_conv_weight_grad(grad, frames, weight)


def _register() -> torch.library.Library:
    library = torch.library.Library("avsf", "IMPL")
    library.impl("stem_conv", _cpu_conv, "CPU")
    library.impl("stem_conv_weight_grad", _cpu_weight_grad, "CPU")
    torch.library.register_fake("avsf::stem_conv", _fake_conv)
    torch.library.register_fake("avsf::stem_conv_weight_grad", _fake_weight_grad)
    torch.library.register_autograd("avsf::stem_conv", _backward, setup_context=_save)
    return library


_LIBRARY = _register() if fused_devices() else None
