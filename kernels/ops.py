"""Shapes and gradients of the fused operations, registered with PyTorch: fake tensors, autograd.

Legend: N clips, C channels, T frames, H W pixels, P = T*H*W, G groups. Each operation is defined by the function of
its name in `reference_ops.py`; `norm_act`, `norm_pool` and `lateral_fuse` are whole autograd nodes made of them. No
operation re-lays out its inputs; a gradient that arrives in another layout (an expanded one, say) is copied once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.layout import KernelInputError, is_channels_last, memory_format
from kernels.library import fused_devices

__all__ = ["channels_last_empty", "gradient_rows", "once_differentiable"]


def channels_last_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised channels-last tensor of `shape`, channels innermost, with dtype and device of `like`."""
    strides, step = [0] * len(shape), shape[1]
    strides[1] = 1
    for axis in range(len(shape) - 1, 1, -1):
        strides[axis], step = step, step * shape[axis]
    strides[0] = step
    return like.new_empty_strided(shape, strides)


def gradient_rows(grad: Tensor) -> Tensor:
    """A gradient in a layout the operations take: itself if it is channels-last, else one copy."""
    return grad if is_channels_last(grad) else grad.contiguous(memory_format=memory_format(grad))


class _Once(torch.autograd.Function):
    """Gradients that depend on `anchors` in a way that nobody has differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in values[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise KernelInputError(
            "a gradient of normalisation was differentiated (create_graph=True), but fused operations and SyncBN are "
            "differentiable once only; choose backend 'reference' without SyncBN for second derivatives"
        )


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose gradients refuse to be differentiated again, instead of passing for constants.

    PyTorch's decorator of that name lets them pass for constants where the incoming gradient is one.

    Args:
        backward: backward(ctx, saved, *gradients), saved = ctx.saved_tensors, which may be read only once.

    Returns:
        backward(ctx, *gradients) for an autograd node; with create_graph=True its results raise KernelInputError when
        a second derivative passes them on its way to a saved tensor: save the parameters too.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Run `backward` with the saved tensors; its results raise in a second derivative."""
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            out = list(backward(ctx, saved, *grads))
        at = [i for i, value in enumerate(out) if isinstance(value, Tensor)]
        anchors = [t for t in (*grads, *saved) if isinstance(t, Tensor) and t.requires_grad]
        for i, value in zip(at, _Once.apply(len(at), *(out[i] for i in at), *anchors), strict=True):
            out[i] = value
        return tuple(out)

    return wrapper


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
    return _dense(x), _dense(x) if want else x.new_empty(0), _floats(x, groups, 3, x.shape[1])


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
    return _dense(x), _floats(x, groups, 3, x.shape[1])


def _save_norm_act(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, residual_weight, project = inputs[0], inputs[1], inputs[6], inputs[7], inputs[12]
    _, mask, stats, coef, residual_stats, residual_coef = output
    other = (residual, residual_coef, residual_weight) if project else (None, None, None)
    ctx.save_for_backward(x, mask, coef, *other[:2], weight, other[2])
    ctx.mark_non_differentiable(mask, stats, coef, residual_stats, residual_coef)
    ctx.set_materialize_grads(False)
    ctx.project, ctx.residual = project, residual is not None
    ctx.groups, ctx.relu, ctx.blocked = inputs[13:]


def _total(sums: Tensor, row: int) -> Tensor:
    """(C,) over groups of row `row` of (G, 3, C)."""
    return sums[0, row] if sums.shape[0] == 1 else sums[:, row].sum(0)


@once_differentiable
def _norm_act_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out: list[Any] = [None] * 16
    if grad is None:
        return tuple(out)
    x, mask, coef, residual, residual_coef = saved[:5]
    grad = gradient_rows(grad)
    want = ctx.residual and (ctx.project or ctx.relu)
    dx, dresidual, sums = torch.ops.avsf.norm_act_backward(
        grad, x, residual, mask, coef, residual_coef, ctx.groups, ctx.relu, want, ctx.blocked
    )
    out[0], out[1], out[2] = dx, _total(sums, 1), _total(sums, 0)
    if ctx.residual:
        out[6] = dresidual if want else grad
    if ctx.project:
        out[7], out[8] = _total(sums, 2), _total(sums, 0)
    return tuple(value if needed else None for value, needed in zip(out, ctx.needs_input_grad, strict=True))


def _save_lateral_fuse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    slow, lateral, keep = inputs[0], inputs[1], inputs[8]
    ctx.save_for_backward(lateral, output[2], keep, inputs[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.channels, ctx.groups = slow.shape[1], inputs[9]


@once_differentiable
def _lateral_fuse_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out: list[Any] = [None] * 10
    if grad is None:
        return tuple(out)
    lateral, coef, keep = saved[:3]
    grad = gradient_rows(grad)
    need = ctx.needs_input_grad
    if need[0]:
        out[0] = grad[:, : ctx.channels]
    if need[1] or need[2] or need[3]:
        out[1], _, sums = torch.ops.avsf.norm_act_backward(
            grad[:, ctx.channels :], lateral, None, _mask(lateral, False), coef, None, ctx.groups, True, False, False
        )
        out[2], out[3] = _total(sums, 1), _total(sums, 0)
    if need[7]:
        out[7] = torch.ops.avsf.frame_sum(grad, keep)
    return tuple(value if needed else None for value, needed in zip(out, need, strict=True))


def _save_norm_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, value, tap, stats, coef = output
    ctx.save_for_backward(inputs[0], value, tap, coef, inputs[1])
    ctx.mark_non_differentiable(value, tap, stats, coef)
    ctx.set_materialize_grads(False)
    ctx.groups, ctx.recorded = inputs[6:]


@once_differentiable
def _norm_pool_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out: list[Any] = [None] * 8
    if grad is None:
        return tuple(out)
    if not ctx.recorded:
        raise KernelInputError("norm_pool with record=False keeps nothing for a gradient; call it with record=True")
    out[0], sums = torch.ops.avsf.norm_pool_backward(gradient_rows(grad), *saved[:4], ctx.groups)
    out[1], out[2] = _total(sums, 1), _total(sums, 0)
    return tuple(value if needed else None for value, needed in zip(out, ctx.needs_input_grad, strict=True))


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
    torch.library.register_autograd("avsf::norm_act", _norm_act_backward, setup_context=_save_norm_act)
    torch.library.register_autograd("avsf::norm_pool", _norm_pool_backward, setup_context=_save_norm_pool)
    torch.library.register_autograd("avsf::lateral_fuse", _lateral_fuse_backward, setup_context=_save_lateral_fuse)


if fused_devices():
    _register()
