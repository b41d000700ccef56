"""runs/<name>/: one folder a run, used by one process group at a time, continued or moved aside, never overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from experiments.cli.files import read_json, read_regular
from experiments.config import Config, config_digest, differing_keys, load_config, resolved_yaml
from experiments.records.checkpoint import has_own_config, list_checkpoints, newest_valid
from experiments.records.failures import FOLDER as FAILURES
from experiments.records.launch import LAUNCH_NAME, record_launch
from experiments.records.sealed import NewerVersionError, SealError, read_sealed, sealed_json, strict_json
from experiments.records.spool import SPOOL_NAME, read_metrics
from experiments.records.writing import write_failure
from pipeline.store.durable import BusyError, beside, move_folder, take_lock, write_file

CONFIG_NAME, SUMMARY_NAME, EVALUATIONS_NAME, LOCK_NAME = "config.yaml", "summary.json", "evaluations.json", ".lock"
_EVALUATIONS, _EVALUATIONS_VERSION = "avsf-evaluations", 2
_MOST_BYTES = 1 << 28  # of a file of records
_LAST_SECTION = "debug"  # of a resolved configuration: a file without it is torn
log = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """A run folder that does not fit the configuration, or is in use."""


def check_run_folder(config: Config) -> None:
    """Check, without writing anything, that the run folder is absent or can be continued.

    Raises:
        RunFolderError: if it holds another configuration (naming the keys that differ), one that its checkpoints were
            not trained with, or is no run folder.
    """
    folder = config.run_dir
    if config.train.fresh or not folder.exists() or _only_begun(folder):
        return
    if not (folder / CONFIG_NAME).exists() and not (folder / "checkpoints").is_dir():
        raise RunFolderError(f"run folder ({folder}) must be absent, empty or a run; choose another name or output_dir")
    old = recorded_config(folder)
    checkpoints = (path for _, path in list_checkpoints(folder / "checkpoints") if has_own_config(path))
    newest = next(checkpoints, None)
    if old is not None and newest is not None:
        edited = other_config(folder / CONFIG_NAME, old, newest)
        if edited:
            raise RunFolderError(edited)
    if old is not None and config_digest(old) != config_digest(config):
        listed = "; ".join(differing_keys(config, old)[:8])
        raise RunFolderError(
            f"run folder ({folder}) holds a run with another configuration ({listed}); "
            f"use the old values, another name=... (train.init_from={folder} starts it from these weights), or "
            "train.fresh=true to move the old run aside and start again"
        )


def other_config(path: Path, config: Config, checkpoint: Path) -> str:
    """Return how a run's config.yaml differs, in what decides weights or scores, from its checkpoint's copy; or empty.

    The copy has a digest, the file of the run has none: it may have been damaged, or edited between two starts.

    Args:
        path: of the file.
        config: that it holds.
        checkpoint: a checkpoint folder.
    """
    copy = checkpoint / CONFIG_NAME
    if copy == path:
        return ""
    written = load_config(copy)
    if config_digest(config) == config_digest(written):
        return ""
    listed = "; ".join(differing_keys(config, written)[:8])
    return (
        f"{path} must hold what {checkpoint} was trained with, but differs ({listed}); copy {copy} over it, and give "
        "settings that differ on the command line"
    )


def _only_begun(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a start writes before the configuration: it was killed there."""
    own = {
        LOCK_NAME,
        LAUNCH_NAME,
        FAILURES,
        *(beside(Path(name), "partial").name for name in (LAUNCH_NAME, CONFIG_NAME)),
    }
    return all(path.name in own for path in folder.iterdir())


def recorded_config(folder: Path) -> Config | None:
    """Return the configuration of the run in a folder; a torn one is taken from the newest valid checkpoint.

    Args:
        folder: of the run.

    Returns:
        None where it is torn and no checkpoint has it: nothing was trained then.

    Raises:
        ConfigError: it is whole and cannot be read. CheckpointError: it is torn, and every checkpoint is damaged.
    """
    path = folder / CONFIG_NAME
    try:
        whole = f"\n{_LAST_SECTION}:" in read_regular(path, _MOST_BYTES).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        whole = False
    if whole:
        return load_config(path)
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is None:
        log.warning("%s is torn (a power cut?) and there is no checkpoint: it is written anew", path)
        return None
    log.warning("%s is torn (a power cut?): it is rebuilt from %s", path, checkpoint.path)
    return load_config(checkpoint.path / CONFIG_NAME)


def open_run_folder(config: Config, agents: list[str]) -> IO[str]:
    """Make or take over the run folder, and write the resolved configuration into that of a run that begins.

    One that is continued keeps what it has until its state is loaded (`renew_config`): a start that is refused, such as
    one with other data, changes nothing.

    Args:
        config: of the run.
        agents: of this launch, see `experiments.records.launch`.

    Returns:
        The lock file, to be kept open while the run lasts.

    Raises:
        RunFolderError: if another process uses it, or it cannot be written.
    """
    folder = config.run_dir
    if config.train.fresh and folder.exists():
        with _take_lock(folder):
            move_folder(folder, folder.with_name(f"{folder.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"))
    make_folder(folder, f"run folder ({folder})", "choose another output_dir or name")
    lock = _take_lock(folder)
    try:
        record_launch(folder, agents)
        if not list_checkpoints(folder / "checkpoints"):
            write_config(config)
    except OSError as error:
        if config.train.fresh or recorded_config(folder) is None:
            lock.close()
            raise RunFolderError(f"{write_failure(error, folder / CONFIG_NAME)}; make room, start again") from None
        log.warning("%s; training goes on", write_failure(error, folder))
    return lock


def renew_config(config: Config) -> None:
    """Write the resolved configuration of a run whose state is loaded; without room the old one stays, with a warning.

    Args:
        config: of the run.
    """
    try:
        write_config(config)
    except OSError as error:
        log.warning("%s; training goes on", write_failure(error, config.run_dir / CONFIG_NAME))


def write_config(config: Config) -> None:
    """Write the resolved configuration into the run folder.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, fresh=False))
    write_file(config.run_dir / CONFIG_NAME, resolved_yaml(kept))


def recreate_run_folder(config: Config, agents: list[str]) -> IO[str]:
    """Make the folder of a running training again, which somebody deleted.

    Args:
        config: of the run.
        agents: of this launch.

    Returns:
        The lock file, as of `open_run_folder`.

    Raises:
        OSError: it cannot be made. RunFolderError: another process has taken the name.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(config.run_dir)
    record_launch(config.run_dir, agents)
    write_config(config)
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


def read_evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """Return the evaluations that a run recorded so far; a damaged or missing file is rebuilt from the metrics.

    Args:
        folder: of the run.

    Returns:
        Step -> metrics, nan where a metric was not finite; empty if there was none.

    Raises:
        RunFolderError: the file is whole and of a later version.
    """
    path = folder / EVALUATIONS_NAME
    try:
        return _evaluations_of(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        rebuilt = _evaluations_in_metrics(folder, only_passed=True)
        if not rebuilt:
            return {}
        reason = "is missing"
    except NewerVersionError as error:
        raise RunFolderError(f"{path}: {error}; use the code that wrote it") from None
    except (ValueError, OSError) as error:
        rebuilt = _evaluations_in_metrics(folder, only_passed=False)
        reason = f"is damaged ({error.strerror if isinstance(error, OSError) else error}; a power cut?)"
    found = f"with step {', '.join(map(str, sorted(rebuilt)))}" if rebuilt else "which has none"
    log.warning("%s %s: it is rebuilt from %s, %s", path, reason, folder / SPOOL_NAME, found)
    with contextlib.suppress(OSError):  # whoever only reads needs no file; recording tries again and tells
        write_file(path, _evaluations_text(rebuilt))
    return rebuilt


def _evaluations_of(data: bytes) -> dict[int, dict[str, float]]:
    """Return what an evaluations.json holds; one of version 1 has neither version nor seal, only steps.

    Raises:
        ValueError: it is not what was written.
    """
    try:
        content = read_sealed(data, _EVALUATIONS, _EVALUATIONS_VERSION)
    except SealError as error:
        try:
            content = read_json(data)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not all(step.isdecimal() for step in content):
            raise error from None  # whatever damage hides the seal leaves a key that is no step
    found: dict[int, dict[str, float]] = {}
    for step, metrics in content.items():
        if not isinstance(metrics, dict) or not all(type(v) in (int, float, type(None)) for v in metrics.values()):
            raise ValueError(f"step {step[:20]} must hold numbers by name")
        found[int(step)] = {name: math.nan if value is None else float(value) for name, value in metrics.items()}
    return found


def _evaluations_in_metrics(folder: Path, *, only_passed: bool) -> dict[int, dict[str, float]]:
    """Return the evaluations that metrics.jsonl holds.

    Args:
        folder: of the run.
        only_passed: only those after which the training went on: the last one may have been cut off before `best` was
            marked, and is then done again.
    """
    series = read_metrics(folder / SPOOL_NAME)
    last = max(series.get("train/loss", ([-1], []))[0])
    found: dict[int, dict[str, float]] = {}
    for name, (steps, values) in series.items():
        if name.startswith("val/") and name != "val/loss" and not name.startswith("val/samples_"):
            for step, value in zip(steps, values, strict=True):
                if step < last or not only_passed:
                    found.setdefault(step, {})[name.removeprefix("val/")] = value
    return found


def record_evaluations(folder: Path, results: Mapping[int, Mapping[str, float]]) -> None:
    """Add evaluations to evaluations.json, in place of earlier ones of the same steps.

    Args:
        folder: of the run.
        results: steps done -> name -> value.
    """
    write_file(folder / EVALUATIONS_NAME, _evaluations_text({**read_evaluations(folder), **results}))


def _evaluations_text(known: Mapping[int, Mapping[str, float]]) -> str:
    content = {str(step): {name: float(value) for name, value in known[step].items()} for step in sorted(known)}
    return sealed_json(_EVALUATIONS, _EVALUATIONS_VERSION, content)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what summary.json holds; empty if there is none, or (with a warning) if it cannot be read."""
    path = folder / SUMMARY_NAME
    try:
        found = read_json(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        found = error
    if not isinstance(found, dict):
        log.warning("%s is torn: its times and counts begin anew", path)
        return {}
    return found


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    write_file(folder / SUMMARY_NAME, strict_json(summary))
