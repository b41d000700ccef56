"""DropPathway (section 3.5): the whole Audio pathway is left out of an iteration with probability P_d."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm

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
    """Running average of an audio feature, fed in its place when audio is dropped (the option of section 3.5).

    `frozen`: the average is used and kept, in training as well (see `modes.apply_freeze`).
    """

    average: Tensor
    frozen = False

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(channels))

    @torch.no_grad()
    def update(self, feature: Tensor, keep: Tensor | None = None) -> None:
        """Take in the mean over time and kept clips in train mode, nothing if none is kept; never synchronises.

        Args:
            feature: (N, C) or (N, C, T).
            keep: (N,) bool, False for a clip whose audio is dropped; None keeps all.
        """
        if not self.training or self.frozen:
            return
        rows = feature.float() if feature.dim() == 2 else feature.float().mean(2)
        if keep is None:
            self.average.lerp_(rows.mean(0), self.momentum)
            return
        mean = torch.where(keep[:, None], rows, 0).sum(0) / keep.sum().clamp(min=1)
        self.average.lerp_(mean, self.momentum * keep.any())

    def forward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The average as a feature of `shape` (N, C) or (N, C, T), expanded without a copy."""
        average = self.average.to(dtype)
        return (average[None] if len(shape) == 2 else average[None, :, None]).expand(shape)


def statistics(norms: Iterable[GhostBatchNorm]) -> list[Tensor]:
    """Running statistics of those norms that learn them now, as they lie in the model."""
    learning = [norm for norm in norms if norm.uses_batch_statistics]
    return [b for n in learning for b in (n.running_mean, n.running_var, n.num_batches_tracked)]


def restore_unless(used: Tensor, buffers: list[Tensor], before: Mapping[torch.dtype, Tensor]) -> None:
    """Put former values back into `buffers` where `used` () bool is False, e.g. where every clip is dropped.

    A device-side drop runs the Audio pathway in every step, so that a CUDA graph can hold it. A norm that only kept
    clips need has to look as if it had not run where there is none. Few launches; never synchronises.

    Args:
        used: () bool.
        buffers: as they lie in the model.
        before: what `values_of` gave.
    """
    with torch.no_grad():
        for dtype, values in before.items():
            same = [b for b in buffers if b.dtype == dtype]
            chosen = torch.where(used, torch.cat([b.reshape(-1) for b in same]), values)
            pieces = chosen.split([b.numel() for b in same])
            torch._foreach_copy_(same, [p.view_as(b) for p, b in zip(pieces, same, strict=True)])


def values_of(buffers: list[Tensor]) -> dict[torch.dtype, Tensor]:
    """The values of buffers as they are now, in one piece of memory for each type."""
    types = {b.dtype: None for b in buffers}
    return {dtype: torch.cat([b.reshape(-1) for b in buffers if b.dtype == dtype]) for dtype in types}
