"""What a training says of itself: at its start what it uses and does, at its end score, files and what comes next."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from experiments.config import Config
from experiments.engine.run_data import RunData
from experiments.records.progress import format_duration
from experiments.runtime import Runtime
from model.config import ModelConfig
from model.flops import Cost, count
from pipeline.dataset import FLAG_SILENT, Dataset

Rows = list[tuple[str, str]]  # topic (empty: as the row above), text


@cache
def _cost(model: ModelConfig, size_px: int) -> Cost:
    with torch.random.fork_rng(devices=[]):  # counting builds the model
        return count(model, size_px, size_px)


def cost_of(config: Config, size_px: int = 0) -> Cost:
    """Return multiply-adds and parameters of one view of a run's model.

    Args:
        config: of the run, its number of classes known.
        size_px: side of the view; 0: that of a training clip.
    """
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    model = ModelConfig(**{key: value for key, value in vars(config.model).items() if key in names})
    return _cost(model, size_px or config.data.crop_size_px)


def model_text(config: Config) -> str:
    """Return the model in words: pathways, depth and frames, parameters, multiply-adds."""
    model, cost = config.model, cost_of(config)
    return (
        f"{', '.join(model.pathways)}; R{model.depth} {model.num_frames}x{model.frame_stride}; {cost.params_m:.1f} M "
        f"parameters, {cost.gmacs:.2f} GFLOPs"
    )


def silent_samples(dataset: Dataset) -> int:
    """Return the number of samples whose medium has no sound."""
    flags = np.asarray(dataset.media.flags)[np.asarray(dataset.samples.media)]
    return int(np.count_nonzero(flags & FLAG_SILENT))


def data_rows(config: Config, data: RunData) -> Rows:
    """Return what a run reads."""
    train, val = data.train_set, data.val_set
    rows = [
        ("data", f"{config.data.path}: {len(data.class_names)} classes of {config.data.label_set!r}"),
        ("", f"{len(train.samples)} samples to train on in {train.split!r}, "
             f"{len(val.samples)} to evaluate in {val.split!r}"),
    ]  # fmt: skip
    if config.model.has_audio and (silent := (silent_samples(train), silent_samples(val))) != (0, 0):
        rows.append(("", f"without sound: {silent[0]} to train on, {silent[1]} to evaluate"))
    if data.splits.refused:
        rows.append(("", f"not used: {len(data.splits.refused)} files, each named in summary.json"))
    return rows


def start_lines(config: Config, runtime: Runtime, data: RunData) -> list[str]:
    """Return the lines at the start of a training, each at most 71 columns wide where names are short.

    Args:
        config: of the run.
        runtime: of this process.
        data: of the run.
    """
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu"
    number = torch.get_num_threads()
    threads = f", {number} thread{'s' * (number > 1)}" if runtime.device.type == "cpu" else ""
    ranks = f"{runtime.world_size} x " if runtime.world_size > 1 else ""
    steps, passes = data.total_steps, f" in {data.passes} passes" if data.passes > 1 else ""
    rows = [
        ("device", f"{ranks}{device}{threads}, {config.runtime.precision}"),
        *data_rows(config, data),
        ("model", model_text(config)),
        ("step", f"{config.train.clips_per_step} clips{passes}; {steps} steps = {data.epoch(steps):.1f} epochs"),
        ("results", str(config.run_dir)),
    ]
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return rows as lines, the texts one below the other."""
    width = max(len(topic) for topic, _ in rows)
    return [f"{topic.ljust(width)}  {text}" for topic, text in rows]


def end_lines(config: Config, metrics: Mapping[str, float], primary: str, seconds: float) -> list[str]:
    """Return the lines at the end of a training that is finished: score, where things are, what to do next.

    Args:
        config: of the run.
        metrics: of the last evaluation; empty where there was none.
        primary: name of the metric that is the score.
        seconds: that the run took, over all its processes.
    """
    folder, best = config.run_dir, config.run_dir / "checkpoints" / "best"
    score = f"{primary} {100 * metrics[primary]:.2f} %, " if primary in metrics else ""
    rows = [
        ("finished", f"{score}{format_duration(seconds)}"),
        ("results", f"{folder}: summary.json, per_class.csv, plots, log.txt"),
        *([("checkpoint", str(best))] if best.exists() else []),
    ]
    rows += [("next" if i == 0 else "", command) for i, command in enumerate(next_commands(config))]
    return aligned(rows)


def next_commands(config: Config) -> list[str]:
    """Return three commands that make sense after a training."""
    run, python = shlex.quote(str(config.run_dir)), python_to_type()
    evaluate = f"{python} -m experiments.evaluate {run} views.num_clips=10 views.num_crops=3"
    export = f"{python} -m experiments.export {run} --out exported"
    if config.train.task == "self_supervision":
        return [
            f"{python} -m experiments.evaluate {run}",
            f"{python} -m experiments.train CONFIG train.init_from={run}",
            export,
        ]
    if config.train.task == "detection":
        return [f"{python} -m experiments.evaluate {run} --detections detections.csv", export, "make ui"]
    return [evaluate, f"{python} -m experiments.predict {run} FILE_OR_FOLDER", export]


def python_to_type() -> str:
    """Return this Python as one types it here: "python" in an active environment, else its path."""
    if os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else sys.executable or "python"
