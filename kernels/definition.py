"""The definition of every operation of namespace avsf, one by one, in plain torch: the oracle of the tests.

Legend: N clips, C channels, T frames, H W pixels, P = T*H*W, G groups (group g = clips [gN/G, (g+1)N/G)).
Arithmetic runs in float64 for float64 data, else in float32; results have the dtype and layout of x. `coef` is
(5, G, C): scale, shift, mean, invstd, 1 / count, the last 0 where running statistics are used (no gradient
through them).
"""

import torch
from torch import Tensor

from kernels.layout import KernelInputError, memory_format

__all__ = [
    "bn_act",
    "bn_act_bwd_apply",
    "bn_act_bwd_reduce",
    "bn_finalize",
    "bn_relu_maxpool",
    "bn_relu_maxpool_bwd_apply",
    "bn_stats",
    "frame_sum",
    "given_coefficients",
    "lateral_cat",
    "norm_act_backward",
    "running_stats_update_",
]


def _wide(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) as (G, N/G * P, C) in the precision of the arithmetic."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    return x.movedim(1, -1).reshape(groups, -1, x.shape[1])


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(G, rows, C) back to the shape, dtype and layout of x."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    return values.reshape(shape).movedim(-1, 1).to(x.dtype).contiguous(memory_format=memory_format(x))


def bn_stats(x: Tensor, groups: int) -> Tensor:
    """(G, 3, C): count, mean and sum of squared deviations of each group."""
    rows = _wide(x, groups)
    mean = rows.mean(1)
    return torch.stack([torch.full_like(mean, rows.shape[1]), mean, (rows - mean[:, None]).square().sum(1)], 1)


def bn_finalize(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(5, G, C) coefficients from (G, 3, C) statistics."""
    count, mean, squares = stats.unbind(1)
    return _coefficients(mean, squares / count, weight, bias, eps, 1 / count)


def given_coefficients(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(5, 1, C) coefficients from running statistics (C,)."""
    return _coefficients(mean[None], variance[None], weight, bias, eps, torch.zeros_like(mean)[None])


def _coefficients(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inverse_count: Tensor
) -> Tensor:
    invstd = (variance + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.stack([scale, shift, mean, invstd, inverse_count])


def bn_act(
    x: Tensor,
    coef: Tensor,
    residual: Tensor | None,
    residual_coef: Tensor | None,
    audio: Tensor | None,
    keep: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """act(x*scale + shift [+ residual | + residual*scale' + shift']) [+ audio]; and where the rectifier passes.

    Args:
        x: (N, C, T, H, W) or (N, C, H, W).
        coef, residual_coef: (5, G, C).
        residual: like x.
        audio: (N, C, T), added after the rectifier; keep: (N,) bool, False selects zero audio.
        relu: act is max(., 0), NaN stays NaN; else the identity.

    Returns:
        y like x; mask (N*P, ceil(C/8)) uint8, bit c % 8 of byte c // 8, empty unless relu and residual are given.
    """
    groups = max(coef.shape[1], 1 if residual_coef is None else residual_coef.shape[1])
    z = _wide(x, groups) * coef[0, :, None] + coef[1, :, None]
    if residual is not None:
        other = _wide(residual, groups)
        z = z + (other if residual_coef is None else other * residual_coef[0, :, None] + residual_coef[1, :, None])
    keeps = ~(z <= 0)
    if relu:
        z = torch.where(keeps, z, 0)
    if audio is not None:
        sound = audio.to(z.dtype) if keep is None else torch.where(keep[:, None, None], audio.to(z.dtype), 0)
        frames = sound.movedim(1, -1)[:, :, None].expand(-1, -1, x[0, 0, 0].numel(), -1)
        z = z + frames.reshape(z.shape)
    return _like(z, x), pack_mask(keeps.flatten(0, 1)) if relu and residual is not None else x.new_empty(
        (0, -(-x.shape[1] // 8)), dtype=torch.uint8
    )


def pack_mask(keeps: Tensor) -> Tensor:
    """(rows, C) bool to (rows, ceil(C/8)) uint8, lowest bit first."""
    padded = torch.nn.functional.pad(keeps.to(torch.uint8), (0, -keeps.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, device=keeps.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """Inverse of `pack_mask`: (rows, ceil(C/8)) uint8 to (rows, C) bool."""
    bits = mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (bits & 1).flatten(1)[:, :channels].bool()


def lateral_cat(
    slow: Tensor,
    slow_coef: Tensor | None,
    residual: Tensor | None,
    residual_coef: Tensor | None,
    lateral: Tensor,
    lateral_coef: Tensor,
    audio: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """concat(slow or its block end, relu(lateral normalised)) [+ audio]; and the masks of both parts."""
    channels = slow.shape[1]
    parts = (None, None) if audio is None else (audio[:, :channels], audio[:, channels:])
    unit = torch.ones_like(lateral_coef[:, :1, :1]).expand(-1, -1, channels)
    identity = unit * torch.tensor([1.0, 0, 0, 0, 0], device=slow.device)[:, None, None]
    head, mask = bn_act(
        slow,
        identity if slow_coef is None else slow_coef,
        residual,
        residual_coef,
        parts[0],
        keep,
        slow_coef is not None,
    )
    tail, tail_mask = bn_act(lateral, lateral_coef, None, None, parts[1], keep, True)
    return torch.cat([head, tail], 1).contiguous(memory_format=memory_format(slow)), mask, tail_mask


CLOSED = 9  # tap of a window whose maximum the rectifier blocks


def _images(values: Tensor, x: Tensor) -> Tensor:
    """(G, rows, C) of x's shape as images (N*T, C, H, W)."""
    return values.reshape(-1, *x.shape[-2:], x.shape[1]).movedim(-1, 1)


def bn_relu_maxpool(x: Tensor, coef: Tensor, record: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Max pooling 1x3x3, stride 1,2,2, padding 0,1,1 of relu(x*scale + shift), with what the gradient needs.

    The maximum is taken before anything is rounded to 16 bits; the first one in scan order counts, a NaN beats it.

    Args:
        x: (N, C, T, H, W) or (N, C, H, W).
        coef: (5, G, C).
        record: also value and tap, else they are empty.

    Returns:
        y (N, C, T, ceil(H/2), ceil(W/2)) like x; value like y: x at the maximum; tap (rows of y, C) uint8: its place
        in the window, 3*row + column, or 9 where the rectifier blocks it.
    """
    z = _images(_wide(x, coef.shape[1]) * coef[0, :, None] + coef[1, :, None], x)
    best, index = torch.nn.functional.max_pool2d(z, 3, stride=2, padding=1, return_indices=True)
    shape = (*x.shape[:2], *x.shape[2:-2], *best.shape[-2:])

    def pooled(images: Tensor) -> Tensor:
        rows = images.movedim(1, -1).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return rows.to(x.dtype).contiguous(memory_format=memory_format(x))

    y = pooled(torch.where(best <= 0, 0, best))
    if not record:
        return y, x.new_empty(0), x.new_empty((0, x.shape[1]), dtype=torch.uint8)
    values = _images(_wide(x, 1), x).flatten(2).gather(2, index.flatten(2)).reshape(best.shape)
    row, column = (torch.arange(size, device=x.device) * 2 - 1 for size in best.shape[-2:])
    tap = 3 * (index // x.shape[-1] - row[:, None]) + index % x.shape[-1] - column
    tap = torch.where(best <= 0, CLOSED, tap).to(torch.uint8)
    return y, pooled(values), tap.movedim(1, -1).reshape(-1, x.shape[1])


def bn_relu_maxpool_bwd_apply(dy: Tensor, x: Tensor, tap: Tensor, coef: Tensor, sums: Tensor) -> Tensor:
    """dx = scale * (dz - S0/M - xhat*S1/M), dz = the pooled gradients at their taps.

    The sums are those of `bn_act_bwd_reduce(dy, value, None, no mask, coef, None, groups, True)`: only maxima count.
    """
    groups = sums.shape[0]
    wide = _images(_wide(dy, 1), dy)
    taps = _images(tap[None], dy).long()
    height, width = x.shape[-2:]
    row, column = (torch.arange(size, device=x.device) * 2 - 1 for size in wide.shape[-2:])
    place = ((row[:, None] + taps // 3) * width + column + taps % 3).clamp(0, height * width - 1)
    spread = wide.new_zeros(*wide.shape[:2], height * width)
    spread.scatter_add_(2, place.flatten(2), torch.where(taps == CLOSED, 0, wide).flatten(2))
    dz = spread.movedim(1, -1).reshape(groups, -1, x.shape[1])
    hat = (_wide(x, groups) - coef[2, :, None]) * coef[3, :, None]
    mean, slope = sums[:, :2].unbind(1)
    return _like(coef[0, :, None] * (dz - (mean * coef[4])[:, None] - hat * (slope * coef[4])[:, None]), x)


def _check_mask(mask: Tensor, relu: bool, residual: bool) -> None:
    if relu and residual and not mask.numel():
        raise KernelInputError("a rectified residual and its gradient need the forward's mask, which is empty; pass it")


def _gated(dy: Tensor, x: Tensor, mask: Tensor, coef: Tensor, groups: int, relu: bool) -> Tensor:
    """(G, rows, C): dy where the rectifier passed."""
    dz = _wide(dy, groups)
    if not relu:
        return dz
    keeps = unpack_mask(mask, x.shape[1]).reshape(dz.shape) if mask.numel() else None
    if keeps is None:
        keeps = ~(_wide(x, groups) * coef[0, :, None] + coef[1, :, None] <= 0)
    return torch.where(keeps, dz, 0)


def bn_act_bwd_reduce(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    coef: Tensor,
    residual_coef: Tensor | None,
    groups: int,
    relu: bool,
) -> Tensor:
    """(G, 3, C): sum dz, sum dz*xhat, sum dz*rhat (0 unless projected); dz = dy where the rectifier passed."""
    _check_mask(mask, relu, residual is not None)
    dz = _gated(dy, x, mask, coef, groups, relu)
    sums = [dz.sum(1), (dz * (_wide(x, groups) - coef[2, :, None])).sum(1) * coef[3]]
    if residual is None or residual_coef is None:
        sums.append(torch.zeros_like(sums[0]))
    else:
        sums.append((dz * (_wide(residual, groups) - residual_coef[2, :, None])).sum(1) * residual_coef[3])
    return torch.stack(sums, 1)


def bn_act_bwd_apply(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    coef: Tensor,
    residual_coef: Tensor | None,
    sums: Tensor,
    relu: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor]:
    """dx = scale * (dz - S0/M - xhat*S1/M) and the residual's gradient: dz, or the same with its coefficients."""
    _check_mask(mask, relu, want_residual or residual is not None)
    groups = sums.shape[0]
    dz = _gated(dy, x, mask, coef, groups, relu)

    def through(values: Tensor, c: Tensor, total: Tensor) -> Tensor:
        hat = (_wide(values, groups) - c[2, :, None]) * c[3, :, None]
        mean, slope = sums[:, 0] * c[4], total * c[4]
        return _like(c[0, :, None] * (dz - mean[:, None] - hat * slope[:, None]), values)

    dx = through(x, coef, sums[:, 1])
    if not want_residual:
        return dx, x.new_empty(0)
    if residual is None or residual_coef is None:
        return dx, _like(dz, x)
    return dx, through(residual, residual_coef, sums[:, 2])


def norm_act_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    coef: Tensor,
    residual_coef: Tensor | None,
    groups: int,
    relu: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the residual's gradient and the parameters' gradients (4, C): bias, weight, residual's weight, its bias.

    The arguments are those of the two operations it is made of, but for dy2: the gradient from a second reader of the
    output. Both are added and rounded to the dtype of x once, before anything else.
    """
    grad = dy if dy2 is None else (dy.to(coef.dtype) + dy2.to(coef.dtype)).to(x.dtype)
    sums = bn_act_bwd_reduce(grad, x, residual, mask, coef, residual_coef, groups, relu)
    dx, dresidual = bn_act_bwd_apply(grad, x, residual, mask, coef, residual_coef, sums, relu, want_residual)
    bias, weight, residual_weight = sums.sum(0)
    return dx, dresidual, torch.stack([bias, weight, residual_weight, bias])


def frame_sum(dy: Tensor, keep: Tensor | None) -> Tensor:
    """(N, C, T): sum over H, W; zero in a clip that is not kept, also where its gradient is infinite."""
    total = (dy.double() if dy.dtype == torch.float64 else dy.float()).sum((3, 4))
    if keep is not None:
        total = torch.where(keep[:, None, None], total, 0)
    return total.to(dy.dtype)


def running_stats_update_(
    mean: list[Tensor], variance: list[Tensor], batches: list[Tensor], stats: list[Tensor], momentum: float
) -> None:
    """Fold each (G, 3, C) into running mean and unbiased total variance (C,), and count one batch."""
    for m, v, b, s in zip(mean, variance, batches, stats, strict=True):
        count, centre, squares = s.unbind(1)
        total = count.sum(0)
        middle = (count * centre).sum(0) / total
        spread = squares.sum(0) + (count * (centre - middle).square()).sum(0)
        m.lerp_(middle.to(m.dtype), momentum)
        v.lerp_((spread / (total - 1).clamp(min=1)).to(v.dtype), momentum)
        b.add_(1)
