"""Losses of the steps since the last log line: kept on the device, read by the host once per window."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.cli.command_line import CommandFailure
from experiments.engine.guard import FINE, OVERFLOW
from experiments.runtime import Runtime
from experiments.tasks import StepLoss

MOST_IN_A_ROW = 50  # steps left out one after the other, after which nothing is learned any more
log = logging.getLogger(__name__)


class TrainingFailure(CommandFailure):
    """Training cannot go on; the message says at which step and why."""


@dataclass
class _Entry:
    step: int
    total: Tensor
    per_clip: Tensor
    parts: dict[str, Tensor]
    ids: list[str]
    verdict: Tensor


@dataclass
class _Bad:
    """A bad step on one rank: what was found, and the clips whose own loss is not finite, or all of the step."""

    loss: bool
    named: list[str]
    ids: list[str]


class LossWindow:
    """Collects `StepLoss`es without synchronising; `close` reads them, over all ranks, and says which steps were bad.

    Args:
        runtime: of this process.
        policy: `optim.bad_step`: "stop" ends the training at a bad step, "skip" reports it and goes on.
    """

    def __init__(self, runtime: Runtime, policy: str = "stop") -> None:
        self._runtime, self._policy = runtime, policy
        self._entries: list[_Entry] = []
        self._in_a_row = 0

    def add(self, step: int, loss: StepLoss, ids: Sequence[str], verdict: Tensor | None = None) -> None:
        """Keep the losses of one step, and what `StepGuard` says of it; never synchronises.

        Args:
            step: its number.
            loss: of this rank.
            ids: of its clips.
            verdict: of the guard.
        """
        verdict = torch.zeros_like(loss.total, dtype=torch.float32) if verdict is None else verdict.clone()
        entry = _Entry(step, loss.total.detach(), loss.per_clip, dict(loss.parts), list(ids), verdict)
        self._entries.append(entry)

    def close(self) -> dict[str, float]:
        """Return the means over the window's good steps and all ranks ("loss" and the parts) and empty the window.

        "steps_skipped" counts steps left out (optim.bad_step=skip), "scaler_skips" those of fp16's scaler, if any.

        Raises:
            TrainingFailure: on every rank if a step was bad and is not to be skipped, naming the first and its clips.
        """
        entries, self._entries = self._entries, []
        if not entries:
            return {}
        names = sorted({name for e in entries for name in e.parts})
        columns = [torch.stack([e.total for e in entries]), torch.stack([e.verdict for e in entries])]
        columns += [torch.stack([e.parts[n] for e in entries if n in e.parts]).float() for n in names]
        clips = torch.stack([e.per_clip for e in entries])
        host = torch.cat([c.reshape(-1) for c in [*columns, clips]]).double().cpu()  # the one synchronisation
        totals, verdicts, *parts, per_clip = host.split([c.numel() for c in [*columns, clips]])
        bad = self._over_ranks(self._bad_steps(entries, totals, verdicts, per_clip.view_as(clips)))
        overflowed = {e.step for e, v in zip(entries, verdicts.tolist(), strict=True) if v == OVERFLOW} - bad.keys()
        self._react(bad)
        self._count([e.step for e in entries], bad.keys() | overflowed)
        steps = [[e.step for e in entries if n == "loss" or n in e.parts] for n in ["loss", *names]]
        chosen = [_without(p, s, bad.keys()) for p, s in zip([totals, *parts], steps, strict=True)]
        means = torch.stack([c.mean() for c in chosen])
        if self._runtime.world_size > 1:
            dist.all_reduce(means, group=self._runtime.control)
            means /= self._runtime.world_size
        values = zip(["loss", *names], means.tolist(), chosen, strict=True)
        found = {name: value for name, value, good in values if len(good)}
        counts = {"steps_skipped": len(bad), "scaler_skips": len(overflowed)}
        return found | {name: float(count) for name, count in counts.items() if count}

    @staticmethod
    def _bad_steps(entries: list[_Entry], totals: Tensor, verdicts: Tensor, clips: Tensor) -> dict[int, _Bad]:
        """Return this rank's bad steps."""
        found = {}
        finite = torch.isfinite(totals).tolist()
        for entry, ok, verdict, losses in zip(entries, finite, verdicts.tolist(), clips, strict=True):
            if ok and verdict in (FINE, OVERFLOW):
                continue
            named = [name for name, loss in zip(entry.ids, losses.tolist(), strict=True) if loss - loss != 0]
            found[entry.step] = _Bad(not ok, named, entry.ids)
        return found

    def _over_ranks(self, own: dict[int, _Bad]) -> dict[int, _Bad]:
        """Join the ranks' bad steps; every rank has the same then."""
        everywhere: list[Any] = [own]
        if self._runtime.world_size > 1:
            everywhere = [None] * self._runtime.world_size
            dist.all_gather_object(everywhere, own, group=self._runtime.control)
        joined: dict[int, _Bad] = {}
        for step in sorted({step for part in everywhere for step in part}):
            parts = [part[step] for part in everywhere if step in part]
            # A rank whose loss is finite only heard of it: the clips are those of the ranks where it began.
            begun = [p for p in parts if p.loss] or parts
            joined[step] = _Bad(
                any(p.loss for p in parts), [n for p in parts for n in p.named], [n for p in begun for n in p.ids]
            )
        return joined

    def _react(self, bad: dict[int, _Bad]) -> None:
        """End the training at its first bad step, or say which are left out and why."""
        for step, found in bad.items():
            names = found.named or found.ids
            shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
            what = "loss" if found.loss else "gradients"
            rule = "must be finite and is not" if found.loss else "must be finite, and no spike (optim.spike_ratio)"
            if self._policy == "stop":
                raise TrainingFailure(
                    f"{what} at step {step} {rule}, for the clips {shown}; look at these clips, lower optim.lr, use "
                    "runtime.precision=fp32, or leave such steps out with optim.bad_step=skip"
                )
            if self._runtime.is_main:
                log.warning("step %d is left out: %s %s, for the clips %s", step, what, rule, shown)

    def _count(self, steps: list[int], left_out: set[int]) -> None:
        for step in steps:
            self._in_a_row = self._in_a_row + 1 if step in left_out else 0
            if self._in_a_row == MOST_IN_A_ROW:
                raise TrainingFailure(
                    f"{MOST_IN_A_ROW} steps in a row, up to step {step}, were left out: nothing is learned any more; "
                    "lower optim.lr, or start from earlier weights with train.init_from"
                )


def _without(values: Tensor, steps: list[int], bad: Any) -> Tensor:
    return values[[i for i, step in enumerate(steps) if step not in bad]]
