"""runs/<name>/: one folder a run, used by one process group at a time, continued or moved aside, never overwritten."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from experiments.config import Config, config_digest, differing_keys, load_config, resolved_yaml
from pipeline.store.durable import BusyError, move_folder, take_lock, write_file

CONFIG_NAME, SUMMARY_NAME, EVALUATIONS_NAME, LOCK_NAME = "config.yaml", "summary.json", "evaluations.json", ".lock"


class RunFolderError(ValueError):
    """A run folder that does not fit the configuration, or is in use."""


def check_run_folder(config: Config) -> None:
    """Check, without writing anything, that the run folder is absent or can be continued.

    Raises:
        RunFolderError: if it holds another configuration (naming the keys that differ) or is no run folder.
    """
    folder = config.run_dir
    if config.train.fresh or not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG_NAME).exists():
        raise RunFolderError(f"run folder ({folder}) must be absent, empty or a run; choose another name or output_dir")
    old = load_config(folder / CONFIG_NAME)
    if config_digest(old) != config_digest(config):
        listed = "; ".join(differing_keys(config, old)[:8])
        raise RunFolderError(
            f"run folder ({folder}) holds a run with another configuration ({listed}); "
            "use the old values, another name=..., or train.fresh=true to move the old run aside and start again"
        )


def open_run_folder(config: Config) -> IO[str]:
    """Make or take over the run folder and write the resolved configuration into it.

    Returns:
        The lock file, to be kept open while the run lasts.

    Raises:
        RunFolderError: if another process uses it.
    """
    folder = config.run_dir
    if config.train.fresh and folder.exists():
        with _take_lock(folder):
            move_folder(folder, folder.with_name(f"{folder.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"))
    make_folder(folder, f"run folder ({folder})", "choose another output_dir or name")
    lock = _take_lock(folder)
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, fresh=False))
    write_file(folder / CONFIG_NAME, resolved_yaml(kept))
    return lock


def make_folder(folder: Path, name: str, remedy: str) -> None:
    """Make a folder and those above it.

    Args:
        folder: may be there already.
        name: what the message calls it.
        remedy: what the message ends with.

    Raises:
        RunFolderError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{name} must be a folder that can be made ({error.strerror}); {remedy}") from None


def _take_lock(folder: Path) -> IO[str]:
    try:
        return take_lock(folder / LOCK_NAME)
    except BusyError as error:
        raise RunFolderError(
            f"run folder ({folder}) is in use by process {error.holder}; wait, or choose another name=..."
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"run folder ({folder}) must be writable ({error.strerror}); choose another output_dir or name"
        ) from None


def strict_json(value: Any) -> str:
    """Return JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """Return the evaluations that a run recorded so far.

    Args:
        folder: of the run.

    Returns:
        Step -> metrics, nan where a metric was not finite; empty if there was none.
    """
    path = folder / EVALUATIONS_NAME
    if not path.exists():
        return {}
    return {
        int(step): {name: math.nan if value is None else value for name, value in metrics.items()}
        for step, metrics in json.loads(path.read_text(encoding="utf-8")).items()
    }


def record_evaluation(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add an evaluation to evaluations.json, in place of an earlier one of the same step.

    Args:
        folder: of the run.
        step: steps done.
        metrics: name -> value.
    """
    known = {**read_evaluations(folder), step: dict(metrics)}
    write_file(folder / EVALUATIONS_NAME, strict_json({str(s): known[s] for s in sorted(known)}))


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what summary.json holds; empty if there is none or it cannot be read."""
    try:
        found = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    write_file(folder / SUMMARY_NAME, strict_json(summary))
