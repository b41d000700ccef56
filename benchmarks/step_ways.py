"""The ways to run one training step that `benchmarks.step` compares, and the step itself.

One step is forward under autocast, cross entropy, backward and fused SGD with momentum on synthetic inputs. Opponents
run `benchmarks.plain_model`; ours is `model.build_model` with the fused operations. A graph holds the whole step and is
captured after cuDNN has chosen its algorithms.

Legend: N clips, T frames, H W pixels, M audio frames, F mel bins.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_model import NormView, build_plain
from model.avslowfast import build_model
from model.config import ModelConfig
from model.convolutions import Grouping, set_grouping
from model.output import ModelOutput
from model.pixel_groups import four_channels, with_four_channels

WARM_UP_STEPS = 3  # before a capture and before timing


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


def whole_memory(frames: Tensor) -> Tensor:
    """Frames with their fourth channel where memory has one: what is copied in one piece."""
    parent = four_channels(frames)
    return frames if parent is None else parent


def own_copy(frames: Tensor) -> Tensor:
    """A copy of frames in the same layout, a fourth channel in memory included."""
    parent = four_channels(frames)
    return frames.clone() if parent is None else parent.clone()[:, :3]


class Trainee:
    """A model and its optimizer in one way.

    Args:
        way: how.
        config: of the model.
        inputs: of every step.
        dtype: of autocast; float32 leaves it off.
    """

    def __init__(self, way: Way, config: ModelConfig, inputs: Inputs, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.way, self.dtype = way, dtype
        self.device = inputs.frames.device.type
        config = replace(config, sync_loss="none")
        if way.ours:
            model: nn.Module = build_model(replace(config, backend="fused"))
            set_grouping(model, way.grouping)
        else:
            model = build_plain(config, view=way.view, channels_last=way.channels_last)
        self.model = model.to(self.device).train()
        frames = inputs.frames if way.ours or way.channels_last else inputs.frames.contiguous()
        if way.ours and self.device == "cuda":  # as the loader gives them
            frames = with_four_channels(frames, frames.dtype)[:, :3]
        self.source = replace(inputs, frames=frames)
        self.given = self.source
        self.run: Any = self.model
        if way.compiled:
            mode = None if way.compiled == "default" else way.compiled
            self.run = torch.compile(self.model, dynamic=False, mode=mode)
        self.optimizer = self._optimizer()
        self._pool: Any = None
        self._stream: Any = None

    def _optimizer(self) -> torch.optim.Optimizer:
        """SGD with its rate on the device and its momentum there from the start, as a capture needs them."""
        cuda = self.device == "cuda"
        rate: Any = torch.tensor(1e-3, device="cuda") if cuda else 1e-3
        optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, fused=cuda or None)
        for parameter in self.model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def step(self, audio: bool) -> None:
        """Run one step, launch by launch, with the audio kept or dropped."""
        if self.way.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        given = self.given
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            output = self.run(given.frames, given.log_mel if audio else None)
            loss = nn.functional.cross_entropy(logits_of(output), given.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def stepper(self, audio: bool) -> Callable[[], None]:
        """A function that runs one step, ready to be timed: compiled, algorithms chosen, captured."""
        if not self.way.graph:
            for _ in range(WARM_UP_STEPS):
                self.step(audio)
            return lambda: self.step(audio)
        return self._captured(audio)

    def _captured(self, audio: bool) -> Callable[[], None]:
        """Capture the step; the inputs are copied into the graph's own buffers in every step."""
        source = self.source
        if self.given is source:
            log_mel = None if source.log_mel is None else source.log_mel.clone()
            self.given = Inputs(own_copy(source.frames), log_mel, source.labels.clone())
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step(audio)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            self.step(audio)
        self._pool = graph.pool()
        pairs = [(whole_memory(self.given.frames), whole_memory(source.frames)), (self.given.labels, source.labels)]
        if audio and source.log_mel is not None and self.given.log_mel is not None:
            pairs.append((self.given.log_mel, source.log_mel))

        def replay() -> None:
            for target, origin in pairs:
                target.copy_(origin, non_blocking=True)
            graph.replay()

        return replay


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
        made.__dict__.clear()
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
