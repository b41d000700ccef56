"""Batch normalisation whose statistics are shared by the ranks of a process group (SyncBN), over the same operations.

Legend: N clips, C channels, G statistics groups, W ranks. Group g of every rank together forms one statistics group, so
all ranks must hold the same number of groups. Communication: one all-gather of (G, 3, C) forward, one all-reduce of
(G, 3, C) backward; nothing is read back to the host.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import reference_ops
from kernels.backend import use_fused
from kernels.layout import is_channels_last, memory_format

__all__ = ["sync_norm"]


def _op(name: str, x: Tensor) -> Any:
    return getattr(torch.ops.avsf if use_fused(x) else reference_ops, name)


def pool_ranks(gathered: Tensor) -> Tensor:
    """(W, G, 3, C) statistics of the ranks to (G, 3, C) of all of them."""
    count, mean, squares = gathered.unbind(2)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    return torch.stack([total, centre, squares.sum(0) + (count * (mean - centre).square()).sum(0)], 1)


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int, relu: bool, process_group: Any
    ) -> tuple[Tensor, Tensor]:
        local = _op("bn_stats", x)(x, groups)
        world_size = torch.distributed.get_world_size(process_group)
        gathered = [torch.empty_like(local) for _ in range(world_size)]
        torch.distributed.all_gather(gathered, local, group=process_group)
        stats = pool_ranks(torch.stack(gathered))
        coef = _op("bn_finalize", x)(stats, weight, bias, eps)
        y, mask = _op("bn_act", x)(x, coef, None, None, None, None, relu)
        ctx.save_for_backward(x, mask, coef)
        ctx.mark_non_differentiable(stats)
        ctx.groups, ctx.relu, ctx.process_group = groups, relu, process_group
        return y, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, mask, coef = ctx.saved_tensors
        grad = grad if is_channels_last(grad) else grad.contiguous(memory_format=memory_format(grad))
        sums = _op("bn_act_bwd_reduce", x)(grad, x, None, mask, coef, None, ctx.groups, ctx.relu)
        own = sums.sum(0)  # the ranks' parameter gradients are averaged by DDP like all others
        torch.distributed.all_reduce(sums, group=ctx.process_group)
        dx, _ = _op("bn_act_bwd_apply", x)(grad, x, None, mask, coef, None, sums, ctx.relu, False)
        return dx, own[1], own[0], None, None, None, None


def sync_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int, relu: bool, process_group: Any
) -> tuple[Tensor, Tensor]:
    """Normalise with the statistics of all ranks.

    Args:
        x: (N, C, T, H, W) or (N, C, H, W), channels-last, one slice of the batch on each rank.
        weight, bias: (C,) float32.
        eps: added to the variance.
        groups: G of this rank, equal on every rank.
        relu: end with max(., 0).
        process_group: of torch.distributed, the ranks that share statistics.

    Returns:
        y like x; stats (G, 3, C) of all ranks: count, mean, sum of squared deviations.
    """
    y, stats = _SyncNorm.apply(x, weight, bias, eps, groups, relu, process_group)
    return y, stats
