"""Norms for tests, and where they run: both backends, both devices."""

import pytest
import torch
from torch import nn

from kernels.library import fused_devices
from kernels.modules import (
    GhostBatchNorm,
)

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
BACKENDS = ["reference", pytest.param("fused", marks=fused)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


def norm(channels: int, seed: int = 0, device: str = "cpu") -> GhostBatchNorm:
    module = GhostBatchNorm(channels)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(module.weight, generator=generator)
    nn.init.normal_(module.bias, generator=generator)
    return module.to(device)
