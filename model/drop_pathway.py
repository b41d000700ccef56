"""DropPathway (section 3.5): the whole Audio pathway is left out of an iteration with probability P_d."""

import numpy as np
import torch
from torch import Tensor, nn

_STREAM = 0xD209  # keeps these draws apart from every other use of the same seed


def should_drop(seed: int, step: int, rate: float) -> bool:
    """Decide whether audio is dropped in one training step: a pure function, the same on every rank.

    Args:
        seed: seed of the run, >= 0.
        step: number of the step, >= 0.
        rate: P_d in [0, 1].
    Returns:
        True with probability `rate` over the steps; there is no 1/(1 - P_d) rescaling (section 3.5).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, step, 0, 0]))
    return bool(generator.random() < rate)


class AudioAverage(nn.Module):
    """Running average of an audio feature, fed in its place when audio is dropped (the option of section 3.5)."""

    average: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(channels))

    def update(self, feature: Tensor) -> None:
        """Take in the mean over clips and time of `feature` (N, C) or (N, C, T) in train mode; never synchronises."""
        if self.training:
            dims = (0,) if feature.dim() == 2 else (0, 2)
            self.average.lerp_(feature.detach().float().mean(dims), self.momentum)

    def forward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The average as a feature of `shape` (N, C) or (N, C, T), expanded without a copy."""
        average = self.average.to(dtype)
        return (average[None] if len(shape) == 2 else average[None, :, None]).expand(shape)
