"""Whether tensors are finite: weights, running statistics, momentum, before they are saved and before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold nan or inf, in their order.

    One reduction over all tensors of a type and one host synchronisation for all; nothing is copied.

    Args:
        tensors: name -> tensor, all on one device; integers, booleans and empty ones are finite.
    """
    groups: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault(tensor.dtype, []).append(name)
    if not groups:
        return []
    with torch.no_grad():
        largest = [torch.stack(torch._foreach_norm([tensors[n] for n in g], float("inf"))) for g in groups.values()]
        finite = torch.isfinite(torch.cat([x.double() for x in largest])).tolist()
    names = [name for group in groups.values() for name in group]
    found = {name for name, ok in zip(names, finite, strict=True) if not ok}
    return [name for name in tensors if name in found]


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) for every tensor in nested containers, as a checkpoint's state is one.

    Args:
        value: mappings, lists, tuples, tensors and plain values.
        name: of the value, put before those inside.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{name}[{index}]")


def few(names: list[str], shown: int = 3) -> str:
    """Return the first of many names for a message."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
