"""Exact running statistics of every batch normalisation from a number of batches (paper section 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm

__all__ = ["precise_bn"]


def precise_bn(
    model: nn.Module,
    batches: Iterable[tuple[Tensor | None, ...]],
    forward: Callable[..., Any],
) -> int:
    """Replace the running statistics by the pooled mean and unbiased variance over all clips of the batches.

    Activations are those of training (normalised by group); statistics are pooled in float64 over groups, batches and,
    under torch.distributed, ranks. A norm that is frozen, or that no batch reached, keeps its statistics.

    Args:
        model: holds `GhostBatchNorm` modules; its training flags are restored.
        batches: arguments of `forward`, such as (frames, log_mel); dropout and all but norms runs in evaluation mode.
        forward: called as forward(*batch); its result is ignored.

    Returns:
        number of batches used on this rank.
    """
    norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm) and not m.frozen]
    modes = {module: module.training for module in model.modules()}
    sums = [torch.zeros(3, m.num_features, dtype=torch.float64, device=m.weight.device) for m in norms]
    used = 0
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        with torch.no_grad():
            for batch in batches:
                for norm in norms:
                    norm.collected = []
                forward(*batch)
                for index, norm in enumerate(norms):
                    for stats in norm.collected or ():
                        own = _own_share(stats.double(), norm)
                        sums[index] = pool_statistics(torch.cat([sums[index][None], own]))
                used += 1
    finally:
        for norm in norms:
            norm.collected = None
        for module, mode in modes.items():
            module.training = mode
    for norm, total in zip(norms, _over_ranks(sums), strict=True):
        if total[0, 0] > 0:
            norm.running_mean.copy_(total[1])
            norm.running_var.copy_(total[2] / (total[0] - 1).clamp(min=1))
    return used


def pool_statistics(stats: Tensor) -> Tensor:
    """Statistics of the union of disjoint sets.

    Args:
        stats: (S, 3, C) count, mean, sum of squared deviations of each set; a count may be 0.

    Returns:
        (3, C) of the union.
    """
    count, mean, squares = stats.unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total.clamp(min=1)
    return torch.stack([total, centre, squares.sum(0) + (count * (mean - centre).square()).sum(0)])


def _own_share(stats: Tensor, norm: GhostBatchNorm) -> Tensor:
    """Of statistics that several ranks have made together, and all of them count: this rank's part."""
    if norm.process_group is None:
        return stats
    ranks = torch.distributed.get_world_size(norm.process_group)
    count, mean, squares = stats.unbind(1)
    return torch.stack([count / ranks, mean, squares / ranks], 1)


def _over_ranks(sums: list[Tensor]) -> list[Tensor]:
    if not sums or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    world_size = torch.distributed.get_world_size()
    flat = torch.cat(sums, 1).contiguous()
    gathered = [torch.empty_like(flat) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, flat)
    pooled = pool_statistics(torch.stack(gathered))
    return list(pooled.split([s.shape[1] for s in sums], 1))
