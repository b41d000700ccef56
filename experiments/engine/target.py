"""A trained model as commands name it, looked at before torch is imported: mistakes cost no time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cli.files import near_path, read_json_file
from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config, load_config
from pipeline.config import data_path_problem

CONFIG_NAME, MANIFEST = "config.yaml", "manifest.json"
_SIGNS = (  # of a run, a checkpoint, an export, or a folder of several, whose names are then told
    CONFIG_NAME, MANIFEST, "inputs.json", "model.*", "checkpoints", "best", "step-*", "*/checkpoints",
)  # fmt: skip


def check_target(target: Path, overrides: Sequence[str]) -> None:
    """Check what can be said of a run folder, checkpoint folder or configuration file without reading weights.

    Raises:
        ConfigError: nothing there, nothing of a model (such as a folder of videos), or settings with mistakes.
    """
    if not target.exists():
        inside = Path("runs") / target
        near = f"did you mean {inside}?" if inside.is_dir() else near_path(target)
        raise ConfigError(
            f"{target} must be a run folder, a checkpoint folder or a configuration file and exist; "
            f"{near or 'correct the path'}"
        )
    no_model = target.is_dir() and not any(any(target.glob(sign)) for sign in _SIGNS)
    if no_model or (target.is_file() and not (target.parent / MANIFEST).exists() and _is_binary(target)):
        raise ConfigError(
            f"{target} must be a run folder, a checkpoint folder or a configuration file, and holds nothing of a "
            "model; name one first, such as runs/quickstart"
        )
    path = target / CONFIG_NAME if target.is_dir() else target
    if path.is_file() and not (target.parent / MANIFEST).exists():
        load_config(path, overrides, warn=False)


def unfinished_note(target: Path) -> str:
    """Return a sentence about a run whose training is not finished, "" for any other target.

    Args:
        target: that exists.
    """
    try:
        summary = read_json_file(target / "summary.json")
    except (OSError, ValueError):  # no run, or one without: nothing is known
        return ""
    if not isinstance(summary, dict) or summary.get("finished") is not False:
        return ""
    return (
        f"note: the training in {target} is not finished (step {summary.get('steps')} of {summary.get('total_steps')})"
    )


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(1 << 12)


def check_data_path(config: Config) -> None:
    """Check that there is a folder where `data.path` says that there is one.

    Raises:
        ConfigError: there is none; a similar name beside it is told.
    """
    path = config.data.path
    if problem := data_path_problem(path):
        near = near_path(Path(path)) if path and not Path(path).exists() else ""
        raise ConfigError(f"{problem}; {near}" if near else problem)
