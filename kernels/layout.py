"""Layout and shape rules of the fused operations. Legend: N clips, C channels, T frames, H W pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "KernelInputError",
    "check_channels_last",
    "check_precision",
    "group_count",
    "is_channels_last",
    "same_place",
]


class KernelInputError(ValueError):
    """An input that the fused operations cannot take: the message gives value, rule and remedy."""


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost and the positions of one clip are evenly spaced rows.

    Args:
        x: (N, C, T, H, W) or (N, C, H, W); a slice of channels or of clips qualifies, a slice of rows (H) does not.

    Returns:
        True when stride(1) == 1 and every position of a clip is `row` elements after the one before it.
    """
    if x.dim() not in (4, 5):
        return False
    if x.numel() == 0 or (x.shape[1] != 1 and x.stride(1) != 1):
        return False
    row, expected = 0, 0
    for axis in range(x.dim() - 1, 1, -1):
        if x.shape[axis] == 1:
            continue
        if row == 0:
            row = expected = x.stride(axis)
            if row < x.shape[1]:
                return False
        if x.stride(axis) != expected:
            return False
        expected *= x.shape[axis]
    return x.shape[0] == 1 or x.stride(0) >= max(expected, x.shape[1])


def check_channels_last(x: Tensor, name: str) -> None:
    """Raise unless x is a non-empty channels-last tensor of four or five dimensions.

    Raises:
        KernelInputError: with the strides found and the call that cures it.
    """
    if x.dim() not in (4, 5):
        raise KernelInputError(f"{name} of shape {tuple(x.shape)} must be (N, C, T, H, W) or (N, C, H, W)")
    if not is_channels_last(x):
        form = "channels_last_3d" if x.dim() == 5 else "channels_last"
        raise KernelInputError(
            f"{name} of shape {tuple(x.shape)} with strides {tuple(x.stride())} must be non-empty and {form} "
            f"(stride(1) == 1, dense positions); "
            f"call .to(memory_format=torch.{form}) where it is made: nothing is re-laid out here"
        )


def same_place(x: Tensor, other: Tensor, name: str) -> None:
    """Raise unless `other` has the device of x.

    Raises:
        KernelInputError: naming both devices.
    """
    if x.device != other.device:
        raise KernelInputError(
            f"{name} is on {other.device} but the input is on {x.device}; move it with .to({str(x.device)!r})"
        )


def check_precision(x: Tensor, parameter: Tensor, name: str) -> None:
    """Raise unless x has a dtype that normalisation takes and its parameters are as precise as it needs.

    Raises:
        KernelInputError: x is not floating, or the parameter is neither float32 nor, with a float64 x, float64.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise KernelInputError(f"{name} is {x.dtype} but must be float16, bfloat16, float32 or float64")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if parameter.dtype != wanted:
        cure = ".double()" if wanted == torch.float64 else ".float(); for 16 bits convert the inputs or use autocast"
        raise KernelInputError(
            f"BatchNorm parameters are {parameter.dtype} but must be {wanted} for {name} in {x.dtype}; "
            f"convert the norm with {cure}"
        )


def group_count(clips: int, clips_per_group: int) -> int:
    """Number of statistics groups of a batch (paper section 4.1: BN statistics over 8 clips).

    Args:
        clips: N, at least 1.
        clips_per_group: clips that share statistics.

    Returns:
        1 if clips <= clips_per_group, else clips / clips_per_group.

    Raises:
        KernelInputError: clips is larger than one group and no multiple of it.
    """
    if clips <= clips_per_group:
        return 1
    if clips % clips_per_group:
        raise KernelInputError(
            f"batch of {clips} clips must be at most clips_per_group ({clips_per_group}) or a multiple of it; "
            f"use {clips - clips % clips_per_group} or {clips + clips_per_group - clips % clips_per_group} clips"
        )
    return clips // clips_per_group


def merge_axes(x: Tensor, axis: int) -> Tensor:
    """View of a channels-last map with two neighbouring axes as one.

    Channels stand last meanwhile: merging around them gives a single clip strides that PyTorch takes for row-major.

    Args:
        x: (N, C, T, H, W).
        axis: the first of the two, not counting C: 0 for N and T, 1 for T and H, 2 for H and W.
    """
    return x.movedim(1, -1).flatten(axis, axis + 1).movedim(-1, 1)


def split_axis(x: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """Undo `merge_axes`: (N, C, A, B) to five dimensions, the axis (not counting C) of these two sizes."""
    return x.movedim(1, -1).unflatten(axis, tuple(sizes)).movedim(-1, 1)


def rows_view(x: Tensor) -> Tensor:
    """(N, C, T, H, W) as the 4-D view (N, C, T*H, W), which PyTorch's channels-last kernels accept; 4-D as it is."""
    return merge_axes(x, 1) if x.dim() == 5 else x


def memory_format(x: Tensor) -> torch.memory_format:
    """The channels-last format of x's number of dimensions."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last
