"""Clips of a training that could not be read, over all ranks: how many were replaced, and which samples they are of."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from experiments.runtime import Runtime
from pipeline.loader import TrainLoader


class ClipCounts:
    """What the ranks' loaders count, as rank 0 knows it.

    Args:
        loader: of this rank.
        runtime: of this process.
    """

    def __init__(self, loader: TrainLoader, runtime: Runtime) -> None:
        self._loader, self._runtime = loader, runtime
        self._others_substituted, self._known = 0, 0
        self._others: list[tuple[str, str]] = []

    def gather(self) -> None:
        """Take in what the other ranks have counted so far; all ranks call it, at a report."""
        if self._runtime.world_size == 1:
            return
        own, unreadable = self._loader.stats.substituted, self._loader.quarantine
        counts = torch.tensor([own, len(unreadable)])
        dist.all_reduce(counts, group=self._runtime.control)
        self._others_substituted = int(counts[0]) - own
        if int(counts[1]) != self._known:  # on every rank: names are exchanged only when there are new ones
            self._known = int(counts[1])
            parts: list[Any] | None = [None] * self._runtime.world_size if self._runtime.is_main else None
            dist.gather_object(unreadable, parts, group=self._runtime.control)
            self._others = [found for part in (parts or ())[1:] for found in part]

    @property
    def substituted(self) -> int:
        """Clips that were replaced, of all ranks by the last `gather`, of this one until now."""
        return self._others_substituted + self._loader.stats.substituted

    @property
    def unreadable(self) -> list[str]:
        """`sample: reason` of every sample that could not be read, sorted; as `substituted`."""
        return sorted({f"{name}: {reason}" for name, reason in (*self._loader.quarantine, *self._others)})
