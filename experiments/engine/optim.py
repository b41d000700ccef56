"""SGD as in the paper and the learning rate as a pure function of the step."""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.config import OptimConfig
from kernels.apex_support import ApexError, apex_optimizer, apex_status
from kernels.modules import GhostBatchNorm

APEX_SGD = "FusedSGD"
_NORMS = (GhostBatchNorm, nn.modules.batchnorm._BatchNorm)


class OptimizerError(ValueError):
    """An optimizer that was asked for and is not available here."""


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of one step.

    Half-period cosine lr * (1 + cos(pi * step / total)) / 2, or a staircase; during the warm-up a straight line from
    `warmup_start_lr` to the value that the schedule has *at* the end of the warm-up (SlowFast's rule).

    Source: paper, section 4.1.

    Args:
        config: schedule.
        step: 0-based, in [0, total_steps].
        total_steps: length of the training.

    Returns:
        The rate, float.
    """
    warmup = config.warmup(total_steps)
    if step < warmup:
        end = _schedule(config, warmup, total_steps)
        return config.warmup_start_lr + (end - config.warmup_start_lr) * step / warmup
    return _schedule(config, step, total_steps)


def short_warmup_note(config: OptimConfig, total_steps: int) -> str:
    """Return the note about a warm-up that is shortened, empty where it is as long as asked for."""
    warmup = config.warmup(total_steps)
    if config.warmup_share or warmup == config.warmup_steps:
        return ""
    return (
        f"warm-up shortened from {config.warmup_steps} (optim.warmup_steps) to {warmup} of the training's "
        f"{total_steps} steps; optim.warmup_steps=0 optim.warmup_share=0.1 says so in general"
    )


def _schedule(config: OptimConfig, step: int, total_steps: int) -> float:
    share = step / total_steps
    if config.schedule == "cosine":
        return config.lr * (1.0 + math.cos(math.pi * share)) / 2.0
    return config.lr * config.milestone_factor ** bisect.bisect_right(config.milestones, share)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters into weights (decayed) and normalisation parameters (not decayed).

    Source: paper, section 4.1 ("weight decay 0 on BN").

    Args:
        model: any module.
        weight_decay: >= 0, for everything but scale and shift of normalisation layers.

    Returns:
        Two groups for an optimizer, names included.
    """
    norm_ids = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named if id(p) not in norm_ids]
    norms = [p for _, p in named if id(p) in norm_ids]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """Return SGD over the model's parameters, torch's or NVIDIA apex's.

    Args:
        model: its parameters are on their device already.
        config: backend, momentum, decay.
        fused: one kernel for all (CUDA); apex has no other form.

    Raises:
        OptimizerError: if apex is asked for and absent, another project, broken, or without a CUDA device.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.backend == "apex":
        return _apex_sgd(groups, config, has_cuda=fused)
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None
    )
    return _with_momentum(optimizer)


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer with momentum for every parameter, now and after every checkpoint that lacks some.

    Fused optimizers decide for a whole group whether this is the first step: one that mixes parameters with and
    without momentum fails in torch and forgets momentum in apex. DropPathway makes such groups.
    """
    complete_momentum(optimizer)
    optimizer.register_load_state_dict_post_hook(complete_momentum)
    optimizer.register_load_state_dict_post_hook(_keep_kind)
    return optimizer


def _keep_kind(optimizer: torch.optim.Optimizer) -> None:
    """Undo that a checkpoint from another kind of device brings the form of its optimizer along."""
    for group in optimizer.param_groups:
        if "fused" in optimizer.defaults:
            group["fused"] = optimizer.defaults["fused"]


@torch.no_grad()
def complete_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter without a momentum buffer one of zeros; SGD without dampening only.

    The first step of a parameter sets its momentum to the gradient g, which m * b + g is for b = 0. The zeros are
    negative: -0.0 + g is g bit by bit, 0.0 + g is not where g is -0.0.

    Args:
        optimizer: SGD of torch or apex; changed in place where a group has momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.full_like(parameter, -0.0)


def optimizer_text(config: OptimConfig, *, fused: bool) -> str:
    """Return the optimizer's name for the log, equal on all ranks; arguments as in `build_optimizer`."""
    if config.backend == "apex":
        return f"apex.optimizers.{APEX_SGD} ({apex_status().message})"
    return f"torch.optim.SGD{' (fused)' if fused else ''}"


def _apex_sgd(groups: list[dict[str, object]], config: OptimConfig, *, has_cuda: bool) -> torch.optim.Optimizer:
    if not has_cuda:
        raise OptimizerError(
            "optim.backend (apex) must have a CUDA device and this run has none; use optim.backend=torch"
        )
    try:
        kind = apex_optimizer(APEX_SGD)
    except ApexError as error:
        raise OptimizerError(f"optim.backend (apex): {error}; or use optim.backend=torch") from None
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    try:
        fits = _trial_step(kind, parameters[0].device)
        rates = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
        optimizer: torch.optim.Optimizer = kind(groups, **rates)
    except RuntimeError as error:  # no CUDA extension, or one of another torch, or one that refuses the layout
        raise OptimizerError(
            f"optim.backend (apex): the trial step of {APEX_SGD} failed ({error}); build the current NVIDIA apex with "
            "--cpp_ext and --cuda_ext against this torch, or use optim.backend=torch"
        ) from error
    if not fits:
        raise OptimizerError(
            f"optim.backend (apex): the trial step of {APEX_SGD} must give SGD's result and does not; build the "
            "current NVIDIA apex against this torch, or use optim.backend=torch"
        )
    return _with_momentum(optimizer)


def _trial_step(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Take a step on a weight in the model's layout, which older apex refuses; returns whether it is SGD's step."""
    start = torch.arange(48.0, device=device).view(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    weight = nn.Parameter(start.clone())
    weight.grad = torch.ones_like(start)
    kind([{"params": [weight], "weight_decay": 0.5}], lr=0.25, momentum=0.9).step()  # type: ignore[call-arg]
    return torch.allclose(weight.detach(), start - 0.25 * (1 + 0.5 * start))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint; a learning rate on the device is read."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group.

    Args:
        optimizer: a fused one gets the rate rounded to float32, as which a captured step reads it from the device: the
            results of both are then equal bit by bit.
        rate: of the coming step. Groups whose rate is a tensor keep the tensor and get a new value in it.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(np.float32(rate)) if group.get("fused") else rate
