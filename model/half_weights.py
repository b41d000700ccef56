"""Weights in 16 bits, made for one forward by few launches.

Under autocast every convolution casts its own weight in every step, and its gradient back: 2 launches for each of about
170 convolutions. Here the weights of a stage are cast together by one multi-tensor launch, and so are their gradients.
The numbers are autocast's own, bit for bit. By stages, not all at once, because a group's gradients exist only when
its last one does: DistributedDataParallel sends those of a stage while the stage before it is still computed.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.convolutions import Convolution

WeightCasts = Literal["auto", "off", "always"]


def convolutions_of(parts: Iterable[nn.Module]) -> list[Convolution]:
    """The convolutions in `parts`, each once."""
    return list(dict.fromkeys(m for part in parts for m in part.modules() if isinstance(m, Convolution)))


@contextlib.contextmanager
def half_weights(groups: Iterable[Sequence[Convolution]], casts: WeightCasts = "auto") -> Iterator[None]:
    """Give convolutions 16-bit copies of their weights for what runs inside, where autocast would cast them.

    A convolution that runs outside autocast inside, or again in a backward (activation checkpointing), takes its own
    weight. Nothing happens in a compiled program, which merges casts by itself.

    Args:
        groups: convolutions that are cast together.
        casts: "auto": on CUDA; "always": on any device, for tests; "off": never.
    """
    given: list[Convolution] = []
    try:
        if casts != "off" and not torch.compiler.is_compiling():
            for group in groups:
                given += _give(group, casts)
        yield
    finally:
        for convolution in given:
            convolution.half_weight = None


def _give(group: Sequence[Convolution], casts: WeightCasts) -> list[Convolution]:
    """Set `half_weight` of those convolutions of a group whose weight autocast would cast, and return them."""
    if not group:
        return []
    kind = group[0].weight.device.type
    if kind == "meta" or (casts == "auto" and kind != "cuda") or not torch.is_autocast_enabled(kind):
        return []
    dtype = torch.get_autocast_dtype(kind)
    if dtype not in (torch.bfloat16, torch.float16):
        return []
    place = group[0].weight.device
    cast = [c for c in group if c.weight.dtype == torch.float32 and c.weight.device == place and not c.is_kept]
    if cast:
        halves = _Cast.apply(dtype, *(c.weight for c in cast))
        for convolution, half in zip(cast, halves, strict=True):
            convolution.half_weight = half
    return cast


class _Cast(torch.autograd.Function):
    """float32 tensors -> their 16-bit copies of the same strides; gradients go back together as well.

    A copy that nothing used has no gradient, and neither has its weight: a dropped pathway's stay None.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Copies of `weights` in `dtype`; those of frozen weights take no gradient."""
        ctx.set_materialize_grads(False)
        halves = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(halves, list(weights))
        frozen = [half for half, learns in zip(halves, ctx.needs_input_grad[1:], strict=True) if not learns]
        ctx.mark_non_differentiable(*frozen)
        return tuple(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients in float32; None where a copy was not used."""
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if given:
            torch._foreach_copy_(wide, given)
        found = iter(wide)
        return None, *(None if grad is None else next(found) for grad in grads)
