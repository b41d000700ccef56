"""A trained model as commands name it: run folder, checkpoint folder or configuration file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config, load_config
from experiments.engine.precision import channels_last
from experiments.records.checkpoint import MANIFEST, Checkpoint, find_checkpoint, what_to_name
from experiments.records.run_folder import CONFIG_NAME, other_config
from experiments.records.state import load_model_state, require_finite_weights
from experiments.tasks.consistency import check_consistency
from model.avslowfast import AVSlowFast, build_model


def load_target(target: Path, which: str, overrides: Sequence[str]) -> tuple[Config, Checkpoint]:
    """Return configuration (with overrides) and checkpoint that a command names; see `find_checkpoint`.

    Raises:
        ConfigError: for a path that holds nothing fitting, settings that do not fit each other, or a `model.variant`
            (the weights have one).
    """
    if target.is_dir():
        for text in overrides:
            if text.partition("=")[0].strip() == "model.variant":
                raise ConfigError(
                    f"override ({text}) must not be given: the weights are of the run's variant; leave it out"
                )
        checkpoint = find_checkpoint(target, which)
        path = target / CONFIG_NAME if (target / CONFIG_NAME).exists() else checkpoint.path / CONFIG_NAME
        if edited := other_config(path, load_config(path), checkpoint.path):
            raise ConfigError(edited)
        config = load_config(path, overrides)
    else:
        if not target.exists() or (target.parent / MANIFEST).exists():
            hint = what_to_name(target) if target.exists() else " and exist; correct the path"
            raise ConfigError(f"{target} must be a run folder, a checkpoint folder or a configuration file{hint}")
        config = load_config(target, overrides)
        checkpoint = find_checkpoint(config.run_dir, which)
        config = config.with_num_classes(load_config(checkpoint.path / CONFIG_NAME).model.num_classes)
    check_consistency(config)
    return config, checkpoint


def load_model(config: Config, checkpoint: Checkpoint, device: torch.device) -> AVSlowFast:
    """Return the trained model in evaluation mode on a device.

    Raises:
        CheckpointError: for one of another model, or whose weights are not finite.
    """
    model, weights = build_model(config.model), checkpoint.load()["model"]
    load_model_state(model, weights, str(checkpoint.path))
    require_finite_weights(weights, str(checkpoint.path))
    return channels_last(model.to(device)).eval()
