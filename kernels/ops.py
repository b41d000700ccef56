"""The fused operations, registered with PyTorch: shapes for fake tensors, and gradients (`nodes.py`).

Legend: N clips, C channels, T frames, H W pixels, P = T*H*W, G groups. Each operation is defined by the function of
its name in `definition.py`; `norm_act`, `norm_pool` and `lateral_fuse` are whole autograd nodes made of them. No
operation re-lays out its inputs; a gradient that arrives in another layout (an expanded one, say) is copied once.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.library import fused_devices
from kernels.nodes import NODES

__all__ = ["channels_last_empty"]


def channels_last_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised channels-last tensor of `shape`, channels innermost, with dtype and device of `like`."""
    strides, step = [0] * len(shape), shape[1]
    strides[1] = 1
    for axis in range(len(shape) - 1, 1, -1):
        strides[axis], step = step, step * shape[axis]
    strides[0] = step
    return like.new_empty_strided(shape, strides)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _mask(x: Tensor, wanted: bool) -> Tensor:
    rows = x.numel() // x.shape[1] if wanted else 0
    return x.new_empty((rows, (x.shape[1] + 7) // 8), dtype=torch.uint8)


def _dense(x: Tensor) -> Tensor:
    return channels_last_empty(tuple(x.shape), x)


def _fake_bn_stats(x: Tensor, groups: int) -> Tensor:
    return _floats(x, groups, 3, x.shape[1])


def _fake_bn_finalize(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _floats(stats, 5, stats.shape[0], stats.shape[2])


def _fake_bn_act(
    x: Tensor, coef: Tensor, residual: Tensor | None, residual_coef: Any, audio: Any, keep: Any, relu: bool
) -> tuple[Tensor, Tensor]:
    return _dense(x), _mask(x, relu and residual is not None)


def _concat(slow: Tensor, lateral: Tensor) -> Tensor:
    return channels_last_empty((slow.shape[0], slow.shape[1] + lateral.shape[1], *slow.shape[2:]), slow)


def _fake_lateral_cat(
    slow: Tensor,
    slow_coef: Any,
    residual: Any,
    residual_coef: Any,
    lateral: Tensor,
    lateral_coef: Any,
    audio: Any,
    keep: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _concat(slow, lateral), _mask(slow, residual is not None), _mask(lateral, False)


def _fake_reduce(
    dy: Tensor, x: Tensor, residual: Any, mask: Any, coef: Any, residual_coef: Any, groups: int, relu: bool
) -> Tensor:
    return _floats(x, groups, 3, x.shape[1])


def _fake_apply(
    dy: Tensor, x: Tensor, residual: Any, mask: Any, coef: Any, residual_coef: Any, sums: Tensor, relu: bool, want: bool
) -> tuple[Tensor, Tensor]:
    return _dense(x), _dense(x) if want else x.new_empty(0)


def _fake_frame_sum(dy: Tensor, keep: Tensor | None) -> Tensor:
    return dy.new_empty(dy.shape[:3])


def _fake_update(mean: Any, variance: Any, batches: Any, stats: Any, momentum: float) -> None:
    return None


def _site(x: Tensor, mean: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """Statistics and coefficients of one normalisation."""
    own = groups if mean is None else 1
    return _floats(x, groups if mean is None else 0, 3, x.shape[1]), _floats(x, 5, own, x.shape[1])


def _fake_norm_act(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor | None,
    variance: Any,
    eps: float,
    residual: Tensor | None,
    residual_weight: Any,
    residual_bias: Any,
    residual_mean: Tensor | None,
    residual_variance: Any,
    residual_eps: float,
    project: bool,
    groups: int,
    relu: bool,
    blocked: bool,
) -> tuple[Tensor, ...]:
    none = (_floats(x, 0, 3, x.shape[1]), _floats(x, 5, 0, x.shape[1]))
    other = _site(x, residual_mean, groups) if project else none
    return (_dense(x), _mask(x, relu and residual is not None), *_site(x, mean, groups), *other)


def _fake_norm_act_backward(
    dy: Tensor,
    dy2: Any,
    x: Tensor,
    residual: Any,
    mask: Any,
    coef: Any,
    residual_coef: Any,
    groups: int,
    relu: bool,
    want: bool,
    blocked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(x), _dense(x) if want else x.new_empty(0), _floats(x, 4, x.shape[1])


def _fake_lateral_fuse(
    slow: Tensor,
    lateral: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor | None,
    variance: Any,
    eps: float,
    audio: Any,
    keep: Any,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (_concat(slow, lateral), *_site(lateral, mean, groups))


def _pooled(x: Tensor) -> Tensor:
    return channels_last_empty((*x.shape[:-2], (x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2), x)


def _fake_pool(x: Tensor, coef: Tensor, record: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = _pooled(x)
    rows = y.numel() // y.shape[1] if record else 0
    tap = x.new_empty((rows, x.shape[1]), dtype=torch.uint8)
    return y, _pooled(x) if record else x.new_empty(0), tap


def _fake_pool_apply(dy: Tensor, x: Tensor, tap: Tensor, coef: Tensor, sums: Tensor) -> Tensor:
    return _dense(x)


def _fake_norm_pool(
    x: Tensor, weight: Any, bias: Any, mean: Tensor | None, variance: Any, eps: float, groups: int, record: bool
) -> tuple[Tensor, ...]:
    stats, coef = _site(x, mean, groups)
    return (*_fake_pool(x, coef, record), stats, coef)


def _fake_norm_pool_backward(
    dy: Tensor, x: Tensor, value: Tensor, tap: Tensor, coef: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    return _dense(x), _floats(x, 4, x.shape[1])


def _register() -> None:
    fakes = {
        "bn_stats": _fake_bn_stats,
        "bn_finalize": _fake_bn_finalize,
        "bn_act": _fake_bn_act,
        "lateral_cat": _fake_lateral_cat,
        "bn_act_bwd_reduce": _fake_reduce,
        "bn_act_bwd_apply": _fake_apply,
        "frame_sum": _fake_frame_sum,
        "running_stats_update_": _fake_update,
        "norm_act": _fake_norm_act,
        "norm_act_backward": _fake_norm_act_backward,
        "lateral_fuse": _fake_lateral_fuse,
        "bn_relu_maxpool": _fake_pool,
        "bn_relu_maxpool_bwd_apply": _fake_pool_apply,
        "norm_pool": _fake_norm_pool,
        "norm_pool_backward": _fake_norm_pool_backward,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"avsf::{name}", fake)
    for name, node in NODES.items():
        torch.library.register_autograd(f"avsf::{name}", node.backward, setup_context=node.setup)


if fused_devices():
    _register()
