"""The inference form: every batch normalisation folded into the convolution before it.

ReLU, residual and audio additions stay as they are: torch.compile or the fused ops merge them. Weights are converted to
16 bits and expanded for grouped pixels once, in the first forward of each kind: run one before capturing a CUDA graph.
Legend: N clips, C channels, T frames, H W pixels.
"""

import copy

import torch
from torch import Tensor, nn

from kernels.eager import max_pool
from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast
from model.blocks import ConvNorm, TwoAxes
from model.convolutions import Convolution
from model.fusion import FastToSlow, add_audio
from model.nonlocal_block import NonLocalBlock


class FoldedNorm(nn.Module):
    """What is left of a normalisation once its convolution has absorbed it."""

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_norm: nn.Module | None = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Tensor:
        """x [+ residual], rectified and pooled if asked for; any shape."""
        y = x if residual is None else x + residual
        y = torch.relu(y) if relu else y
        return max_pool(y) if pool else y


class FoldedLateral(nn.Module):
    """`LateralFusion` without its norm."""

    def forward(
        self, slow: Tensor, lateral: Tensor, *, audio: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """concat(slow, relu(lateral)) + the audio of clips that keep (N,) bool: (N, C, T, H, W) channels_last_3d."""
        return add_audio(torch.cat([slow, torch.relu(lateral)], 1), audio, keep)


@torch.no_grad()
def fold(model: AVSlowFast) -> AVSlowFast:
    """A copy of a model for inference, its batch normalisations folded into the convolutions.

    Args:
        model: its running statistics are used; it is not changed.
    Returns:
        a model in evaluation mode without gradients, equal within rounding; training it makes no sense.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    if not any(isinstance(module, GhostBatchNorm) for module in folded.modules()):
        return folded  # folded before
    for module in list(folded.modules()):
        if isinstance(module, ConvNorm):
            module.norm = _absorb(module.norm, [module.conv])
        elif isinstance(module, NonLocalBlock):
            module.norm = _absorb(module.norm, [module.out])
        elif isinstance(module, TwoAxes):
            module.norm = _absorb(module.norm, [module.time, module.frequency], joined=module.joined)
        elif isinstance(module, FastToSlow):
            _absorb(module.fuse.norm, [module.conv])  # type: ignore[arg-type]
            module.fuse = FoldedLateral()
    for module in folded.modules():
        if isinstance(module, Convolution):
            module.keep_weights()
    left = [name for name, module in folded.named_modules() if isinstance(module, GhostBatchNorm)]
    assert not left, f"not folded: {left}"
    return folded


def _absorb(norm: nn.Module, convolutions: list[nn.Module], joined: str = "concat") -> FoldedNorm:
    """Fold one norm into the convolutions whose joined output it normalises: in place, in float64."""
    assert isinstance(norm, GhostBatchNorm)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    parts = len(convolutions) if joined == "concat" else 1
    scales, shifts = scale.chunk(parts), shift.chunk(parts)
    for index, convolution in enumerate(convolutions):
        assert isinstance(convolution, nn.Conv2d | nn.Conv3d)
        weight, part = convolution.weight, index if parts > 1 else 0
        factor = scales[part].view(-1, *[1] * (weight.dim() - 1))
        weight.copy_(weight.double() * factor)
        bias = 0 if convolution.bias is None else convolution.bias.double() * scales[part]
        if index == 0 or parts > 1:  # of a sum, one convolution carries the shift
            bias = bias + shifts[part]
        if isinstance(bias, Tensor):
            convolution.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return FoldedNorm()
