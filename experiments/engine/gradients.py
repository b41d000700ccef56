"""Gradients averaged over the ranks by one all_reduce between two CUDA graphs, where DDP's hooks cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Packed:
    """The gradients of one step in one piece of memory.

    Args:
        flat: (n,) float32, the part that this step uses.
        parameters: that have a gradient in this step, the same on every rank.
        views: a view of `flat` for each, with its strides.
    """

    flat: Tensor
    parameters: tuple[nn.Parameter, ...]
    views: tuple[Tensor, ...]

    def unpack(self) -> None:
        """Make the views the parameters' gradients."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


class GradientAverage:
    """Averages gradients over the ranks as DDP does, in one piece and without overlap with the backward pass.

    Parameters without a gradient (DropPathway) must be the same on every rank; they are left out and keep None.

    Args:
        parameters: float32, on their device, in the same order on every rank.
        world_size: number of ranks, all of the default process group.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int) -> None:
        self._parameters, self._world_size = tuple(parameters), world_size
        count = sum(p.numel() for p in self._parameters)
        self._flat = torch.empty(count, dtype=torch.float32, device=self._parameters[0].device)

    @torch.no_grad()
    def pack(self) -> Packed:
        """Copy this rank's share of the average into the buffer; captured, so it must not exchange anything."""
        used = tuple(p for p in self._parameters if p.grad is not None)
        views, start = [], 0
        for parameter in used:  # dense, whatever its layout: the strides are kept
            views.append(torch.as_strided(self._flat, parameter.size(), parameter.stride(), start))
            start += parameter.numel()
        flat = self._flat[:start]
        torch._foreach_copy_(views, [p.grad for p in used])  # type: ignore[misc]
        flat.div_(self._world_size)
        return Packed(flat, used, tuple(views))

    def exchange(self, packed: Packed) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(packed.flat)

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers, as DDP does when it is built."""
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
