"""Running statistics of norms that run twice a step: updated together, one batch."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import running
from kernels.layout import KernelInputError
from kernels.modules import (
    GhostBatchNorm,
    joint_statistics_update,
    set_backend,
)
from tests.kernels.support.cases import assert_close, draw
from tests.kernels.support.norms import BACKENDS, DEVICES

pytestmark = pytest.mark.usefixtures("auto_backend")


class Twice(nn.Module):
    """Two norms, one of which runs twice with different inputs, one under activation checkpointing."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint, self.first, self.second = joint, GhostBatchNorm(6), GhostBatchNorm(6, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        with joint_statistics_update() if self.joint else contextlib.nullcontext():
            y = checkpoint(self.first, x, use_reentrant=False)
            with joint_statistics_update():  # a model inside a model leaves it to the outer one
                return self.second(self.first(y * 2 + 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_joint_update_equals_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    set_backend(name)
    calls: list[int] = []
    fold = running._fold
    monkeypatch.setattr(running, "_fold", lambda norms, stats: (calls.append(len(norms)), fold(norms, stats)))
    states = []
    for joint in (False, True):
        model = Twice(joint).to(device)
        for seed in range(2):
            model(draw((8, 6, 2, 3, 3), torch.float32, seed, device).requires_grad_()).sum().backward()
        states.append(model.state_dict())
    assert calls == [1, 1, 1] * 2 + [1, 1] * 2  # joint: by momentum (0.1, 0.3), both runs of the first norm together
    assert [state["first.num_batches_tracked"].item() for state in states] == [4, 2]
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items() if key.startswith("second"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_both_runs_of_a_norm_are_one_batch(name: str, device: str) -> None:
    set_backend(name)
    twice, once = (GhostBatchNorm(4, clips_per_group=8).to(device) for _ in range(2))
    first, second = (draw((8, 4, 2, 3, 3), torch.float32, seed, device) * (1 + seed) + 3 * seed for seed in range(2))
    with joint_statistics_update():
        twice(first)
        twice(second)
    once(torch.cat([first, second]).contiguous(memory_format=torch.channels_last_3d))
    assert_close(twice.running_mean, once.running_mean, "mean", 1e-6)
    assert_close(twice.running_var, once.running_var, "variance", 1e-6)
    assert twice.num_batches_tracked.item() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_joint_update_is_one_call_and_an_error_drops_it(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls: list[int] = []
    fold = running._fold
    monkeypatch.setattr(running, "_fold", lambda norms, stats: (calls.append(len(norms)), fold(norms, stats)))
    layers = nn.Sequential(*(GhostBatchNorm(4) for _ in range(5))).to(device)
    x = draw((8, 4, 2, 3, 3), torch.float32, device=device)
    with joint_statistics_update():
        layers(x)
        assert not calls
    assert calls == [5]
    wrong = nn.Sequential(layers, GhostBatchNorm(2).to(device))  # fails after five norms

    def run() -> None:
        with joint_statistics_update():
            wrong(x)

    with pytest.raises(KernelInputError):
        run()
    assert calls == [5]
    assert {layer.num_batches_tracked.item() for layer in layers} == {1}
    layers(x)
    assert calls == [5, 1, 1, 1, 1, 1]
