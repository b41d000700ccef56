"""What the ranks share besides gradients: running statistics that are those of one process with all clips."""

from __future__ import annotations

import inspect
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.runtime import Runtime
from kernels.modules import GhostBatchNorm
from model.synchronization import pair_mask


def data_parallel(module: nn.Module, runtime: Runtime, *, find_unused_parameters: bool) -> DistributedDataParallel:
    """Wrap a module so that gradients are averaged over the ranks; buffers are left to `SharedStatistics`.

    Args:
        module: equal structure on all ranks, rank 0's values are taken.
        runtime: of this process.
        find_unused_parameters: whether steps differ in the parameters they use (DropPathway).
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters  # renamed in torch 2.14
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # Strides of dimensions of length 1 differ between a parameter and its gradient; they mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # The graphs differ from step to step; the first one may well use everything.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        module,
        device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        **{buffers: False},
    )


def pair_count(log_mel: Tensor, negative: Tensor) -> Tensor:
    """Return the number of valid pairs, () float32: the synchronization loss is a mean over them.

    Args:
        log_mel, negative: (N, 1, M, F) of this rank.
    """
    return pair_mask(log_mel, negative).sum(dtype=torch.float32)


def ranks_of(norm: GhostBatchNorm) -> int:
    """Return how many ranks a norm's groups reach over."""
    return 1 if norm.process_group is None else dist.get_world_size(norm.process_group)


class SharedStatistics:
    """Makes the ranks' running statistics equal after every step.

    Each rank has folded its own clips into the moving averages with momentum m, from equal values. The pooled mean is
    the average of the ranks' means. The pooled variance is the average variance plus the variance between the ranks'
    means; each mean moved by m times its batch mean, so that term enters the moving average as
    E[(mean_r - mean)^2] / m. Two small collectives a step (about 0.5 MB for R50), no host synchronisation. With it the
    replicas are equal at every step boundary: a checkpoint can be taken anywhere and read by any number of ranks.

    Args:
        model: holds `GhostBatchNorm` modules; other floating-point buffers are averaged. Ranks that form BN groups
            together (`shared_norms`) have the same statistics and count each.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._world_size = runtime.world_size
        every = [m for m in model.modules() if isinstance(m, GhostBatchNorm)]
        owned = {id(b) for n in every for b in n.buffers(recurse=False)}
        norms = [n for n in every if ranks_of(n) < runtime.world_size]  # the others have the same statistics already
        others = [b for b in model.buffers() if id(b) not in owned and b.is_floating_point()]
        self._averaged: list[Tensor] = [n.running_mean for n in norms] + [n.running_var for n in norms] + others
        self._variances: list[Tensor] = [n.running_var for n in norms]
        momenta = [torch.full_like(n.running_mean, n.momentum, dtype=torch.float32) for n in norms]
        self._momenta = torch.cat(momenta) if momenta else None  # one for each channel of each norm

    @torch.no_grad()
    def synchronize(self) -> None:
        """Pool the statistics of all ranks in place, by few launches; nothing to do for one rank."""
        if self._world_size == 1 or not self._averaged:
            return
        pooled = torch.cat([t.reshape(-1).float() for t in self._averaged])
        own_means = None if self._momenta is None else pooled[: len(self._momenta)].clone()
        self._average(pooled)
        torch._foreach_copy_(self._averaged, _pieces(pooled, self._averaged))
        if own_means is not None:
            deviations = (own_means - pooled[: len(own_means)]).square_().div_(self._momenta)
            self._average(deviations)
            torch._foreach_add_(self._variances, _pieces(deviations, self._variances))

    def _average(self, flat: Tensor) -> None:
        """Replace values by their means over the ranks."""
        dist.all_reduce(flat)
        flat /= self._world_size


def _pieces(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cut flat memory into views of the shapes of other tensors."""
    pieces = flat.split([t.numel() for t in like])
    return [piece.view_as(t) for piece, t in zip(pieces, like, strict=True)]
