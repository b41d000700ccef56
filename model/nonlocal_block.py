"""Non-local block of Slow's res4 (appendix A.4). Legend: N clips, C channels, T frames, H W pixels, P positions."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm
from model.config import ModelConfig
from model.convolutions import FactoredConv3d


class NonLocalBlock(nn.Module):
    """x + BN(W attention(x)): dot product, inner width C/2, keys and values max-pooled 2x2x2, zero-initialised BN."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        inner = channels // 2
        self.query = FactoredConv3d(channels, inner, 1)
        self.key = FactoredConv3d(channels, inner, 1)
        self.value = FactoredConv3d(channels, inner, 1)
        self.out = FactoredConv3d(inner, channels, 1)
        self.norm: nn.Module = GhostBatchNorm(channels, clips_per_group=config.clips_per_bn_group, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> the same shape and layout."""
        pooled = F.max_pool3d(x, tuple(min(2, size) for size in x.shape[2:]))
        query = positions(self.query(x))  # (N, P, C/2)
        key, value = positions(self.key(pooled)), positions(self.value(pooled))  # (N, P', C/2)
        with in_wide_range(x.dtype, x.device):
            query, key, value, residual = (widened(t) for t in (query, key, value, x))
            y = attend(query, key, value).transpose(1, 2).unflatten(2, x.shape[2:])  # a view: channels_last_3d
            out: Tensor = self.norm(self.out(y), residual=residual)
        return out.to(x.dtype)

    def matmul_multiply_adds(self, x: Tensor) -> int:
        """Multiply-adds of the two matrix products per call (what no convolution hook sees)."""
        total = x.shape[2:].numel()
        pooled = F.max_pool3d(x[:1, :1], tuple(min(2, size) for size in x.shape[2:])).shape[2:].numel()
        return 2 * x.shape[0] * total * pooled * (x.shape[1] // 2)


def in_wide_range(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast where it would be float16: a dot product of three activations leaves that range (not bfloat16's)."""
    return torch.autocast(device.type, enabled=False) if dtype == torch.float16 else contextlib.nullcontext()


def widened(x: Tensor) -> Tensor:
    """float16 as float32, others as they are; any shape and layout."""
    return x.float() if x.dtype == torch.float16 else x


def positions(x: Tensor) -> Tensor:
    """(N, C, T, H, W) channels_last_3d -> (N, T*H*W, C), a view."""
    return x.flatten(2).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dot-product affinity divided by the number of keys (Wang et al. 2018), applied to the values.

    Args:
        query: (N, P, C). key, value: (N, P', C).
    Returns:
        (N, P, C).
    """
    scale = key.shape[1] ** -0.5  # half on either side of the product, which would overflow float16 before a division
    affinity: Tensor = _Affinity.apply(query * scale, key * scale)
    return affinity @ value


class _Affinity(torch.autograd.Function):
    """query @ key^T whose key gradient comes out as (N, P', C), the layout of the convolution that made the key."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return query @ key.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        return grad @ key, grad.transpose(1, 2) @ query
