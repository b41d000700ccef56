"""A tiny model of the family and inputs for it. Legend: N clips, T frames, H W pixels, M audio frames, F mel bins."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig
from model.variants import VARIANTS

PX = 32
_built = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
BACKENDS = ["reference", pytest.param("fused", marks=_built)]


def tiny(**changes: Any) -> ModelConfig:
    """The small preset, narrower, for 32 px, without dropout."""
    values: dict[str, Any] = {"width": 8, "num_classes": 5, "pool_window": 1, "dropout_rate": 0.0, "num_mel_bins": 16}
    return replace(VARIANTS["small"], **(values | changes))


def visual(**changes: Any) -> ModelConfig:
    """`tiny` without audio."""
    return tiny(pathways=("slow", "fast"), fusion="none", **changes)


def inputs(config: ModelConfig, clips: int = 4, px: int = PX, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal frames (N, 3, T, H, W) channels_last_3d and log-mels (N, 1, M, F)."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(clips, 3, config.num_fast_frames, px, px, generator=generator)
    log_mel = torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, generator=generator)
    return frames.to(memory_format=torch.channels_last_3d), log_mel


def built(config: ModelConfig, seed: int = 0, *, settled: bool = False) -> AVSlowFast:
    """A model with seeded weights; `settled`: norms have random scales and statistics, so that nothing is trivial."""
    torch.manual_seed(seed)
    model = build_model(config)
    if settled:
        for module in model.modules():
            if isinstance(module, GhostBatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def audio_names(model: AVSlowFast) -> set[str]:
    """Parameters that only audio uses: the pathway, its laterals, its half of the classifier."""
    marks = (".audio.", ".query", ".key", ".value", ".out.")
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith("audio.") or "classifier.audio" in name or any(m in name for m in marks)
    }
