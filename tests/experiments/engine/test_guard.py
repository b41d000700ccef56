"""A bad step changes nothing: bit by bit the training without it, launch by launch and captured, on every rank."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.engine.gradients import GradientAverage
from experiments.engine.guard import BAD, FINE, StepGuard
from experiments.engine.loss_window import MOST_IN_A_ROW, LossWindow, TrainingFailure
from experiments.engine.optim import OptimConfig, build_optimizer
from experiments.engine.step import StepInputs, TrainingStep, task_loss
from experiments.runtime import Runtime
from experiments.tasks import StepLoss, make_task
from kernels.modules import GhostBatchNorm
from model.output import ModelOutput
from tests.experiments.support.recording import RecordingCapturer
from tests.experiments.tasks.test_tasks import batch

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


class Small(nn.Module):
    """A convolution with running statistics, and a classifier; called as the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 4, 1), GhostBatchNorm(4, clips_per_group=2)
        self.classifier = nn.Linear(4, 3)

    def forward(self, frames: Tensor, log_mel: Any, **_: Any) -> ModelOutput:
        x = self.conv(frames).contiguous(memory_format=torch.channels_last_3d)
        return ModelOutput(self.classifier(self.norm(x, relu=True).mean((2, 3, 4))), "logits")


def inputs(step: int, device: str) -> StepInputs:
    generator = torch.Generator().manual_seed(step)
    frames = torch.randn(4, 3, 2, 4, 4, generator=generator).to(device)
    return StepInputs(frames, None, None, torch.arange(4, device=device) % 3)


class Steps:
    """A training of `Small`."""

    def __init__(self, device: str, *, fused: bool = True, spike_ratio: float = 0.0, clip: float = 0.0) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = Small().to(device)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=0.05, weight_decay=1e-3), fused=fused)
        self.guard = StepGuard(self.model, spike_ratio=spike_ratio)
        average = GradientAverage(self.model.parameters(), 1)
        self.step = TrainingStep(
            self.model, self.optimizer, torch.amp.GradScaler(device, enabled=False),
            task_loss(make_task("classification", ("a", "b", "c"))),
            lambda: torch.autocast(device, enabled=False), max_grad_norm=clip, average=average, guard=self.guard,
        )  # fmt: skip
        self.step.exchange = lambda packed: None  # type: ignore[method-assign]

    def take(self, given: StepInputs) -> float:
        self.step(given, drop_audio=False)
        return self.guard.verdict.item()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


def no_input(given: StepInputs) -> None:
    """One value of one clip is nan."""
    assert given.frames is not None
    given.frames[1, 0, 0, 0, 0] = math.nan


def huge_input(given: StepInputs) -> None:
    """The variance overflows: loss and gradients are finite, the running variance is not."""
    assert given.frames is not None
    given.frames.mul_(1e25)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spoil", [no_input, huge_input])
@pytest.mark.parametrize(("fused", "clip"), [(True, 0.0), (True, 0.5), (False, 0.0)])
def test_a_bad_step_leaves_no_trace(device: str, spoil: Callable[[StepInputs], None], fused: bool, clip: float) -> None:
    if device == "cuda" and not fused:
        pytest.skip("on CUDA the optimizer is fused")
    whole, without = (Steps(device, fused=fused, clip=clip) for _ in range(2))
    for step in range(12):
        given = inputs(step, device)
        if step in (0, 4, 5, 11):
            spoil(given)
            before = whole.state()
            assert whole.take(given) == BAD
            torch.testing.assert_close(whole.state(), before, rtol=0, atol=0)
        else:
            assert whole.take(given) == without.take(given) == FINE
    torch.testing.assert_close(whole.state(), without.state(), rtol=0, atol=0)
    assert torch.equal(whole.guard.usual, without.guard.usual)


def test_without_guard_the_fault_is_there() -> None:
    steps = Steps("cpu")
    steps.step.guard = None
    given = inputs(0, "cpu")
    huge_input(given)
    steps.step(given, drop_audio=False)
    assert not steps.model.norm.running_var.isfinite().all()
    assert all(p.isfinite().all() for p in steps.model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_far_above_the_usual_is_a_spike(fused: bool) -> None:
    steps = Steps("cpu", fused=fused, spike_ratio=20.0)
    assert steps.take(inputs(0, "cpu")) == FINE
    for step in range(1, 30):
        assert steps.take(inputs(step, "cpu")) == FINE, step
    usual, before = steps.guard.usual.clone(), steps.state()
    loss_function = steps.step.loss_function
    steps.step.loss_function = lambda outputs, given: _scaled(loss_function(outputs, given), 1000.0)
    assert steps.take(inputs(30, "cpu")) == BAD
    assert torch.equal(steps.guard.usual, usual)
    torch.testing.assert_close(steps.state(), before, rtol=0, atol=0)
    steps.step.loss_function = loss_function
    assert steps.take(inputs(31, "cpu")) == FINE
    assert steps.guard.usual[0, 1].item() == 31


def _scaled(loss: StepLoss, factor: float) -> StepLoss:
    return StepLoss(loss.total * factor, loss.per_clip, loss.parts)


def test_the_guard_never_reads_on_the_host() -> None:
    """The stand-in for CUDA graphs refuses host reads, and a decision of the host would be frozen by it."""
    steps, eager = Steps("cpu", spike_ratio=20.0), Steps("cpu", spike_ratio=20.0)
    held = inputs(0, "cpu")
    assert held.frames is not None
    steps.take(held)  # momentum is there, as after the warm-up
    eager.take(inputs(0, "cpu"))
    replay = RecordingCapturer().capture(lambda: steps.step(held, drop_audio=False))
    for step in range(1, 8):
        given = inputs(step, "cpu")
        if step in (2, 5):
            no_input(given)
        held.frames.copy_(given.frames)
        replay()
        assert steps.guard.verdict.item() == eager.take(given) == (BAD if step in (2, 5) else FINE)
    torch.testing.assert_close(steps.state(), eager.state(), rtol=0, atol=0)


def loss(value: float) -> StepLoss:
    per_clip = torch.tensor([1.0, value])
    return StepLoss(per_clip.mean(), per_clip, {"top1": torch.tensor(0.5)})


def test_skipped_steps_are_counted_named_and_not_in_the_means(caplog: pytest.LogCaptureFixture) -> None:
    window, labels = LossWindow(ALONE, "skip"), torch.tensor([0, 0])
    window.add(3, loss(2.0), batch(labels).ids, torch.tensor(0.0))
    window.add(4, loss(math.nan), batch(labels).ids, torch.tensor(1.0))
    window.add(5, loss(4.0), batch(labels).ids, torch.tensor(1.0))  # gradients, or a spike
    window.add(6, loss(3.0), batch(labels).ids, torch.tensor(2.0))  # fp16's scaler
    assert window.close() == {"loss": 1.75, "top1": 0.5, "steps_skipped": 2.0, "scaler_skips": 1.0}
    assert "step 4 is left out: loss must be finite and is not, for the clips clip1" in caplog.text
    assert "step 5 is left out: gradients must be finite, and no spike (optim.spike_ratio), for" in caplog.text
    window.add(7, loss(math.nan), batch(labels).ids, torch.tensor(1.0))
    assert window.close() == {"steps_skipped": 1.0}


def test_gradients_that_are_not_finite_end_a_training() -> None:
    window = LossWindow(ALONE)
    window.add(5, loss(4.0), batch(torch.tensor([0, 0])).ids, torch.tensor(1.0))
    with pytest.raises(TrainingFailure, match=r"gradients at step 5 must be finite, .* for the clips clip0, clip1;"):
        window.close()


def test_a_run_that_only_skips_ends() -> None:
    window = LossWindow(ALONE, "skip")
    for step in range(MOST_IN_A_ROW - 1):
        window.add(step, loss(math.nan), batch(torch.tensor([0, 0])).ids, torch.tensor(1.0))
        window.close()
    window.add(MOST_IN_A_ROW, loss(math.nan), batch(torch.tensor([0, 0])).ids, torch.tensor(1.0))
    with pytest.raises(TrainingFailure, match="50 steps in a row, up to step 50, were left out"):
        window.close()
