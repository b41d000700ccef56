"""What a checkpoint holds: its state read from bytes, checked before anything of it is used, and put into a model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments.records.finite import few, not_finite

_MOST_STEPS = 10**12


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


def load_state(data: bytes, name: str) -> dict[str, Any]:
    """Read the bytes of a state file.

    Args:
        data: content.
        name: for messages.

    Raises:
        CheckpointError: if it is no state.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise CheckpointError(no_memory(name, len(data))) from None
    except Exception as error:  # torch raises many types for bad bytes; the reason is kept
        raise CheckpointError(f"checkpoint {name} cannot be read ({_first_line(error)}); use another one") from error
    problem = state_problem(state)
    if problem:
        raise CheckpointError(f"checkpoint {name} {problem}")
    found: dict[str, Any] = state
    return found


def no_memory(name: str, size: int) -> str:
    """Return the message about a checkpoint of `size` bytes that cannot be held.

    Args:
        name: of the checkpoint or its file.
        size: bytes.
    """
    return f"checkpoint {name} ({size / 2**30:.2f} GiB) does not fit into the memory that is free; make room for it"


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in nested mappings and lists: about what their checkpoint takes."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(state_bytes(part) for part in parts)


def state_problem(state: Any) -> str:
    """Return what is wrong with a state that was read from a file, in words; empty if it can be used.

    Args:
        state: of `Run.state`: model, optimizer, scaler, step, data_fingerprint and class_names, each of its type.
    """
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return "holds no model; it must be written by experiments.train"
    for name, value in state["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            return f"holds something else than a tensor as {str(name)[:60]!r} of its model"
    names = state.get("class_names", ())
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return "holds class_names that are no list of texts"
    return ""


def training_problem(state: Mapping[str, Any]) -> str:
    """Return what a state lacks to continue a training with it, in words; empty if it has all.

    Args:
        state: without `state_problem`.
    """
    step, optimizer = state.get("step"), state.get("optimizer")
    if type(step) is not int or not 0 <= step <= _MOST_STEPS:
        return f"has step {str(step)[:20]}, which must be a whole number from 0 on"
    for key, kind in (("data_fingerprint", str), ("scaler", dict), ("optimizer", dict)):
        if not isinstance(state.get(key), kind):
            return f"has no {key}"
    assert isinstance(optimizer, dict)
    if not isinstance(optimizer.get("state"), dict) or not isinstance(optimizer.get("param_groups"), list):
        return "has an optimizer without state and param_groups"
    guard = state.get("guard")
    if guard is not None and (not isinstance(guard, Tensor) or guard.shape != (2, 2)):
        return "has a guard that is no tensor (2, 2)"
    return ""


def optimizer_problem(saved: Mapping[str, Any], own: Mapping[str, Any], parameters: list[Tensor]) -> str:
    """Return how the state of an optimizer differs from what the model's has, in words; empty if it fits.

    Args:
        saved: its state_dict in the checkpoint, see `training_problem`.
        own: that of the optimizer of this run.
        parameters: of this run, in the order of the optimizer.
    """
    groups = [g.get("params") if isinstance(g, dict) else None for g in saved["param_groups"]]
    expected = [g["params"] for g in own["param_groups"]]
    if groups != expected:
        counts = [len(g) if isinstance(g, list) else 0 for g in groups]
        return f"optimizer groups of {counts} parameters must be {[len(g) for g in expected]}"
    for index, held in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(held, dict):
            return f"optimizer state of parameter {str(index)[:20]} must be one of {len(parameters)}"
        for key, value in held.items():
            shape = parameters[index].shape
            if isinstance(value, Tensor) and value.shape != shape:
                return f"{str(key)[:40]} of parameter {index} {tuple(value.shape)} must be {tuple(shape)}"
            if key != "momentum_buffer" or not (value is None or isinstance(value, Tensor)):
                return f"{str(key)[:40]} of parameter {index} must be momentum_buffer, a tensor"
    return ""


def require_finite_weights(state: Mapping[str, Tensor], name: str) -> None:
    """Check that weights can be used.

    Args:
        state: of a model.
        name: of the checkpoint.

    Raises:
        CheckpointError: weights or statistics that are nan or inf, with their names.
    """
    bad = not_finite(state)
    if bad:
        raise CheckpointError(
            f"checkpoint {name} must hold finite weights and statistics, but {len(bad)} of {len(state)} tensors are "
            f"not ({few(bad)}): the training had diverged; name an earlier checkpoint, or train with a lower optim.lr"
        )


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights and buffers if keys and shapes agree exactly.

    Args:
        model: target.
        state: its state_dict.
        name: of the checkpoint.

    Raises:
        CheckpointError: listing what differs.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} must be {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        parts = [(f"{len(missing)} keys missing", missing), (f"{len(extra)} keys too many", extra), ("shapes", shapes)]
        shown = "; ".join(
            f"{title}: {', '.join(items[:3])}{' ...' if len(items) > 3 else ''}" for title, items in parts if items
        )
        raise CheckpointError(
            f"checkpoint {name} is of another model ({shown}); use the configuration it was trained with"
        )
    wrong = [k for k in own if state[k].dtype.is_floating_point != own[k].dtype.is_floating_point]
    if wrong:
        raise CheckpointError(f"checkpoint {name} holds other types of numbers than the model ({few(wrong)})")
    model.load_state_dict(dict(state))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
