"""Gradients of the fused operations: what each autograd node saves, and what its backward gives to which argument.

Legend: N clips, C channels, T frames, P = T*H*W, G groups. An operation's arguments and results are named tuples in the
order of its schema (kernels/csrc/schema.cpp), so that nothing is found by its number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.layout import KernelInputError, is_channels_last, memory_format

__all__ = ["NODES", "Node", "NormAct", "fork_norm_act", "gradient_rows", "once_differentiable"]


class NormAct(NamedTuple):
    """Arguments of `norm_act`; a norm without given mean and variance uses those of the batch."""

    x: Any
    weight: Any
    bias: Any
    mean: Any
    variance: Any
    eps: Any
    residual: Any
    residual_weight: Any
    residual_bias: Any
    residual_mean: Any
    residual_variance: Any
    residual_eps: Any
    project: Any
    groups: Any
    relu: Any
    blocked: Any


class NormActOut(NamedTuple):
    """Results of `norm_act`."""

    y: Tensor
    mask: Tensor
    stats: Tensor
    coef: Tensor
    residual_stats: Tensor
    residual_coef: Tensor


class LateralFuse(NamedTuple):
    """Arguments of `lateral_fuse`."""

    slow: Any
    lateral: Any
    weight: Any
    bias: Any
    mean: Any
    variance: Any
    eps: Any
    audio: Any
    keep: Any
    groups: Any


class NormPool(NamedTuple):
    """Arguments of `norm_pool`."""

    x: Any
    weight: Any
    bias: Any
    mean: Any
    variance: Any
    eps: Any
    groups: Any
    record: Any


class ParameterGradients(NamedTuple):
    """Rows of the (4, C) float32 tensor that backward operations write: sums over positions, clips and groups."""

    bias: Tensor
    weight: Tensor
    residual_weight: Tensor
    residual_bias: Tensor


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


def _by_argument(ctx: Any, arguments: type[Any], **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the arguments, None where there is none or nobody asked."""
    return tuple(
        gradients.get(name) if needed else None
        for name, needed in zip(arguments._fields, ctx.needs_input_grad, strict=True)
    )


def _save_norm_act(ctx: Any, given: NormAct, out: NormActOut) -> None:
    other = (given.residual, out.residual_coef, given.residual_weight) if given.project else (None, None, None)
    ctx.save_for_backward(given.x, out.mask, out.coef, *other[:2], given.weight, other[2])  # the last two: see _Once
    ctx.set_materialize_grads(False)
    ctx.has_residual, ctx.project = given.residual is not None, given.project
    ctx.groups, ctx.relu, ctx.blocked = given.groups, given.relu, given.blocked


def _norm_act_gradients(ctx: Any, saved: tuple[Any, ...], grads: list[Tensor]) -> tuple[Any, ...]:
    """From the gradients that the output's readers sent: none, one or two."""
    if not grads:
        return _by_argument(ctx, NormAct)
    x, mask, coef, residual, residual_coef = saved[:5]
    grad, *second = (gradient_rows(grad) for grad in grads)
    want = ctx.has_residual and (ctx.project or ctx.relu or bool(second))
    dx, dresidual, rows = torch.ops.avsf.norm_act_backward(
        grad,
        second[0] if second else None,
        x,
        residual,
        mask,
        coef,
        residual_coef,
        ctx.groups,
        ctx.relu,
        want,
        ctx.blocked,
    )
    parameters = ParameterGradients(*rows.unbind())
    return _by_argument(
        ctx,
        NormAct,
        x=dx,
        weight=parameters.weight,
        bias=parameters.bias,
        residual=(dresidual if want else grad) if ctx.has_residual else None,
        residual_weight=parameters.residual_weight if ctx.project else None,
        residual_bias=parameters.residual_bias if ctx.project else None,
    )


def _setup_norm_act(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out = NormActOut(*output)
    ctx.mark_non_differentiable(*out[1:])
    _save_norm_act(ctx, NormAct(*inputs), out)


@once_differentiable
def _norm_act_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return _norm_act_gradients(ctx, saved, [] if grad is None else [grad])


class _ForkedNormAct(torch.autograd.Function):
    """`norm_act` whose output two readers share: their gradients meet in its backward, not in an addition before it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        out = NormActOut(*torch.ops.avsf.norm_act(*inputs))
        ctx.mark_non_differentiable(out.stats, out.residual_stats)
        _save_norm_act(ctx, NormAct(*inputs), out)
        return out.y, out.y.view_as(out.y), out.stats, out.residual_stats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], first: Tensor | None, second: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        return _norm_act_gradients(ctx, saved, [grad for grad in (first, second) if grad is not None])


def fork_norm_act(given: NormAct) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_act` with its output twice, for two readers; nothing may write to either.

    Args:
        given: the arguments of `norm_act`.

    Returns:
        y, y again (the same memory; each has a gradient of its own), the statistics, the residual's.
    """
    y, again, stats, residual_stats = _ForkedNormAct.apply(*given)
    return y, again, stats, residual_stats


def _setup_lateral_fuse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, (_, stats, coef) = LateralFuse(*inputs), output
    ctx.save_for_backward(given.lateral, coef, given.keep, given.weight)
    ctx.mark_non_differentiable(stats, coef)
    ctx.set_materialize_grads(False)
    ctx.channels, ctx.groups = given.slow.shape[1], given.groups


@once_differentiable
def _lateral_fuse_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return _by_argument(ctx, LateralFuse)
    lateral, coef, keep = saved[:3]
    grad = gradient_rows(grad)
    need = LateralFuse(*ctx.needs_input_grad)
    dlateral, parameters, daudio = None, None, None
    if need.lateral or need.weight or need.bias:
        no_mask = lateral.new_empty((0, 1), dtype=torch.uint8)
        dlateral, _, rows = torch.ops.avsf.norm_act_backward(
            grad[:, ctx.channels :], None, lateral, None, no_mask, coef, None, ctx.groups, True, False, False
        )
        parameters = ParameterGradients(*rows.unbind())
    if need.audio:
        daudio = torch.ops.avsf.frame_sum(grad, keep)
    return _by_argument(
        ctx,
        LateralFuse,
        slow=grad[:, : ctx.channels],
        lateral=dlateral,
        weight=parameters and parameters.weight,
        bias=parameters and parameters.bias,
        audio=daudio,
    )


def _setup_norm_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, (_, value, tap, stats, coef) = NormPool(*inputs), output
    ctx.save_for_backward(given.x, value, tap, coef, given.weight)
    ctx.mark_non_differentiable(value, tap, stats, coef)
    ctx.set_materialize_grads(False)
    ctx.groups, ctx.recorded = given.groups, given.record


@once_differentiable
def _norm_pool_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return _by_argument(ctx, NormPool)
    if not ctx.recorded:
        raise KernelInputError("norm_pool with record=False keeps nothing for a gradient; call it with record=True")
    x, value, tap, coef = saved[:4]
    dx, rows = torch.ops.avsf.norm_pool_backward(gradient_rows(grad), x, value, tap, coef, ctx.groups)
    parameters = ParameterGradients(*rows.unbind())
    return _by_argument(ctx, NormPool, x=dx, weight=parameters.weight, bias=parameters.bias)


class Node(NamedTuple):
    """An operation with a gradient: what its forward saves and what its backward makes of it."""

    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]


NODES = {
    "norm_act": Node(_setup_norm_act, _norm_act_backward),
    "norm_pool": Node(_setup_norm_pool, _norm_pool_backward),
    "lateral_fuse": Node(_setup_lateral_fuse, _lateral_fuse_backward),
}
