"""Scores of a split: every view once, over all ranks, no sample padded, replaced or lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from experiments.cli.command_line import CommandFailure
from experiments.engine.graphs import CapturedForward, Capturer
from experiments.runtime import Runtime
from experiments.tasks import Accumulator, BadScores, Report
from experiments.tasks.detection import BoxScores
from model.output import ModelOutput
from pipeline.batch import Batch
from pipeline.loader import EvalLoader


@dataclass(frozen=True)
class ClassSubset:
    """The classes that can be predicted: name of the list, and for each of the K classes whether it is in it."""

    name: str
    allowed: tuple[bool, ...]


class EvaluationError(ValueError):
    """An evaluation whose counts do not add up."""


class ScoresNotFinite(CommandFailure):
    """An evaluation without result: a model gave scores that are nan or inf; the message names samples and views."""


def evaluate(
    model: nn.Module,
    accumulator: Accumulator,
    loader: EvalLoader,
    runtime: Runtime,
    autocast: AbstractContextManager[Any],
    should_stop: Callable[[], bool] = bool,
    subset: ClassSubset | None = None,
    graphs: Capturer | None = None,
    *,
    drop_silence: bool = False,
    change: Callable[[Batch], Batch] | None = None,
    seen: Callable[[Batch, torch.Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report | None:
    """Score a split.

    Args:
        model: the bare module (no DDP: ranks may have different numbers of batches), its training flags are restored.
        accumulator: empty.
        loader: of this rank.
        autocast: context of the forward pass.
        should_stop: asked before every batch, True on any rank ends the evaluation on all.
        subset: the logits of all other classes are -inf; not looked at in a detection.
        graphs: what captures the forward pass, None runs it launch by launch.
        drop_silence: whether the model is told which clips have sound (`ModelSection.drops_silence`).
        change: what is done to a batch before the model has it; None: nothing.
        seen: is given each batch with its scores; None: nobody looks.
        progress: called after each batch with those done and those of this rank.

    Returns:
        The same report on every rank (`quarantined` in its counts: unreadable samples), None if stopped.

    Raises:
        EvaluationError: unless clips scored + clips quarantined = clips of the plan.
        ScoresNotFinite: on every rank, if scores of any view are not finite.
    """
    detects = isinstance(accumulator, BoxScores)
    if detects:
        subset = None  # of the task: a class that does not count takes nothing from the others
    modes = {module: module.training for module in model.modules()}
    model.eval()
    forward = CapturedForward(model, graphs, class_scores) if graphs is not None else None
    try:
        with torch.inference_mode(), autocast, only_classes(model, subset):
            batches = 0 if progress is None else len(loader)
            for done, batch in enumerate(loader.batches(), 1):
                if should_stop():
                    break
                batch = change(batch) if change is not None else batch
                sound = {"has_audio": batch.has_audio} if drop_silence else {}
                if forward is None:
                    boxes = {"boxes": batch.boxes} if detects else {}
                    scores = class_scores(model(batch.frames, batch.log_mel, **boxes, **sound))
                else:
                    scores = forward(batch.frames, batch.log_mel, **sound)
                accumulator.add(scores, batch)
                if seen is not None:
                    seen(batch, scores)
                if progress is not None:
                    progress(done, batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if any_rank(should_stop(), runtime):
        return None
    accumulator.gather(runtime)
    quarantine = account_for(loader, runtime)
    require_finite_scores(accumulator.bad)
    report = accumulator.report()
    masked = () if subset is None else (f"only the {sum(subset.allowed)} classes of {subset.name} could be predicted",)
    return dataclasses.replace(report, notes=report.notes + masked + quarantine_notes(quarantine))


def quarantine_notes(quarantine: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the notes of a report about quarantined samples: ten of them, and how many more there are.

    Args:
        quarantine: names and reasons, see `account_for`.
    """
    notes = tuple(f"quarantined {name}: {reason}" for name, reason in quarantine[:10])
    more = (f"and {len(quarantine) - 10} more quarantined",) if len(quarantine) > 10 else ()
    return notes + more


def require_finite_scores(bad: BadScores) -> None:
    """Raise ScoresNotFinite unless all scores of an evaluation are finite."""
    if not bad.views:
        return
    shown = ", ".join(f"{name} view {view}" for name, view in bad.first)
    more = ", ..." if bad.views > len(bad.first) else ""
    raise ScoresNotFinite(
        f"scores of {bad.views} of {bad.planned} views must be finite and are not ({shown}{more}); there is no "
        "result: if it is every view the weights have diverged (use an earlier checkpoint, lower optim.lr), "
        "else look at these samples or use runtime.precision=fp32"
    )


def class_scores(output: ModelOutput) -> torch.Tensor:
    """Return the class scores (N, K) of a model in evaluation."""
    return output.scores


def only_classes(model: nn.Module, subset: ClassSubset | None) -> AbstractContextManager[Any]:
    """Set the logits outside the subset to -inf before the softmax, for as long as the context lasts."""
    if subset is None:
        return nullcontext()
    outside = torch.tensor([not a for a in subset.allowed], device=next(model.parameters()).device)
    classifier = model.get_submodule("head.classifier")
    handle: AbstractContextManager[Any] = classifier.register_forward_hook(
        lambda _module, _inputs, logits: logits.masked_fill(outside, -torch.inf)
    )
    return handle


def any_rank(here: bool, runtime: Runtime) -> bool:
    flag = torch.tensor([int(here)])
    if runtime.world_size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=runtime.control)
    return bool(flag.item())


def account_for(loader: EvalLoader, runtime: Runtime) -> list[tuple[str, str]]:
    """Check yielded + quarantined = planned over all ranks; return the distinct quarantined samples with reasons.

    Raises:
        EvaluationError: a clip is missing, or came twice.
        QuarantineError: the ranks together could not read more of the split than `data.max_quarantined_share` allows.
    """
    counts = torch.tensor([loader.stats.yielded, loader.stats.quarantined])
    lists: list[Any] = [loader.quarantine]
    if runtime.world_size > 1:
        dist.all_reduce(counts, group=runtime.control)
        lists = [None] * runtime.world_size
        dist.all_gather_object(lists, loader.quarantine, group=runtime.control)
    yielded, quarantined = counts.tolist()
    planned = loader.plan.num_positions
    if yielded + quarantined != planned:
        raise EvaluationError(
            f"clips yielded ({yielded}) + quarantined ({quarantined}) must be the {planned} clips of the "
            "evaluation; run it again and report this with the log"
        )
    found = sorted({(name, reason) for part in lists for name, reason in part})
    if found:
        loader.require_few(len({name for name, _ in found}), found[-1][1])  # each rank has seen its own part alone
    return found
