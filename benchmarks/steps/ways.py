"""The ways to run one training step that `benchmarks.step` compares, and the step itself.

One step is forward under autocast, cross entropy, backward and fused SGD with momentum on synthetic inputs, taken by
the code that training runs (`experiments.engine`). Opponents run `benchmarks.steps.plain_model`; ours is
`model.build_model` with the fused operations. A graph holds the whole step and is captured after cuDNN has chosen its
algorithms.

Legend: N clips, T frames, H W pixels, M audio frames, F mel bins.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps.plain_model import NormView, build_plain
from experiments.config import OptimConfig
from experiments.engine.graphs import WARM_UP_STEPS, CapturedStep, CudaCapturer
from experiments.engine.optim import build_optimizer
from experiments.engine.step import StepInputs, TrainingStep, task_loss
from experiments.tasks.classification import Classification
from model.avslowfast import build_model
from model.config import ModelConfig
from model.convolutions import Grouping, set_grouping
from model.output import ModelOutput
from model.pixel_groups import with_four_channels


@dataclass(frozen=True)
class Way:
    """One way to run a step.

    Args:
        ours: the project's model with fused operations; else the plain one.
        view: how batch normalisation of the plain model sees a visual map.
        channels_last: layout of the plain model; else NCDHW.
        compiled: mode of torch.compile, or None.
        graph: the whole step as one CUDA graph.
        grouping: of narrow convolutions of our model.
    """

    ours: bool = False
    view: NormView = "5-D"
    channels_last: bool = True
    compiled: str | None = None
    graph: bool = False
    grouping: Grouping = "auto"


WAYS: dict[str, Way] = {
    "fused graph": Way(ours=True, graph=True),
    "fused": Way(ours=True),
    "fused graph, plain convolutions": Way(ours=True, graph=True, grouping="off"),
    "eager 4-D": Way(view="4-D"),
    "pyslowfast": Way(channels_last=False),
    "eager 5-D": Way(),
    "eager 4-D graph": Way(view="4-D", graph=True),
    "compile eager": Way(compiled="default"),
    "compile eager reduce-overhead": Way(compiled="reduce-overhead"),
    "compile fused": Way(ours=True, compiled="default"),
    "compile fused reduce-overhead": Way(ours=True, compiled="reduce-overhead"),
}


@dataclass(frozen=True)
class Inputs:
    """Frames (N, 3, alpha T, H, W) channels_last_3d, log-mel (N, 1, M, F) or None without audio, labels (N,)."""

    frames: Tensor
    log_mel: Tensor | None
    labels: Tensor


def synthetic_batch(
    config: ModelConfig, clips: int, pixels: int, device: str, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Normal inputs on the device.

    Args:
        config: of the model.
        clips: N.
        pixels: H = W.
        device: "cpu" or "cuda".
        dtype: of frames; log-mels are float32, or float64 with float64 frames.
    """
    frames = torch.randn(clips, 3, config.num_fast_frames, pixels, pixels, device=device)
    frames = frames.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    log_mel = None
    if config.has_audio:
        log_mel = torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, device=device)
        log_mel = log_mel.double() if dtype == torch.float64 else log_mel
    return Inputs(frames, log_mel, torch.randint(config.num_classes, (clips,), device=device))


def logits_of(output: Any) -> Tensor:
    """The class scores or logits of whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    assert isinstance(output, ModelOutput)
    return output.values


class AsModel(nn.Module):
    """A plain model behind the interface of ours: what the training step calls.

    Args:
        plain: returns logits (N, K) for frames and a log-mel or None.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(
        self,
        frames: Tensor,
        log_mel: Tensor | None = None,
        *,
        negative_log_mel: Tensor | None = None,
        drop_audio: bool = False,
    ) -> ModelOutput:
        """Classify clips, with the audio or without."""
        assert negative_log_mel is None, "the plain model has no synchronization loss"
        return ModelOutput(self.plain(frames, None if drop_audio else log_mel), "logits")


class Trainee:
    """A model in one way, and the step that training takes with it (`experiments.engine`).

    Args:
        way: how.
        config: of the model.
        inputs: of every step.
        dtype: of autocast; float32 leaves it off.
    """

    def __init__(self, way: Way, config: ModelConfig, inputs: Inputs, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.way, self.device = way, inputs.frames.device
        config = replace(config, sync_loss="none")
        frames = inputs.frames if way.ours or way.channels_last else inputs.frames.contiguous()
        if way.ours:
            model: nn.Module = build_model(replace(config, backend="fused"))
            set_grouping(model, way.grouping)
            if self.device.type == "cuda":  # as the loader gives them
                frames = with_four_channels(frames, frames.dtype)[:, :3]
        else:
            model = AsModel(build_plain(config, view=way.view, channels_last=way.channels_last))
        self.model = model.to(self.device).train()
        self.inputs = StepInputs(frames, inputs.log_mel, None, inputs.labels)
        forward: Any = self.model
        if way.compiled:
            mode = None if way.compiled == "default" else way.compiled
            forward = torch.compile(self.model, dynamic=False, mode=mode)
        kind = self.device.type
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3), fused=kind == "cuda")
        self.eager = TrainingStep(
            forward,
            self.optimizer,
            torch.amp.GradScaler(kind, enabled=dtype == torch.float16),
            task_loss(Classification(tuple(map(str, range(config.num_classes))))),
            lambda: torch.autocast(kind, dtype, enabled=dtype != torch.float32),
        )
        self.captured = CapturedStep(self.eager, CudaCapturer(self.device), required=True) if way.graph else None

    def step(self, audio: bool) -> None:
        """Run one step, launch by launch, with the audio kept or dropped."""
        if self.way.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        self.eager(self.inputs, drop_audio=not audio)

    def stepper(self, audio: bool) -> Callable[[], None]:
        """A function that runs one step, ready to be timed: compiled, algorithms chosen, captured."""
        captured = self.captured
        if captured is None:
            for _ in range(WARM_UP_STEPS):
                self.step(audio)
            return lambda: self.step(audio)

        def replay() -> None:
            """Copy the inputs in and run the graph."""
            captured(self.inputs, drop_audio=not audio)

        for _ in range(WARM_UP_STEPS + 1):
            replay()
        assert ("with audio" if audio else "without audio") in captured.captured
        return replay

    def close(self) -> None:
        """Give back graphs and memory."""
        if self.captured is not None:
            self.captured.close()
        self.__dict__.clear()


@contextlib.contextmanager
def trainee(way: str, config: ModelConfig, inputs: Inputs, dtype: torch.dtype) -> Iterator[Trainee]:
    """A trainee; its memory and its compiled code are given back at the end.

    Args:
        way: of `WAYS`.
        config: of the model.
        inputs: of every step.
        dtype: of autocast.
    """
    made = Trainee(WAYS[way], config, inputs, dtype)
    try:
        yield made
    finally:
        made.close()
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def ways_here(device: str, fused: bool, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that a device runs: no graphs on the CPU, ours where the fused operations are built."""

    def runs(way: Way) -> bool:
        """Whether this device can."""
        graphs = way.graph or way.compiled == "reduce-overhead"
        return not (device == "cpu" and graphs) and (fused or not way.ours)

    return tuple(name for name in names if runs(WAYS[name]))
