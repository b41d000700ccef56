"""What an exported model must know of its run to score files as the run does, and the scoring with one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from experiments.cli.strict_yaml import ConfigError, apply_override, build, read_tree
from experiments.config import PRESETS, Config
from experiments.engine.initial_weights import FACTS_NAME
from experiments.engine.scorer import Scorer, model_scores
from experiments.runtime import Runtime, init_runtime
from model.avslowfast import AVSlowFast
from model.export import PROGRAM_NAME, WEIGHTS_NAME, input_names, read_metadata
from model.export import load_model as load_exported
from pipeline.batch import Batch


class ExportedModelError(ValueError):
    """An exported model that cannot score files; the message says what to do."""


def prediction_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a run that decide what a prediction says; no paths of the machine that trained."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        "data": {key: plain["data"][key] for key in ("target_fps", "label_kind")},
        "views": plain["views"],
        "model": plain["model"],
        "train": {"task": plain["train"]["task"], "epochs": 1.0},
        "runtime": {"precision": plain["runtime"]["precision"]},
        "tracking": {"backend": "none"},
    }


def is_exported(target: Path) -> bool:
    """Whether a folder is one of `experiments.export`."""
    return (target / FACTS_NAME).is_file()


def exported_facts(folder: Path) -> dict[str, Any]:
    """Return what an export says of itself: of weights their own metadata, else inputs.json.

    Raises:
        ExportedModelError: a form that scores no files, or facts that are damaged or of an earlier version.
        ExportError: damaged weights.
    """
    if (folder / WEIGHTS_NAME).is_file():
        found = read_metadata(folder)
        texts: dict[str, Any] = {
            key: json.loads(found[key]) for key in ("class_names", "settings", "step") if key in found
        }
    elif (folder / PROGRAM_NAME).is_file():
        try:
            texts = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportedModelError(f"{folder / FACTS_NAME} must be readable: {error}; export again") from error
    else:
        raise ExportedModelError(
            f"{folder} must hold {WEIGHTS_NAME} or {PROGRAM_NAME} to score files; export with --format weights, or "
            f"use its own example.py"
        )
    if not isinstance(texts, dict) or not {"class_names", "settings", "step"} <= texts.keys():
        raise ExportedModelError(f"{folder} must say with which settings it scores, and does not; export it again")
    return texts


def scorer_of_export(folder: Path, overrides: Sequence[str]) -> tuple[Scorer, Runtime]:
    """Return what scores with an exported model, and this process.

    Args:
        folder: of `experiments.export`, weights or program.
        overrides: settings that differ, of the data, the views and the runtime.

    Raises:
        ConfigError: settings that an export cannot take.
        ExportedModelError, ExportError: as `exported_facts`; weights that do not fit their configuration.
    """
    facts = exported_facts(folder)
    config = _config_of(folder, facts["settings"], overrides)
    runtime = init_runtime(config.runtime)
    names = tuple(facts["class_names"]) or tuple(f"class {i}" for i in range(config.model.num_classes))
    model, count = None, 0
    if (folder / WEIGHTS_NAME).is_file():
        model = load_exported(folder).to(runtime.device).eval()
        score, count = _weights(model, config, runtime)
    else:
        score = _program(folder, config, facts["settings"], runtime)
    return Scorer(config, names, str(folder), int(facts["step"]), score, count or len(names), model), runtime


def _config_of(folder: Path, settings: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    for text in overrides:
        if text.startswith("model."):
            raise ConfigError(f"override ({text}) must not be of the model, which {folder} fixes; leave it out")
    root = read_tree(yaml.safe_dump(dict(settings), sort_keys=False), str(folder / FACTS_NAME))
    for text in overrides:
        apply_override(root, text)
    return build(Config, root, presets={"model": ("variant", PRESETS)})


def _weights(model: AVSlowFast, config: Config, runtime: Runtime) -> tuple[Callable[[Batch], Tensor], int]:
    """Score with a model that was built of its weights; also how many classes can be predicted, 0 = all."""
    score, subset = model_scores(model, config, runtime)
    return score, 0 if subset is None else sum(subset.allowed)


def _program(folder: Path, config: Config, settings: Mapping[str, Any], runtime: Runtime) -> Callable[[Batch], Tensor]:
    """Score with a program; in float32, at the size of pictures that it was made for."""
    size = settings["views"]["crop_size_px"]
    if config.views.crop_size_px != size or config.views.num_crops == 0 or config.eval.class_subset:
        raise ExportedModelError(
            f"{folder / PROGRAM_NAME} must have views.crop_size_px={size}, views.num_crops of 1 or 3 and no "
            "eval.class_subset, which are fixed in a program; export with --format weights for others"
        )
    program = torch.export.load(folder / PROGRAM_NAME)
    if runtime.device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, runtime.device)
    module, names = program.module(), input_names(config.model)

    def score(batch: Batch) -> Tensor:
        """Class scores (N, K) of a batch's views."""
        given = {"frames": batch.frames, "log_mel": batch.log_mel}
        tensors = [value.float() for name in names if (value := given[name]) is not None]
        with torch.inference_mode():
            scores: Tensor = module(*tensors)
        return scores

    return score
