"""The least time of a training step: operations and bytes of every layer, from shapes alone.

Bytes are those of two-pass kernels that read each input and write each output once, 16-bit activations, float32
weights: a convolution reads or writes its two maps three times (forward, both gradients), a batch normalisation its
map eight times (forward: statistics, then apply; backward: sums, then apply), a block end ten times, a stem with its
pooling 5.75 times. A layer takes the longer of its operations at the matrix rate and its bytes at the copy rate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.steps.plain_model import PlainAVSlowFast, build_plain
from model.config import ModelConfig

ELEMENT = 2  # bytes of an activation
OPTIMIZER_BYTES = 20  # of a parameter: weight, gradient and momentum read, weight and momentum written
NORM_PASSES, BLOCK_END_PASSES, STEM_PASSES = 8.0, 10.0, 5.75


@dataclass(frozen=True)
class Layer:
    """Operations (two per multiply-add) and bytes of one layer in one whole step; `forward`: operations of forward."""

    name: str
    kind: str  # "convolution", "norm", "concatenation", "optimizer"
    forward: int
    operations: int
    moved: float


@dataclass(frozen=True)
class Floor:
    """The layers of a step, and what they add up to."""

    layers: tuple[Layer, ...]

    @property
    def tflop(self) -> float:
        """10^12 operations of forward and both gradients."""
        return sum(layer.operations for layer in self.layers) / 1e12

    @property
    def gigabytes(self) -> float:
        """10^9 bytes."""
        return sum(layer.moved for layer in self.layers) / 1e9

    def milliseconds(self, copy_gb_per_s: float, tflop_per_s: float) -> float:
        """The least time of the step, layer by layer."""
        times = (max(layer.operations / tflop_per_s / 1e9, layer.moved / copy_gb_per_s / 1e6) for layer in self.layers)
        return sum(times)


def step_floor(config: ModelConfig, clips: int, pixels: int, *, audio: bool = True) -> Floor:
    """Count one training step.

    Args:
        config: of the model, as `PlainAVSlowFast` holds it.
        clips: N.
        pixels: H = W of the input.
        audio: kept, or dropped.
    """
    layers: list[Layer] = []
    with FakeTensorMode():
        model = build_plain(replace(config, sync_loss="none"), view="5-D", channels_last=False)
        frames = torch.empty(clips, 3, config.num_fast_frames, pixels, pixels)
        log_mel = torch.empty(clips, 1, config.num_mel_frames, config.num_mel_bins)
        with _watching(model, layers), torch.no_grad():
            model(frames, log_mel if audio and config.has_audio else None)
        parameters = sum(p.numel() for p in model.parameters())
    layers.append(Layer("optimizer", "optimizer", 0, 0, OPTIMIZER_BYTES * parameters))
    return Floor(tuple(layers))


@contextmanager
def _watching(model: PlainAVSlowFast, layers: list[Layer]) -> Iterator[None]:
    """Add every layer to `layers` while the model runs."""

    def watch(name: str, module: nn.Module) -> Any:
        """Return the hook of a layer."""

        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            layers.append(_layer(name, module, given, out))

        return hook

    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm3d)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) or name.endswith("fast_to_slow"):
            handles.append(module.register_forward_hook(watch(name, module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Layer:
    x = given[0]
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
        forward = 2 * out.numel() * module.weight[0].numel()
        first = name in ("slow.stem.conv", "fast.stem.conv", "audio.stem.time", "audio.stem.frequency")
        passes = 2 if first else 3  # nothing needs the gradient of the input
        moved = passes * ELEMENT * (x.numel() + out.numel()) + 3 * ELEMENT * module.weight.numel()
        return Layer(name, "convolution", forward, passes * forward, moved)
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        stem = name in ("slow.stem.norm", "fast.stem.norm")
        passes_of_norm = STEM_PASSES if stem else BLOCK_END_PASSES if name.endswith(".c.norm") else NORM_PASSES
        return Layer(name, "norm", 0, 0, passes_of_norm * ELEMENT * x.numel())
    return Layer(name, "concatenation", 0, 0, 4.0 * ELEMENT * x.numel())  # Slow is copied, forward and backward
