"""One optimizer step of several passes: the gradients of all are summed before the weights move.

A rank's clips of a step are cut into equal passes, each a whole number of BN groups. The step is that of one pass with
all clips, within rounding: each loss counts 1/k, running statistics take all passes as groups of one batch, gradients
are exchanged with the last pass only, DropPathway's draw and the dropout's seed are of the step, and losses that are
means over pairs or boxes are weighted by their number in all passes. Under torch.compile each pass moves the running
statistics by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from experiments.engine.step import StepInputs, TrainingStep
from experiments.tasks import StepLoss
from kernels.modules import joint_statistics_update
from pipeline.batch import Batch


def take_passes(batches: Iterator[Batch], passes: int) -> list[Batch]:
    """Return the batches of the next step; of several each is a copy, as a loader's batch lives until the next one.

    Args:
        batches: of one pass each.
        passes: of a step.
    """
    return [next(batches)] if passes == 1 else [next(batches).clone() for _ in range(passes)]


def weights_by_count(counts: Sequence[Tensor], world_size: int) -> list[Tensor]:
    """Return the weights of losses that are means over unequal numbers of things: their mean is then that over all.

    With n_i things in pass i of this rank, k passes and W ranks the weight is W k n_i / sum n. The sum is over the
    ranks and found before the step, so that the step needs no other rank. No host synchronisation.

    Args:
        counts: () float32 of each pass of this rank.
        world_size: W, all of the default process group.

    Returns:
        () float32 each.
    """
    total = torch.stack(list(counts)).sum()
    if world_size > 1:
        dist.all_reduce(total)
    return [count * (world_size * len(counts)) / total.clamp(min=1.0) for count in counts]


class AccumulatedStep:
    """Takes training steps of several passes, as `TrainingStep` does those of one.

    Args:
        step: what finds the gradients of a pass and uses their sum; it exchanges them by DDP or not at all.
    """

    def __init__(self, step: TrainingStep) -> None:
        assert step.average is None, "gradients exchanged in one piece are those of a captured step"
        self.step, self.warming_up = step, False

    def __call__(self, passes: Sequence[StepInputs], *, drop_audio: bool) -> StepLoss:
        """Take one step.

        Args:
            passes: at least one, of equally many clips.
            drop_audio: DropPathway's decision for all of them.

        Returns:
            the mean loss, the losses of all clips, and means of the parts, detached.
        """
        step, losses = self.step, []
        if step.guard is not None:
            step.guard.remember()
        with ExitStack() as statistics:
            statistics.enter_context(joint_statistics_update())
            for inputs in passes[:-1]:
                with self._without_exchange():
                    losses.append(step.backward(step.find_loss(inputs, drop_audio=drop_audio), len(passes)))
            last = step.find_loss(passes[-1], drop_audio=drop_audio)
        losses.append(step.backward(last, len(passes)))  # after the statistics were folded in: the guard looks at them
        step.update_weights(None, drop_audio=drop_audio)
        return _joined(losses)

    def _without_exchange(self) -> AbstractContextManager[Any]:
        forward = self.step.forward
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def _joined(losses: Sequence[StepLoss]) -> StepLoss:
    """Return the losses of the passes as those of one step."""
    names = list(dict.fromkeys(name for loss in losses for name in loss.parts))
    parts = {n: torch.stack([loss.parts[n].float() for loss in losses if n in loss.parts]).mean() for n in names}
    total = torch.stack([loss.total for loss in losses]).mean()
    return StepLoss(total, torch.cat([loss.per_clip for loss in losses]), parts)
