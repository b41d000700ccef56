"""Learning rate against hand-computed values; which parameters decay."""

import itertools
import math

import pytest
import torch
from torch import nn

from experiments.config import OptimConfig
from experiments.engine.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    short_warmup_note,
)
from kernels.modules import GhostBatchNorm


def test_cosine_half_period() -> None:
    config = OptimConfig(lr=1.6)
    assert learning_rate(config, 0, 100) == 1.6
    assert learning_rate(config, 50, 100) == pytest.approx(0.8)
    assert learning_rate(config, 100, 100) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(config, 25, 100) == pytest.approx(1.6 * (1 + math.cos(math.pi / 4)) / 2)


def test_warmup_ends_at_the_cosine_there() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=20, warmup_start_lr=0.1)
    end = (1 + math.cos(math.pi * 0.2)) / 2
    assert learning_rate(config, 0, 100) == 0.1
    assert learning_rate(config, 10, 100) == pytest.approx((0.1 + end) / 2)
    assert learning_rate(config, 20, 100) == pytest.approx(end)
    steps = [learning_rate(config, s, 100) for s in range(15, 25)]
    assert max(abs(b - a) for a, b in itertools.pairwise(steps)) < 0.05  # no jump


def test_staircase() -> None:
    config = OptimConfig(lr=1.0, schedule="steps", milestones=(0.5, 0.75), milestone_factor=0.1)
    rates = [learning_rate(config, s, 100) for s in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("steps", "share", "total", "warmup"),
    [(20, 0.0, 40, 20), (20, 0.0, 39, 3), (8000, 0.0, 300, 30), (5, 0.0, 4, 0), (0, 0.1, 300, 30), (0, 0.5, 3, 1)],
)
def test_warmup_fits_the_training(steps: int, share: float, total: int, warmup: int) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=steps, warmup_share=share)
    assert config.warmup(total) == warmup
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert rates.index(max(rates)) == warmup
    note = short_warmup_note(config, total)
    assert (f"shortened from {steps} (optim.warmup_steps) to {warmup} of the training's {total}" in note) == (
        steps > total / 2
    )


def test_only_normalisation_is_free_of_decay() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), GhostBatchNorm(2), nn.Linear(2, 3), nn.BatchNorm1d(3))
    groups = parameter_groups(model, 1e-4)
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0]
    assert [sum(p.numel() for p in g["params"]) for g in groups] == [2 + 6 + 3, 4 + 6]  # type: ignore[attr-defined]


def test_sgd_step_is_the_papers() -> None:
    linear = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    optimizer = build_optimizer(linear, OptimConfig(lr=9.0, momentum=0.9, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for expected in (1 - 0.1 * 2.5, 0.75 - 0.1 * (0.9 * 2.5 + 2 + 0.5 * 0.75)):
        linear.weight.grad = torch.tensor([[2.0]])
        optimizer.step()
        assert linear.weight.item() == pytest.approx(expected)
