"""Running statistics, folded in at once or for all norms of a forward together. Legend: C channels, G groups."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import definition
from kernels.backend import use_fused

__all__ = ["joint_statistics_update", "track_statistics"]


class Norm(Protocol):
    """What of a norm is updated, and how."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    backend: str


Waiting = list[tuple[Any, Tensor]]  # norms, as `Norm`, and their statistics
_waiting: ContextVar[Waiting | None] = ContextVar("waiting statistics", default=None)


@contextlib.contextmanager
def joint_statistics_update() -> Iterator[None]:
    """Fold the running statistics of all norms that run inside at its end, by one operation: a model's forward.

    Without it each norm updates its own at once; the results are equal bit by bit. A norm that runs twice inside
    (audio in step and out of step) counts both runs as one batch, as `precise_bn` does: then statistics that ranks
    pool afterwards are those of one process, which two moves of a moving average, one after the other, do not
    allow. Inside another one it does nothing; under torch.compile neither, where each norm updates at once. An
    exception inside drops the updates. Norms may not be read for their running statistics before the end.
    """
    if torch.compiler.is_compiling() or _waiting.get() is not None:
        yield
        return
    queue: Waiting = []
    token = _waiting.set(queue)
    try:
        yield
    finally:
        _waiting.reset(token)
    _update(queue)


def track_statistics(norm: Norm, stats: Tensor) -> None:
    """Fold statistics of this batch into the running ones, now or at the end of `joint_statistics_update`.

    A forward that runs inside a backward (activation checkpointing) is a repetition and changes nothing.

    Args:
        norm: whose statistics they are.
        stats: (G, 3, C) count, mean, sum of squared deviations.
    """
    if torch.compiler.is_compiling():
        _fold([norm], [stats])
        return
    if torch._C._current_graph_task_id() != -1:
        return
    queue = _waiting.get()
    if queue is None:
        _fold([norm], [stats])
    else:
        queue.append((norm, stats))


def _update(waiting: Waiting) -> None:
    """Fold (norm, statistics) pairs in, those of all runs of a norm together, by one call for all norms alike."""
    runs: dict[Any, list[Tensor]] = {}
    for norm, stats in waiting:
        runs.setdefault(norm, []).append(stats)
    calls: dict[tuple[float, torch.device, str], dict[Any, Tensor]] = {}
    for norm, found in runs.items():
        stats = found[0] if len(found) == 1 else torch.cat(found)  # (G, 3, C): groups of one batch
        calls.setdefault((norm.momentum, stats.device, norm.backend), {})[norm] = stats
    for call in calls.values():
        _fold(list(call), list(call.values()))


@torch.no_grad()
def _fold(norms: list[Any], stats: list[Tensor]) -> None:
    """Fold one (G, 3, C) of each norm into its running statistics; different norms of one momentum, device, backend."""
    fused = use_fused(stats[0], norms[0].backend)
    update = torch.ops.avsf.running_stats_update_ if fused else definition.running_stats_update_
    buffers = [n.running_mean for n in norms], [n.running_var for n in norms], [n.num_batches_tracked for n in norms]
    update(*buffers, stats, norms[0].momentum)
