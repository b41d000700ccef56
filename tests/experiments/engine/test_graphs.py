"""A captured run is the eager run bit by bit: many steps, continued in the middle, other shapes, failures."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.config import Config, OptimConfig, RuntimeConfig
from experiments.engine.graph_rules import GraphError, graph_obstacle
from experiments.engine.graphs import (
    MAX_FORWARD_SHAPES,
    WARM_UP_STEPS,
    CapturedForward,
    CapturedStep,
    CaptureError,
    Capturer,
    CudaCapturer,
)
from experiments.engine.guard import StepGuard
from experiments.engine.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from experiments.engine.precision import autocast, channels_last
from experiments.engine.step import StepInputs, TrainingStep, task_loss
from experiments.runtime import Runtime, seed_step
from experiments.tasks import make_task
from model.avslowfast import AVSlowFast, build_model
from model.drop_pathway import should_drop
from model.variants import VARIANTS
from pipeline.batch import empty_frames
from tests.experiments.support.recording import RecordingCapturer

pytestmark = pytest.mark.integration  # starts processes or trains

STEPS = {"cpu": 26, "cuda": 50}
STOP = {"cpu": 13, "cuda": 23}  # both kinds of step are captured by then
OPTIM = OptimConfig(lr=0.02, momentum=0.9, weight_decay=1e-3, warmup_steps=5, max_grad_norm=2.0)
CUDA = pytest.mark.needs_cuda
EVERYWHERE = [
    ("cpu", "fp32"), ("cpu", "bf16"),
    *(pytest.param("cuda", p, marks=CUDA) for p in ("fp32", "bf16", "fp16")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def same_algorithms() -> Iterator[None]:
    """Convolutions of both ways sum in the same order."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def capturer(device: str) -> Any:
    """What captures on a device; the CPU's stand-in records."""
    return RecordingCapturer() if device == "cpu" else CudaCapturer(torch.device("cuda", torch.cuda.current_device()))


def clips(config: Any, device: str, step: int, count: int) -> StepInputs:
    """Noise that differs from step to step, a third of it without sound; on a GPU with four channels in memory, half
    precision, as the loader's."""
    generator = torch.Generator().manual_seed(step)
    size = 32 if device == "cpu" else 64
    frames = torch.randn(count, 3, config.num_fast_frames, size, size, generator=generator)
    dtype = torch.float32 if device == "cpu" else torch.float16
    laid_out = empty_frames((count, config.num_fast_frames, size, size), dtype, device, pad_channels=device != "cpu")
    mel = torch.randn(count, 1, config.num_mel_frames, config.num_mel_bins, generator=generator).to(device)
    labels = torch.randint(config.num_classes, (count,), generator=generator).to(device)
    sound, other = (torch.rand(2, count, generator=generator) < 2 / 3).to(device)
    return StepInputs(laid_out.copy_(frames), mel, mel.flip(0), labels, has_audio=sound, has_negative=other)


class Training:
    """A training that can be stopped and continued."""

    def __init__(self, device: str, precision: str, captures: Capturer | None, **changes: Any) -> None:
        torch.manual_seed(0)
        small = {"num_classes": 4, "width": 8, "num_frames": 2 if device == "cpu" else 4, "pool_window": 1}
        losses: dict[str, Any] = {"sync_loss": "contrastive", "dropout_rate": 0.5, "clips_per_bn_group": 2}
        config = dataclasses.replace(VARIANTS["small"], **(small | losses | changes))
        self.device, self.captures = device, captures
        self.model: AVSlowFast = channels_last(build_model(config).to(device))
        self.optimizer = build_optimizer(self.model, OPTIM, fused=True)
        # On the CPU scaled by hand, to have the scaler's work in the graph there too; the first steps overflow.
        scale = 2.0**127 if device == "cpu" else 2.0**16
        enabled = precision == "fp16" or (device, precision) == ("cpu", "fp32")
        self.scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=7, enabled=enabled)
        self.guard = StepGuard(self.model, spike_ratio=100.0, scaled=enabled)
        self.precision = precision
        self.losses: list[float] = []
        self.step = 0
        self.take: Any = None

    def begin(self) -> None:
        task = make_task("classification", ("a", "b", "c", "d"))
        step = TrainingStep(
            self.model, self.optimizer, self.scaler, task_loss(task),
            lambda: autocast(torch.device(self.device), self.precision), max_grad_norm=OPTIM.max_grad_norm,
            guard=self.guard,
        )  # fmt: skip
        self.take = step if self.captures is None else CapturedStep(step, self.captures, required=True)

    def run(self, until: int, count: int = 4) -> "Training":
        """Take steps as the training loop does."""
        if self.take is None:
            self.begin()
        while self.step < until:
            seed_step(3, self.step, 0)
            set_learning_rate(self.optimizer, learning_rate(OPTIM, self.step, STEPS[self.device]))
            inputs = clips(self.model.config, self.device, self.step, count)
            loss = self.take(inputs, drop_audio=should_drop(3, self.step, 0.5))
            self.losses.append(loss.total.item())
            self.step += 1
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = {"model": self.model.state_dict(), "optimizer": optimizer_state(self.optimizer)}
        state |= {"guard": self.guard.state()}
        return copy.deepcopy(state | {"scaler": self.scaler.state_dict(), "step": self.step, "losses": self.losses})

    def load(self, state: dict[str, Any]) -> "Training":
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.load(state["guard"])
        self.step, self.losses = state["step"], list(state["losses"])
        return self


def require_equal(a: Training, b: Training) -> None:
    """Losses, weights, running statistics, momentum and scale are the same, bit by bit."""
    assert a.losses == b.losses
    assert a.scaler.state_dict() == b.scaler.state_dict()
    assert torch.equal(a.guard.usual, b.guard.usual)
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    momenta = [[t.optimizer.state[p]["momentum_buffer"] for p in t.model.parameters()] for t in (a, b)]
    for x, y in zip(*momenta, strict=True):
        assert torch.equal(x, y)
    assert all(torch.isfinite(x).all() for x in a.model.parameters())


@pytest.mark.integration
@pytest.mark.parametrize(("device", "precision"), EVERYWHERE)
def test_steps_and_a_resume_are_the_eager_ones(device: str, precision: str) -> None:
    count, steps = 4 if device == "cpu" else 16, STEPS[device]
    eager = Training(device, precision, None).run(steps, count)
    captured = Training(device, precision, capturer(device)).run(STOP[device], count)
    assert captured.take.captured == ("with audio", "without audio")
    resumed = Training(device, precision, capturer(device)).load(captured.state()).run(steps, count)
    captured.run(steps, count)
    require_equal(eager, captured)
    require_equal(eager, resumed)
    assert len(set(eager.losses)) == steps
    captured.take.close()
    assert captured.take.captured == ()


def test_capture_comes_after_the_warm_up_of_its_kind_and_executes_nothing() -> None:
    captures = RecordingCapturer()
    training = Training("cpu", "bf16", captures)
    drops = [should_drop(3, step, 0.5) for step in range(12)]
    for step in range(12):
        training.run(step + 1, 2)
        counts = [sum(d == kind for d in drops[: step + 1]) for kind in (True, False)]
        assert captures.captures == sum(count > WARM_UP_STEPS for count in counts)
        assert captures.replays == sum(max(0, count - WARM_UP_STEPS) for count in counts)
        assert training.take.warming_up == (counts[not drops[step]] <= WARM_UP_STEPS + 1)


def test_losses_outlive_the_next_step() -> None:
    training = Training("cpu", "fp32", RecordingCapturer()).run(12, 2)
    inputs = clips(training.model.config, "cpu", 1, 2)
    first = training.take(inputs, drop_audio=False)
    before = first.total.clone(), first.per_clip.clone(), first.parts["top1"].clone()
    training.take(clips(training.model.config, "cpu", 2, 2), drop_audio=False)
    assert torch.equal(first.total, before[0])
    assert torch.equal(first.per_clip, before[1])
    assert torch.equal(first.parts["top1"], before[2])


def test_another_shape_runs_eagerly_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    captures = RecordingCapturer()
    training, eager = Training("cpu", "bf16", captures).run(12, 4), Training("cpu", "bf16", None).run(12, 4)
    replays = captures.replays
    with caplog.at_level(logging.INFO):
        for t in (training, eager):
            t.run(14, 2).run(16, 4)
    assert captures.replays == replays + 2
    assert sum("runs without CUDA graph" in r.message for r in caplog.records) == 1
    require_equal(training, eager)


def test_failed_capture_goes_on_without_or_stops(caplog: pytest.LogCaptureFixture) -> None:
    captures, eager = RecordingCapturer(), Training("cpu", "fp32", None).run(12, 2)
    captures.fail = True
    with pytest.raises(CaptureError, match=r"cannot be captured as a CUDA graph .* use runtime.cuda_graph=off"):
        Training("cpu", "fp32", captures).run(12, 2)
    training = Training("cpu", "fp32", captures)
    training.begin()
    training.take._required = False
    with caplog.at_level(logging.WARNING):
        training.run(12, 2)
    assert sum("runs without CUDA graph: its capture failed" in r.message for r in caplog.records) == 2
    assert captures.replays == 0
    require_equal(training, eager)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_reading_a_value_in_the_step_fails_its_capture_and_the_run_goes_on(device: str) -> None:
    training = Training(device, "bf16", capturer(device))
    training.begin()
    training.take._required = False
    loss_function = training.take.step.loss_function

    def reading(outputs: Any, inputs: StepInputs) -> Any:
        loss = loss_function(outputs, inputs)
        assert loss.total.item() > 0
        return loss

    training.take.step.loss_function = reading
    training.run(12, 4)
    assert training.take.captured == ()
    require_equal(training, Training(device, "bf16", None).run(12, 4))


class Scaled(nn.Module):
    """A model that is told apart by its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))
        self.calls = 0

    def forward(self, frames: Tensor | None, log_mel: Tensor | None) -> Tensor:
        self.calls += 1
        assert log_mel is not None
        return log_mel * self.weight


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_forward_is_captured_by_shape(device: str) -> None:
    model = Scaled().to(device)
    forward = CapturedForward(model, capturer(device), lambda out: out)
    for count in range(1, MAX_FORWARD_SHAPES + 3):
        results = []
        for turn in range(4):
            x = torch.full((count, 2), float(turn), device=device)
            results.append((forward(None, x), 2 * x))
        assert all(torch.equal(a, b) for a, b in results)
    assert model.calls == MAX_FORWARD_SHAPES * 2 + 2 * 4  # one eager and one captured of each, then eager ones


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_captured_forward_is_told_which_clips_have_sound(device: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(VARIANTS["small"], width=8, num_frames=2, pool_window=1)
    model = channels_last(build_model(config).to(device)).eval()
    forward = CapturedForward(model, capturer(device), lambda out: out.scores)
    for step in range(4):
        given = clips(config, device, step, 3)
        found = forward(given.frames, given.log_mel, has_audio=given.has_audio)
        with torch.no_grad():
            expected = model(given.frames, given.log_mel, has_audio=given.has_audio).scores
            deaf = model(given.frames, given.log_mel).scores
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if device == "cpu" else 1e-5)
        assert given.has_audio is not None
        assert torch.equal((deaf != expected).any(1), ~given.has_audio)


def runtime(kind: str = "cuda", world_size: int = 1) -> Runtime:
    return Runtime(0, world_size, 0, torch.device(kind))


def change(**sections: dict[str, Any]) -> Config:
    config = Config()
    return dataclasses.replace(config, **{s: dataclasses.replace(getattr(config, s), **v) for s, v in sections.items()})


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (change(model={"activation_checkpointing": True}), "activation_checkpointing"),
        (change(model={"head": "detection"}), "boxes"),
        (change(optim={"backend": "apex"}), "apex"),
        (change(debug={"sync_warnings": True}), "sync_warnings"),
        (change(runtime={"cuda_graph": "off"}), "off"),
    ],
)
def test_obstacles_are_named(config: Config, word: str) -> None:
    assert word in graph_obstacle(config, runtime())
    wanted = dataclasses.replace(config, runtime=RuntimeConfig(cuda_graph="on"))
    if word != "off":
        with pytest.raises(GraphError, match=rf"runtime.cuda_graph \(on\) cannot be: .*{word}"):
            graph_obstacle(wanted, runtime())


def test_nothing_hinders_the_usual_run_on_a_gpu() -> None:
    assert graph_obstacle(Config(), runtime()) == ""
    assert graph_obstacle(Config(), runtime("cpu")) == "there is no CUDA device"
