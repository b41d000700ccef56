"""A trained model as commands name it, looked at before torch is imported: mistakes cost no time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cli.files import near_path
from experiments.cli.strict_yaml import ConfigError
from experiments.config import load_config

CONFIG_NAME, MANIFEST = "config.yaml", "manifest.json"


def check_target(target: Path, overrides: Sequence[str]) -> None:
    """Check what can be said of a run folder, checkpoint folder or configuration file without reading weights.

    Raises:
        ConfigError: nothing there, or settings with mistakes.
    """
    if not target.exists():
        raise ConfigError(
            f"{target} must be a run folder, a checkpoint folder or a configuration file and exist; "
            f"{near_path(target) or 'correct the path'}"
        )
    path = target / CONFIG_NAME if target.is_dir() else target
    if path.is_file() and not (target.parent / MANIFEST).exists():
        load_config(path, overrides, warn=False)
