"""Weights that a training starts from: a run of ours, an exported model, or released SlowFast weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from experiments.checkpoint import CheckpointError, find_checkpoint
from model.avslowfast import AVSlowFast
from model.checkpoint_import import import_weights
from model.export import read_model

RELEASED_SUFFIXES = (".pkl", ".pyth", ".pth", ".pt")
HEAD, COUNTER = "head.", "num_batches_tracked"


def load_initial_weights(model: AVSlowFast, path: Path) -> list[str]:
    """Copy weights into a fresh model, all or nothing; what only the task decides may differ.

    The classifier (`head.*`) is taken where its shape fits and stays as initialised elsewhere. Everything else of the
    model must be in the source with the same shape; the source may hold more (synchronization, another head).

    Args:
        model: on any device; changed in place.
        path: run folder (its best checkpoint), checkpoint folder, folder of `experiments.export`, or a file of released
            SlowFast weights (.pkl, .pyth, .pth, .pt), which go into the visual pathways.
    Returns:
        sentences for the log: what was loaded, what was not, and why.
    Raises:
        CheckpointError: nothing there, or weights of another model, with the differences.
        CheckpointImportError, ExportError: a file that cannot be read.
    """
    if path.suffix.lower() in RELEASED_SUFFIXES and path.is_file():
        return str(import_weights(model, path, classifier=False)).splitlines()
    if not path.is_dir():
        raise CheckpointError(
            f"train.init_from ({path}) must be a run folder, a checkpoint folder, an exported model or a file of "
            f"released weights ({' '.join(RELEASED_SUFFIXES)}); correct the path"
        )
    source: Mapping[str, Tensor]
    if (path / "config.json").exists():
        _, source = read_model(path)
        name = str(path)
    else:
        checkpoint = find_checkpoint(path)
        source, name = checkpoint.load()["model"], str(checkpoint.path)
    return copy_weights(model, source, name)


def copy_weights(model: AVSlowFast, source: Mapping[str, Tensor], name: str) -> list[str]:
    """Copy a state dict of the same family into a model; see `load_initial_weights`.

    Args: model: changed in place; source: names -> tensors; name: of the source, for messages.
    Returns sentences for the log. Raises CheckpointError listing what is missing or has another shape.
    """
    own = model.state_dict()
    fits = [k for k in own if k in source and source[k].shape == own[k].shape]
    fresh = sorted(own.keys() - set(fits))
    wrong = [k for k in fresh if not k.startswith(HEAD)]
    if wrong or not any(not k.startswith(HEAD) for k in fits):
        shown = "; ".join(
            f"{k} {tuple(source[k].shape)} must be {tuple(own[k].shape)}" if k in source else f"{k} is missing"
            for k in wrong[:5]
        )
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"train.init_from ({name}) is of another model ({shown or 'no tensor in common'}{more}); "
            "use the same pathways, depth, widths, fusion and laterals in both"
        )
    with torch.no_grad():
        for key in fits:
            own[key].copy_(source[key])
    counted = sum(not k.endswith(COUNTER) for k in fits)
    lines = [f"starting from {name}: {counted} tensors loaded"]
    lines += [f"  as initialised: {k}" for k in fresh]
    left = sorted(source.keys() - set(fits) - set(fresh))
    if left:
        groups = sorted({k.split(".")[0] for k in left})
        lines.append(f"  not used: {len(left)} tensors of {', '.join(groups)}")
    return lines
