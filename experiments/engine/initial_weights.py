"""Weights that a training starts from: a run of ours, an exported model, or released SlowFast weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.cli.files import near_path, read_json_file
from experiments.engine.data import name_differences
from experiments.engine.weight_parts import REASONS, forbidden, fresh_parts, part_of
from experiments.records.checkpoint import BEST, MANIFEST, find_checkpoint, list_checkpoints, what_to_name
from experiments.records.state import CheckpointError, require_finite_weights
from model.avslowfast import AVSlowFast
from model.checkpoint_import import import_weights
from model.export import read_model

RELEASED_SUFFIXES = (".pkl", ".pyth", ".pth", ".pt")
HEAD, CLASSIFIER, COUNTER = "head.", "head.classifier.", "num_batches_tracked"
FACTS_NAME = "inputs.json"  # what experiments.export writes beside every form of a model
_SHOWN = 5  # names of a folder in a message
log = logging.getLogger(__name__)


def load_initial_weights(model: AVSlowFast, path: Path, class_names: Sequence[str] = ()) -> list[str]:
    """Copy weights into a fresh model, all or nothing; what only the task decides may differ.

    The head (`head.*`) is taken where its shape fits and stays as initialised elsewhere; its classifier stays as
    initialised too where the source is known to have other classes. Non-local blocks, audio and synchronization stay as
    initialised where the source has nothing of them (`weight_parts`). Everything else of the model must be in the
    source with the same shape; the source may hold more (synchronization, another head).

    Args:
        model: on any device; changed in place.
        class_names: of the training to come; empty = unknown.
        path: run folder (its best checkpoint), checkpoint folder, folder of `experiments.export`, or a file of released
            SlowFast weights (.pkl, .pyth, .pth, .pt), which go into the visual pathways.
    Returns:
        sentences for the log: what was loaded, what was not, and why.
    Raises:
        CheckpointError: nothing there, or weights of another model, with the differences.
        CheckpointImportError, ExportError: a file that cannot be read.
    """
    check_source(path)
    if path.is_file():
        return str(import_weights(model, path, classifier=False)).splitlines()
    source: Mapping[str, Tensor]
    if (path / "config.json").exists():
        _, source = read_model(path)
        name, trained = str(path), _exported_names(path)
    else:
        checkpoint = find_checkpoint(path)
        state = checkpoint.load()
        source, name, trained = state["model"], str(checkpoint.path), tuple(state.get("class_names", ()))
    return copy_weights(model, source, name, name_differences(class_names, trained) if class_names and trained else "")


def check_source(path: Path) -> None:
    """Raise CheckpointError unless weights may be in a file or folder, by its name and what lies there."""
    if path.is_file() and (path.parent / MANIFEST).exists():
        raise CheckpointError(f"train.init_from ({path}) must be a checkpoint folder{what_to_name(path)}")
    if path.suffix.lower() in RELEASED_SUFFIXES and path.is_file():
        return
    if not path.is_dir():
        raise CheckpointError(
            f"train.init_from ({path}) must be a run folder, a checkpoint folder, an exported model or a file of "
            f"released weights ({' '.join(RELEASED_SUFFIXES)}); {near_path(path) or 'correct the path'}"
        )
    if not (path / "config.json").exists() and not _holds_checkpoints(path):
        raise CheckpointError(_nothing_to_start_from(path))


def _holds_checkpoints(path: Path) -> bool:
    """Whether a folder is a checkpoint, or a run that has one (which may be damaged)."""
    folder = path / "checkpoints"
    return (path / MANIFEST).exists() or (folder / BEST).is_dir() or bool(list_checkpoints(folder))


def _nothing_to_start_from(path: Path) -> str:
    """Return the message about a folder without weights: what it holds, what is expected, and what to name instead."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    holds = f"holds {', '.join(names[:_SHOWN])}{more}" if names else "is empty"
    expected = (
        f"a run folder (with checkpoints/), a checkpoint folder (with {MANIFEST}) or a folder that experiments.export "
        "wrote (with config.json)"
    )
    released = [name for name in names if name.lower().endswith(RELEASED_SUFFIXES)]
    if (path / "checkpoints").is_dir() or {"config.yaml", "log.txt"} <= set(names):
        remedy = ". It is a run that has saved no checkpoint: continue it first, or name another one"
    elif released:
        remedy = f". For released weights name the file: {path / released[0]}"
    else:
        remedy = what_to_name(path)
    return f"train.init_from ({path}) must be {expected}, but {holds}{remedy}"


def _exported_names(folder: Path) -> tuple[str, ...]:
    """Return the class names that experiments.export wrote beside the weights; empty if it did not."""
    path = folder / FACTS_NAME
    try:
        found = read_json_file(path)
    except FileNotFoundError:
        return ()
    except ValueError as error:
        log.warning("%s is damaged (%s): the names of its classes are not compared", path, error)
        return ()
    names = found.get("class_names") if isinstance(found, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def copy_weights(model: AVSlowFast, source: Mapping[str, Tensor], name: str, other_classes: str = "") -> list[str]:
    """Copy a state dict of the same family into a model; see `load_initial_weights`.

    Args:
        model: changed in place.
        source: names -> tensors.
        name: of the source, for messages.
        other_classes: how its classes differ, in words, empty = the same or unknown.

    Returns:
        Sentences for the log.

    Raises:
        CheckpointError: listing what is missing, has another shape or is not finite.
    """
    own = model.state_dict()
    fits = [
        k
        for k in own
        if k in source and source[k].shape == own[k].shape and not (other_classes and k.startswith(CLASSIFIER))
    ]
    fresh = sorted(own.keys() - set(fits))
    parts = fresh_parts([k for k in fresh if not k.startswith(HEAD)], source, model.config)
    wrong = parts.pop("", [])
    if wrong or not any(not k.startswith(HEAD) for k in fits):
        raise _other_model(model, source, name, wrong)
    require_finite_weights({key: source[key] for key in fits}, f"{name} (train.init_from)")
    with torch.no_grad():
        for key in fits:
            own[key].copy_(source[key])
    counted = sum(not k.endswith(COUNTER) for k in fits)
    lines = [f"starting from {name}: {counted} tensors loaded"]
    if other_classes:
        lines.append(f"  the classifier starts afresh, the classes are others: {other_classes}")
    for part, keys in sorted(parts.items()):
        learned = sum(not k.endswith(COUNTER) for k in keys)
        lines.append(f"  as initialised: {part}, {learned} tensors: {REASONS[part]}")
    lines += [f"  as initialised: {k}" for k in fresh if k.startswith(HEAD)]
    left = sorted(source.keys() - set(fits) - set(fresh))
    if left:
        groups = sorted({k.split(".")[0] for k in left})
        lines.append(f"  not used: {len(left)} tensors of {', '.join(groups)}")
    return lines


def _other_model(model: AVSlowFast, source: Mapping[str, Tensor], name: str, wrong: Sequence[str]) -> CheckpointError:
    """Return the error about weights of another model, with the first differences and what forbids a fresh part."""
    own = model.state_dict()
    shown = "; ".join(
        f"{k} {tuple(source[k].shape)} must be {tuple(own[k].shape)}" if k in source else f"{k} is missing"
        for k in wrong[:5]
    )
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    reasons = sorted(
        {r for k in wrong if (part := part_of(k, model.config)[0]) and (r := forbidden(part, model.config))}
    )
    why = f"; {'; '.join(reasons)}" if reasons else ""
    return CheckpointError(
        f"train.init_from ({name}) is of another model ({shown or 'no tensor in common'}{more}{why}); "
        "use the same pathways, depth, widths, fusion and laterals in both"
    )
