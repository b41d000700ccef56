"""What a checkpoint's state must look like before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MOST_STEPS = 10**12


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
