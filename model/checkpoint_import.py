"""Released SlowFast weights into the visual pathways: PySlowFast's .pkl and .pyth files, pytorchvideo's state dicts.

The names in the files are those that PySlowFast's and pytorchvideo's documentation and model zoos use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.avslowfast import AVSlowFast
from model.checkpoint_files import CheckpointImportError, read_tensors
from model.checkpoint_names import file_names


@dataclass(frozen=True)
class ImportReport:
    """What an import did: every tensor of the model and of the file is in exactly one of these."""

    path: str
    format: str  # "caffe2", "pyslowfast" or "pytorchvideo"
    loaded: tuple[str, ...]  # names in the model
    kept: dict[str, str]  # model's name -> why it was not loaded
    unused: dict[str, str]  # file's name -> why it was not used

    def __str__(self) -> str:
        """Several lines for a log."""
        lines = [f"{self.path} ({self.format}): {len(self.loaded)} tensors loaded"]
        lines += [f"  kept as it was: {name} ({why})" for name, why in self.kept.items()]
        lines += [f"  not used from the file: {name} ({why})" for name, why in self.unused.items()]
        return "\n".join(lines)


def import_weights(model: AVSlowFast, path: Path | str, *, classifier: bool = True) -> ImportReport:
    """Load released visual weights into a model; nothing is changed unless every tensor fits.

    Released weights were trained with `slow_frame_sampling: linspace` and laterals after pool1, res2, res3 and res4.

    Args:
        model: as `build_model` made it, with visual pathways; audio, its laterals and synchronization keep their
            weights.
        path: .pkl (caffe2 blobs) or .pyth / .pth (PyTorch), told apart by their content.
        classifier: also load the last fc; False for another number of classes.
    Returns:
        what was loaded, what not, and why.
    Raises:
        CheckpointImportError: unreadable or hostile file, missing tensors, other shapes, values that are no finite
            floating-point numbers, negative variances (all differences are listed); a model without these layers.
    """
    path = Path(path)
    if not model.config.has_visual:
        raise CheckpointImportError(
            f"pathways {model.config.pathways} must include slow and fast to take {path}; "
            "import into a model with visual pathways"
        )
    tensors = read_tensors(path)
    kind = detect_format(tensors, path)
    names = dict(file_names(model.config, kind))
    state = model.state_dict()
    absent = [name for name in names if name not in state]
    if absent:
        raise CheckpointImportError(
            f"the model has no {absent[0]} ({len(absent)} such tensors) to take {path}; "
            "import into what build_model made, before it is folded, compiled or wrapped"
        )
    wanted: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in state:
        if name.endswith("num_batches_tracked"):
            continue
        if name not in names:
            kept[name] = "released SlowFast weights have no audio and no synchronization"
        elif name.startswith("head.classifier") and not classifier:
            kept[name] = "classifier=False"
        else:
            wanted[name] = names[name]
    values, problems = _match(state, wanted, tensors)
    if problems:
        raise CheckpointImportError(
            f"{path} ({kind}) does not fit this model; differences ({len(problems)}):\n  "
            + "\n  ".join(problems)
            + "\nuse a config of the same depth, width, laterals and number of classes (or classifier=False), "
            "and a file whose numbers are sound"
        )
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    used = set(wanted.values())
    unused = {name: _why_unused(name, names, classifier) for name in tensors if name not in used}
    return ImportReport(str(path), kind, tuple(values), kept, unused)


def _match(
    state: Mapping[str, Tensor], wanted: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    values: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, source in wanted.items():
        target = tuple(state[name].shape)
        value = tensors.get(source)
        if value is None:
            problems.append(f"{name}: the file has no {source}")
            continue
        shape = tuple(value.shape)
        padded = shape + (1,) * (len(target) - len(shape))  # caffe2 leaves trailing 1s out, or keeps some for the fc
        if padded == target or (shape[: len(target)] == target and set(shape[len(target) :]) <= {1}):
            values[name] = value.to(state[name].dtype).reshape(target)
            problems += [f"{name}: {source} {why}" for why in _unsuited(name, value.dtype, values[name])]
        else:
            problems.append(f"{name}: {source} has shape {shape}, the model {target}")
    return values, problems


def _unsuited(name: str, dtype: torch.dtype, value: Tensor) -> list[str]:
    """What is wrong with a tensor's numbers, as the model would hold them."""
    if not dtype.is_floating_point:
        return [f"has type {dtype}, not floating point"]
    if not value.isfinite().all():
        return [f"has {int((~value.isfinite()).sum())} values that are not finite in {value.dtype}"]
    if name.endswith("running_var") and (value < 0).any():
        return [f"has negative variances, down to {value.min().item():.3g}"]
    return []


def _why_unused(name: str, names: Mapping[str, str], classifier: bool) -> str:
    if name.endswith("num_batches_tracked"):
        return "counter"
    if name.endswith("_momentum") or name in ("lr", "model_iter"):
        return "optimizer state"
    return "classifier=False" if name in names.values() and not classifier else "this model has no such layer"


def detect_format(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Which of the three namings a file uses.

    Raises:
        CheckpointImportError: none of them.
    """
    marks = {"caffe2": "conv1_w", "pyslowfast": "s1.pathway0_stem.conv.weight"}
    marks["pytorchvideo"] = "blocks.0.multipathway_blocks.0.conv.weight"
    for kind, mark in marks.items():
        if mark in tensors:
            return kind
    raise CheckpointImportError(
        f"{path} holds none of {', '.join(marks.values())}: it must be PySlowFast's or pytorchvideo's SlowFast"
    )
