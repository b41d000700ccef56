"""Whether all ranks hold the same weights and running statistics, bit by bit: one digest a tensor, compared."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.cli.command_line import CommandFailure
from experiments.records.finite import few
from experiments.runtime import Runtime

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiffer(CommandFailure):
    """Ranks that do not hold the same weights; the message names ranks and tensors."""


@torch.no_grad()
def bit_digest(tensor: Tensor) -> Tensor:
    """Return a digest of the bits of a tensor, whatever its strides.

    The bits of every element as an integer, times 2 i + 1 at position i, summed modulo 2^64. An odd factor has an
    inverse: one element that differs always shows, also as -0.0 for 0.0 or one nan for another. So do two that changed
    places, unless their difference times their distance is a multiple of 2^63.

    Args:
        tensor: of any shape and a type of 1, 2, 4 or 8 bytes.

    Returns:
        () int64, on its device; never synchronises.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()]).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


class ReplicaCheck:
    """Compares the ranks' models every so many steps.

    Args:
        model: its parameters and buffers are compared.
        runtime: of this process; nothing is done alone.
        interval_steps: at the first log step after every so many steps; 0 = only where `always` is given.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, interval_steps: int) -> None:
        self._model, self._runtime, self._interval = model, runtime, interval_steps
        self._checked_step = 0

    def compare(self, step: int, *, always: bool = False) -> None:
        """Compare, if it is due: one host synchronisation and one all-gather of a number a tensor.

        Args:
            step: steps done, the same on all ranks.
            always: before a checkpoint; a step is compared once.

        Raises:
            ReplicasDiffer: on every rank.
        """
        before, interval = self._checked_step, self._interval
        due = interval > 0 and step // interval > before // interval
        if self._runtime.world_size == 1 or step == before or not (due or always):
            return
        self._checked_step = step
        state = self._model.state_dict()
        own = torch.stack([bit_digest(t) for t in state.values()]).cpu()
        everywhere = [torch.empty_like(own) for _ in range(self._runtime.world_size)]
        dist.all_gather(everywhere, own, group=self._runtime.control)
        text = difference(torch.stack(everywhere), list(state))
        if text:
            raise ReplicasDiffer(
                f"weights and statistics after step {step - 1} must be the same bits on all ranks and are not: {text}; "
                "nothing of it is saved; test that machine's memory and GPU, and continue from the newest checkpoint "
                "with the same command"
            )


def difference(digests: Tensor, names: list[str]) -> str:
    """Return which ranks differ from most others (from rank 0, if none are most) and in what; empty if none does.

    Args:
        digests: (ranks, tensors) int64.
        names: of the tensors.
    """
    rows = [tuple(row) for row in digests.tolist()]
    counts = Counter(rows)
    most = max(rows, key=lambda row: counts[row])  # the first of equals: rank 0's
    others = [rank for rank, row in enumerate(rows) if row != most]
    parts = []
    for rank in others[:4]:
        wrong = [name for name, a, b in zip(names, rows[rank], most, strict=True) if a != b]
        parts.append(f"rank {rank} in {len(wrong)} of {len(names)} tensors ({few(wrong)})")
    more = f", and {len(others) - 4} more ranks" if len(others) > 4 else ""
    if not others:
        return ""
    agreeing = [rank for rank, row in enumerate(rows) if row == most]
    reference = f"rank {agreeing[0]}" + (f" and {len(agreeing) - 1} more" if len(agreeing) > 1 else "")
    return f"not those of {reference} are {', '.join(parts)}{more}"
