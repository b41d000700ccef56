"""SGD as in the paper and the learning rate as a pure function of the step."""

from __future__ import annotations

import bisect
import math

import torch
from torch import nn

from experiments.config import OptimConfig
from kernels.modules import GhostBatchNorm

_NORMS = (GhostBatchNorm, nn.modules.batchnorm._BatchNorm)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of one step.

    Half-period cosine lr * (1 + cos(pi * step / total)) / 2, or a staircase; during the first `warmup_steps` a straight
    line from `warmup_start_lr` to the value that the schedule has *at* the end of the warm-up (SlowFast's rule).

    Args: config: schedule; step: 0-based, in [0, total_steps]; total_steps: length of the training.
    Returns the rate, float. Raises ValueError if the warm-up is longer than the training.
    Source: paper, section 4.1.
    """
    if config.warmup_steps > total_steps:
        raise ValueError(
            f"optim.warmup_steps ({config.warmup_steps}) must be at most the training's {total_steps} steps; lower it"
        )
    if step < config.warmup_steps:
        end = _schedule(config, config.warmup_steps, total_steps)
        return config.warmup_start_lr + (end - config.warmup_start_lr) * step / config.warmup_steps
    return _schedule(config, step, total_steps)


def _schedule(config: OptimConfig, step: int, total_steps: int) -> float:
    share = step / total_steps
    if config.schedule == "cosine":
        return config.lr * (1.0 + math.cos(math.pi * share)) / 2.0
    return config.lr * config.milestone_factor ** bisect.bisect_right(config.milestones, share)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters into weights (decayed) and normalisation parameters (not decayed).

    Args: model: any module; weight_decay: >= 0, for everything but scale and shift of normalisation layers.
    Returns two groups for an optimizer, names included. Source: paper, section 4.1 ("weight decay 0 on BN").
    """
    norm_ids = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named if id(p) not in norm_ids]
    norms = [p for _, p in named if id(p) in norm_ids]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.SGD:
    """Return SGD over the model's parameters.

    Args: model: its parameters are on their device already; config: momentum, decay; fused: one kernel for all (CUDA).
    """
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
