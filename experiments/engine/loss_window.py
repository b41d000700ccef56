"""Losses of the steps since the last log line: kept on the device, read by the host once per window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.cli.command_line import CommandFailure
from experiments.runtime import Runtime
from experiments.tasks import StepLoss
from pipeline.batch import Batch


class TrainingFailure(CommandFailure):
    """Training cannot go on; the message says at which step and why."""


@dataclass
class _Entry:
    step: int
    total: Tensor
    per_clip: Tensor
    parts: dict[str, Tensor]
    ids: list[str]


class LossWindow:
    """Collects `StepLoss`es without synchronising; `close` reads them, over all ranks, and requires finite ones."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._entries: list[_Entry] = []

    def add(self, step: int, loss: StepLoss, batch: Batch) -> None:
        """Keep the losses of one step; never synchronises."""
        entry = _Entry(step, loss.total.detach(), loss.per_clip, dict(loss.parts), list(batch.ids))
        self._entries.append(entry)

    def close(self) -> dict[str, float]:
        """Return the means over the window's steps and all ranks ("loss" and the parts) and empty the window.

        Raises:
            TrainingFailure: on every rank if a loss is not finite, naming the first such step and its clips.
        """
        entries, self._entries = self._entries, []
        if not entries:
            return {}
        names = sorted({name for e in entries for name in e.parts})
        columns = [torch.stack([e.total for e in entries])]
        columns += [torch.stack([e.parts[n] for e in entries if n in e.parts]).float() for n in names]
        clips = torch.stack([e.per_clip for e in entries])
        host = torch.cat([c.reshape(-1) for c in [*columns, clips]]).double().cpu()  # the one synchronisation
        pieces = host.split([c.numel() for c in [*columns, clips]])
        self._require_finite(entries, pieces[0], pieces[-1].view_as(clips))
        means = torch.stack([p.mean() for p in pieces[:-1]])
        if self._runtime.world_size > 1:
            dist.all_reduce(means, group=self._runtime.control)
            means /= self._runtime.world_size
        return dict(zip(["loss", *names], means.tolist(), strict=True))

    def _require_finite(self, entries: list[_Entry], totals: Tensor, clips: Tensor) -> None:
        bad = next((i for i, total in enumerate(totals.tolist()) if not torch.isfinite(torch.tensor(total))), None)
        found: tuple[int, list[str]] | None = None
        if bad is not None:
            ids = [name for name, loss in zip(entries[bad].ids, clips[bad].tolist(), strict=True) if loss - loss != 0]
            found = (entries[bad].step, ids or entries[bad].ids)
        everywhere: list[Any] = [found]
        if self._runtime.world_size > 1:
            everywhere = [None] * self._runtime.world_size
            dist.all_gather_object(everywhere, found, group=self._runtime.control)
        present = [f for f in everywhere if f is not None]
        if not present:
            return
        step = min(s for s, _ in present)
        names = [name for s, ids in present if s == step for name in ids]
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise TrainingFailure(
            f"loss at step {step} must be finite and is not, for the clips {shown}; look at these clips, lower "
            "optim.lr, or use runtime.precision=fp32; no checkpoint was written since the last finite one"
        )
