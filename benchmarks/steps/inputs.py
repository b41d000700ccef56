"""Models and inputs of the benchmarks on the present device, and timing in turns.

Legend: N clips, T frames, H W pixels, M audio frames, F mel bins.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig

AVA_PX = (256, 320)
VIEW_PX = (256, 256)
SMALL_PX = (64, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILDS = 5  # of the models of a ratio


def size_px(variant: str) -> tuple[int, int]:
    """Height and width of one view of a variant."""
    return AVA_PX if variant.endswith("_ava") else SMALL_PX if variant == "small" else VIEW_PX


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(
    config: ModelConfig, clips: int, size: tuple[int, int], seed: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Normal frames (N, 3, T, H, W) channels_last_3d and log-mels (N, 1, M, F) on the device."""
    generator = torch.Generator().manual_seed(seed)
    frames = log_mel = None
    if config.has_visual:
        frames = torch.randn(clips, 3, config.num_fast_frames, *size, generator=generator)
        frames = frames.to(device(), memory_format=torch.channels_last_3d)
    if config.has_audio:
        log_mel = torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, generator=generator).to(device())
    return frames, log_mel


def make_model(config: ModelConfig) -> AVSlowFast:
    """Seeded weights; norms and the fc scaled so that logits are of order 1 as in a trained model."""
    torch.manual_seed(0)
    model = build_model(replace(config, freeze="none", sync_loss="none")).to(device())
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            nn.init.constant_(module.weight, 0.7)
    return model


def interleaved(steps: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each step in each of `repeats` turns, after two to warm up.

    Steps that alternate share the machine's noise.
    """
    times: list[list[float]] = [[] for _ in steps]
    for number in range(repeats + 2):
        order = list(enumerate(steps))
        for which, step in order if number % 2 else reversed(order):  # no step always runs in another's warm caches
            _finish()
            start = time.perf_counter()
            step()
            _finish()
            if number >= 2:
                times[which].append(time.perf_counter() - start)
    return times


def over_builds(build: Callable[[], Sequence[Callable[[], object]]], repeats: int) -> list[list[float]]:
    """As `interleaved`, over `BUILDS` builds of the models: their speed depends on where the weights happen to lie."""
    rounds = [interleaved(build(), repeats) for _ in range(BUILDS)]
    return [[t for times in arms for t in times] for arms in zip(*rounds, strict=True)]


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the turns of time / base: a machine that changes its speed from turn to turn does not enter."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bf16 or fp16; nothing for fp32."""
    return torch.autocast(device().type, DTYPES[precision], enabled=precision != "fp32")


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
