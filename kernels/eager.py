"""The eager path: whole normalisations and fusions in plain torch, which run where the library does not, and float64.

It uses PyTorch's own batch normalisation. What each single operation of the library computes is written in
`definition.py`, the oracle of the tests.

Legend: N clips, C channels, T frames, H W pixels, G statistics groups (group g = clips [gN/G, (g+1)N/G)).
All inputs are channels-last (see `layout.py`); five dimensions are handed to PyTorch as the 4-D view (N, C, T*H, W),
because its channels-last kernels are chosen for four dimensions only.
"""

import torch
from torch import Tensor

from kernels.layout import memory_format, merge_axes, rows_view, split_axis

__all__ = ["batch_norm", "end_block", "fuse_lateral", "max_pool", "normalize"]


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Batch normalisation with the statistics of each group of clips (training form).

    Args:
        x: (N, C, T, H, W) or (N, C, H, W), channels-last, floating.
        weight, bias: (C,) float32 (float64 for float64 x) or None.
        eps: added to the variance.
        groups: G, divides N.
        relu: rectify y.

    Returns:
        y like x, and stats (G, 3, C): count, mean, sum of squared deviations, in the parameters' precision.
    """
    channels, dtype = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    parts, stats = [], []
    for part in rows_view(x).chunk(groups) if groups > 1 else (rows_view(x),):
        mean, variance = torch.zeros(2, channels, dtype=dtype, device=x.device).unbind()
        parts.append(torch.batch_norm(part, weight, bias, mean, variance, True, 1.0, eps, False))
        count = part.numel() // channels
        squares = variance * (count - 1) if count > 1 else torch.zeros_like(variance)
        stats.append(torch.stack([torch.full_like(mean, count), mean, squares]).detach())
    y = torch.cat(parts) if groups > 1 else parts[0]
    return _as(_rectified(y, relu), x), torch.stack(stats)


def normalize(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool = False
) -> Tensor:
    """Batch normalisation with given statistics (evaluation and frozen form).

    Args:
        x: (N, C, T, H, W) or (N, C, H, W), channels-last.
        mean, variance, weight, bias: (C,) float32.
        eps: added to the variance.
        relu: rectify y.

    Returns:
        y like x.
    """
    y = torch.batch_norm(rows_view(x), weight, bias, mean, variance, False, 0.0, eps, False)
    return _as(_rectified(y, relu), x)


def _as(rows: Tensor, x: Tensor) -> Tensor:
    """The 4-D view as a map of x's dimensions."""
    return rows if rows.dim() == x.dim() else split_axis(rows, 1, x.shape[2:4])


def _rectified(y: Tensor, relu: bool) -> Tensor:
    """max(y, 0) in place, NaN stays NaN. Never on a view: its gradient would be re-laid out in row-major order."""
    return torch.relu_(y) if relu else y


def end_block(y: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """End of a block: y + residual, then ReLU if asked for.

    Args:
        y: a normalised tensor, any shape.
        residual: like y.
        relu: apply max(., 0), NaN stays NaN.

    Returns:
        the sum, rectified or not.
    """
    return _rectified(y + residual, relu)


def max_pool(x: Tensor) -> Tensor:
    """Max pooling 1x3x3, stride 1,2,2, padding 0,1,1, frame by frame (pool1 of Table 1).

    Args:
        x: (N, C, T, H, W) or (N, C, H, W), channels-last: its frames are channels_last images, a view.

    Returns:
        (N, C, T, ceil(H/2), ceil(W/2)) or without T, channels-last; NaN wins; the gradient goes to the first maximum.
    """
    if x.dim() == 4:
        return torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    pooled = torch.nn.functional.max_pool2d(merge_axes(x, 0), 3, stride=2, padding=1)
    return split_axis(pooled, 0, (x.shape[0], x.shape[2]))


def fuse_lateral(slow: Tensor, lateral: Tensor, audio: Tensor | None, keep: Tensor | None) -> Tensor:
    """Concatenate the finished Slow map and the finished lateral, and add the audio to both (paper section 3.2).

    Args:
        slow: (N, Cs, T, H, W) channels_last_3d.
        lateral: (N, Cl, T, H, W) channels_last_3d, after BN and ReLU.
        audio: (N, Cs + Cl, T) or None: nothing is added.
        keep: (N,) bool or None; False selects zero audio, also where the audio is inf or nan.

    Returns:
        (N, Cs + Cl, T, H, W) channels_last_3d, dtype of slow; no ReLU after the addition.
    """
    out = torch.cat([slow, lateral.to(slow.dtype)], 1)
    if audio is None:
        return out.contiguous(memory_format=memory_format(slow))
    if keep is not None:
        audio = torch.where(keep[:, None, None], audio, 0)
    out = out + audio.to(slow.dtype)[:, :, :, None, None]
    return out.contiguous(memory_format=memory_format(slow))
