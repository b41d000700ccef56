"""Evaluation of self-supervision: rotation accuracy, and synchronization accuracy on easy and on hard negatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from experiments.config import Config
from experiments.engine.data import eval_loader
from experiments.engine.scoring import account_for, any_rank, quarantine_notes, require_finite_scores
from experiments.runtime import Runtime
from experiments.tasks import Report
from experiments.tasks.self_supervision import PretextScores
from pipeline.dataset import Dataset
from pipeline.plan import Pretext


def evaluate_pretext(
    model: nn.Module,
    config: Config,
    dataset: Dataset,
    runtime: Runtime,
    autocast: AbstractContextManager[Any],
    should_stop: Callable[[], bool] = bool,
) -> Report | None:
    """Score a split: every view once for each kind of negative, turned as its position says.

    Args:
        model: the bare module; its training flags are restored.
        config: of the run; `data.rotation` and `data.negatives` say what is asked.
        dataset: the split.
        runtime: of this process.
        autocast: context of the forward pass.
        should_stop: asked before every batch, True on any rank ends the evaluation on all.

    Returns:
        The same report on every rank, None if stopped.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    kinds = ("easy", "hard") if config.data.negatives != "none" else ("none",)
    loaders = [eval_loader(config, dataset, runtime, Pretext(config.data.rotation, kind)) for kind in kinds]  # type: ignore[arg-type]
    scores = PretextScores(loaders[0].plan.num_positions * len(kinds))
    try:
        with torch.inference_mode(), autocast:
            for number, (kind, loader) in enumerate(zip(kinds, loaders, strict=True)):
                for batch in loader.batches():
                    if should_stop():
                        break
                    more: dict[str, Any] = {}
                    if config.model.drops_silence:
                        more = {"has_audio": batch.has_audio}
                    if kind != "none":
                        more |= {"negative_log_mel": batch.negative_log_mel, "has_negative": batch.has_negative}
                    output = model(batch.frames, batch.log_mel, **more)
                    finite = torch.isfinite(output.scores).all(1).cpu()
                    scores.bad.add(finite, batch.ids, batch.view.cpu())
                    scores.add(output, batch.rotation if number == 0 else None, kind)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if any_rank(should_stop(), runtime):
        return None
    scores.gather(runtime)
    quarantine = sorted({found for loader in loaders for found in account_for(loader, runtime)})
    require_finite_scores(scores.bad)
    report = scores.report(len(dataset.samples))
    return dataclasses.replace(report, notes=report.notes + quarantine_notes(quarantine))
