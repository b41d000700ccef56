"""Batch normalisation whose statistics are shared by the ranks of a process group (SyncBN), over the same operations.

Legend: N clips, C channels, G statistics groups, W ranks. Group g of every rank together forms one statistics group, so
all ranks must hold the same number of groups. Communication: one all-gather of 3C + 1 values forward (G and group 0),
a second of (G - 1, 3, C) where G > 1; one all-reduce of (G, 3, C) backward. On CUDA the numbers of groups are read back
to the host only when this rank's G changed; otherwise they are compared on the device.
"""

import copyreg
from typing import Any

import torch
from torch import Tensor

from kernels import definition
from kernels.backend import use_fused
from kernels.layout import KernelInputError, is_channels_last, memory_format
from kernels.nodes import once_differentiable

__all__ = ["any_of_ranks", "rows_of_ranks", "sync_norm"]


def _op(name: str, fused: bool) -> Any:
    return getattr(torch.ops.avsf if fused else definition, name)


def pool_ranks(gathered: Tensor) -> Tensor:
    """(W, G, 3, C) statistics of the ranks to (G, 3, C) of all of them."""
    count, mean, squares = gathered.unbind(2)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    return torch.stack([total, centre, squares.sum(0) + (count * (mean - centre).square()).sum(0)], 1)


_agreed: dict[str, int] = {}  # by name of process group: G that every rank was last seen to hold


def gather_ranks(local: Tensor, process_group: Any) -> Tensor:
    """Statistics of all ranks, after a check that they hold equally many groups.

    Args:
        local: (G, 3, C) float32 of this rank.
        process_group: of torch.distributed.

    Returns:
        (W, G, 3, C).

    Raises:
        KernelInputError: on every rank, where G differs. (On CUDA a rank whose own G did not change stops with a
            device-side assertion of the same words instead.)
    """
    groups = local.shape[0]
    # What every rank can send whatever its G, so that unequal ranks still meet in the same collective.
    own = torch.cat([local.new_tensor([groups]), local[0].flatten()])
    first = _gather(own, process_group)
    counts = first[:, 0]
    if not local.is_cuda or _agreed.get(process_group.group_name) != groups:
        found = [int(count) for count in counts.tolist()]
        if set(found) != {groups}:
            raise KernelInputError(
                f"statistics groups by rank {found} must be equal under SyncBN (groups = clips on the rank / "
                "clips_per_group, at least one); give every rank the same number of clips"
            )
        _agreed[process_group.group_name] = groups
    else:
        torch._assert_async((counts == groups).all(), "statistics groups must be equal on every rank under SyncBN")
    gathered = first[:, 1:].unflatten(1, (1, *local.shape[1:]))
    if groups == 1:
        return gathered
    return torch.cat([gathered, _gather(local[1:].contiguous(), process_group)], 1)


def _gather(own: Tensor, process_group: Any) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(parts, own, group=process_group)
    return torch.stack(parts)


def rows_of_ranks(x: Tensor, process_group: Any) -> Tensor:
    """The rows of all ranks of a group, rank 0's first; no gradient goes through.

    Args:
        x: (N, ...) of this rank, of one shape on every rank.
        process_group: of torch.distributed.

    Returns:
        (W N, ...).
    """
    own = x.to(torch.uint8) if x.dtype is torch.bool else x.detach()
    return _gather(own.contiguous(), process_group).flatten(0, 1).to(x.dtype)


def any_of_ranks(flags: Tensor, process_group: Any) -> Tensor:
    """Whether any of the flags (N,) bool is set on any rank of a group, () bool; None: on this rank."""
    return flags.any() if process_group is None else rows_of_ranks(flags, process_group).any()


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        groups: int,
        relu: bool,
        process_group: Any,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        """y like x, channels-last, and the statistics over all ranks (groups, 3, C) float32."""
        local = _op("bn_stats", fused)(x, groups)
        stats = pool_ranks(gather_ranks(local, process_group))
        coef = _op("bn_finalize", fused)(stats, weight, bias, eps)
        y, mask = _op("bn_act", fused)(x, coef, None, None, None, None, relu)
        ctx.save_for_backward(x, mask, coef, weight)
        ctx.mark_non_differentiable(stats)
        ctx.groups, ctx.relu, ctx.process_group, ctx.fused = groups, relu, process_group, fused
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Gradients of x, over the sums of all ranks, and of this rank's share of weight and bias."""
        x, mask, coef = saved[:3]
        grad = grad if is_channels_last(grad) else grad.contiguous(memory_format=memory_format(grad))
        sums = _op("bn_act_bwd_reduce", ctx.fused)(grad, x, None, mask, coef, None, ctx.groups, ctx.relu)
        own = sums.sum(0)  # the ranks' parameter gradients are averaged by DDP like all others
        torch.distributed.all_reduce(sums, group=ctx.process_group)
        dx, _ = _op("bn_act_bwd_apply", ctx.fused)(grad, x, None, mask, coef, None, sums, ctx.relu, False)
        return dx, own[1], own[0], None, None, None, None, None


def sync_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: int,
    relu: bool,
    process_group: Any,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise with the statistics of all ranks.

    Args:
        x: (N, C, T, H, W) or (N, C, H, W), channels-last, one slice of the batch on each rank.
        weight, bias: (C,) float32.
        eps: added to the variance.
        groups: G of this rank, equal on every rank.
        relu: end with max(., 0).
        process_group: of torch.distributed, the ranks that share statistics.
        backend: of the module, see `backend.use_fused`.

    Returns:
        y like x; stats (G, 3, C) of all ranks: count, mean, sum of squared deviations.

    Raises:
        KernelInputError: the ranks hold different numbers of groups.
    """
    y, stats = _SyncNorm.apply(x, weight, bias, eps, groups, relu, process_group, use_fused(x, backend))
    return y, stats


def _same_group(group: Any) -> str:
    return str(group)  # a string tells `copy` that there is nothing to copy


# A copied model talks to the same ranks; without this `copy.deepcopy` of a model with a process group is a TypeError.
if torch.distributed.is_available():
    copyreg.pickle(torch.distributed.ProcessGroup, _same_group)
