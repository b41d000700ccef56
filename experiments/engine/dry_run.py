"""What a training would do, found without doing it: `experiments.train --dry-run`."""

from __future__ import annotations

import math
import os
from pathlib import Path

from experiments.config import Config, config_digest
from experiments.engine.data import clips_per_rank, small_group_warning
from experiments.engine.graph_rules import graph_obstacle
from experiments.engine.initial_weights import check_source
from experiments.engine.memory import available_bytes, batch_bytes
from experiments.engine.optim import short_warmup_note
from experiments.engine.run_data import RunData
from experiments.engine.run_lines import cost_of, data_rows, model_text
from experiments.engine.shared_norms import ranks_per_group
from experiments.records.checkpoint import list_checkpoints
from experiments.records.run_folder import check_run_folder
from experiments.runtime import Runtime
from experiments.tasks.consistency import check_consistency

_GIB = 2**30


def plan_lines(config: Config, runtime: Runtime) -> list[str]:
    """Check what a training checks before its first step, and say what it would do.

    Nothing is written, but for a synthetic data set on its first use.

    Args:
        config: of the run.
        runtime: of this process; the plan is for its world size.

    Returns:
        Lines `topic  what`, for the terminal.

    Raises:
        ValueError: whatever would end the training before its first step.
    """
    check_consistency(config)
    data = RunData(config, runtime)
    config = data.config
    if runtime.is_main:
        check_run_folder(config)
    rows = [
        *_run_rows(config, data),
        *_step_rows(config, runtime, data),
        *_memory_rows(config, runtime, data),
        *_schedule_rows(config, data),
        *_evaluation_rows(config, data),
    ]
    width = max(len(topic) for topic, _ in rows)
    return [f"{topic.ljust(width)}  {text}" for topic, text in rows]


def _run_rows(config: Config, data: RunData) -> list[tuple[str, str]]:
    saved = [] if config.train.fresh else list_checkpoints(config.run_dir / "checkpoints")
    state = f"continued from step {max(step for step, _ in saved)}" if saved else "begun"
    if config.train.init_from and not saved:
        there = ", which is not there yet"
        if os.path.exists(config.train.init_from):
            check_source(Path(config.train.init_from))
            there = ""
        state += f", from the weights of {config.train.init_from}{there}"
    return [
        ("run", f"{config.run_dir} (configuration {config_digest(config)}): {state}"),
        *data_rows(config, data),
        ("", f"fingerprint {data.fingerprint}"),
        *(("", note) for note in data.notes),
        ("model", model_text(config)),
    ]


def _step_rows(config: Config, runtime: Runtime, data: RunData) -> list[tuple[str, str]]:
    share = clips_per_rank(config, runtime.world_size)
    clips = share // data.passes
    groups = max(1, clips // config.model.clips_per_bn_group)
    obstacle = graph_obstacle(config, runtime)
    rows = [
        ("ranks", f"{runtime.world_size} on {runtime.device.type}, {config.runtime.precision}"),
        ("step", f"{config.train.clips_per_step} clips = {runtime.world_size} ranks x {data.passes} passes x {clips}; "
                 f"BN over {clips // groups} clips"),
        ("", f"without CUDA graph: {obstacle}" if obstacle else "one CUDA graph for each kind of step"),
    ]  # fmt: skip
    ranks = ranks_per_group(config, runtime.world_size)
    warning = small_group_warning(config, share * ranks)
    return [*rows, ("", warning)] if warning else rows


def _memory_rows(config: Config, runtime: Runtime, data: RunData) -> list[tuple[str, str]]:
    loader, training = data.loader, data.loader.plan.negatives.enabled
    one = batch_bytes(loader.spec, config.data.crop_size_px, loader.options, with_negative=training)
    batches = config.data.prefetch_batches + 1 + (data.passes if data.passes > 1 else 0)
    params = cost_of(config).params_m
    states = 3 if config.optim.momentum else 2  # weights, gradients, momentum in fp32
    available = available_bytes(runtime.device) / _GIB
    return [
        ("memory", f"{one * batches / _GIB:.2f} GiB of batches ({batches} x {loader.options.clips_per_batch} clips), "
                   f"{states * 4 * params * 1e6 / _GIB:.2f} GiB of weights and optimizer ({params:.1f} M parameters)"),
        ("", f"and activations, which are not counted here, of {available:.1f} GiB a rank"),
    ]  # fmt: skip


def _schedule_rows(config: Config, data: RunData) -> list[tuple[str, str]]:
    optim, steps = config.scaled_optim, data.total_steps
    saves = _times(config.checkpoint.interval_steps, steps)
    warmup, note = optim.warmup(steps), short_warmup_note(optim, steps)
    warm = f", warm-up {warmup} steps from {optim.warmup_start_lr:g}" if warmup else ""
    return [
        ("length", f"{steps} steps = {data.epoch(steps):.2f} epochs"),
        ("rate", f"{optim.schedule}, peak {optim.lr:g}{warm}"),
        *([("", note)] if note else []),
        ("checkpoints", f"{saves} at least, {config.checkpoint.keep} kept besides the best"),
    ]


def _evaluation_rows(config: Config, data: RunData) -> list[tuple[str, str]]:
    plan, steps = data.scoring_loader(data.val_set).plan, data.total_steps
    times = _times(config.eval.interval_steps, steps)
    view, clip = cost_of(config, config.views.crop_size_px), cost_of(config)
    views = plan.num_positions * max(1, config.views.num_crops)
    seen = 0 if data.scored_train_set is None else len(data.scored_train_set.samples)
    training = 3 * steps * config.train.clips_per_step * (clip.gmacs + clip.sync_gmacs)  # backward is twice forward
    precise = config.eval.precise_bn_batches * config.train.clips_per_step
    all_views = views + seen * plan.views_per_sample
    cost = times * (all_views * view.gmacs + precise * clip.gmacs) / training
    rows = [
        ("evaluations", f"{times} x {all_views} views ({view.gmacs:.1f} GFLOPs each): {100 * cost:.3g} % of the "
                        "training's multiply-adds"),
    ]  # fmt: skip
    if seen:
        rows.append(("", f"{seen * plan.views_per_sample} of these views are of {seen} training samples"))
    if precise:
        rows.append(("", f"running statistics from {precise} clips before each"))
    return rows


def _times(interval: int, steps: int) -> int:
    """Return how often something with this interval is due, the end included."""
    return math.ceil(steps / interval) if interval else 1
