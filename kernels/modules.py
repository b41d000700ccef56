"""Normalisation and lateral fusion as the model uses them. Legend: N clips, C channels, T frames, H W pixels."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels import reference, reference_ops
from kernels.backend import announce_backend, blocked_groups, set_backend, use_fused
from kernels.layout import KernelInputError, check_channels_last, check_precision, group_count, same_place
from kernels.precise_bn import precise_bn
from kernels.sync import sync_norm

__all__ = [
    "GhostBatchNorm",
    "LateralFusion",
    "choose_backend",
    "joint_statistics_update",
    "no_statistics_update",
    "precise_bn",
    "set_backend",
]
_updates = {"allowed": True}
_waiting: dict[str, "list[tuple[GhostBatchNorm, Tensor]] | None"] = {"updates": None}


@contextlib.contextmanager
def no_statistics_update() -> Iterator[None]:
    """Training-mode normalisation without a change of running statistics, e.g. for a recomputed forward.

    Activation checkpointing needs no call: a forward that runs inside a backward is recognised and never updates.
    """
    before, _updates["allowed"] = _updates["allowed"], False
    try:
        yield
    finally:
        _updates["allowed"] = before


@contextlib.contextmanager
def joint_statistics_update() -> Iterator[None]:
    """Fold the running statistics of all norms that run inside at its end, by one operation: a model's forward.

    Without it each norm updates its own at once. The results are equal bit by bit, also of a norm that runs twice.
    Inside another one it does nothing; under torch.compile neither, where each norm updates at once. An exception
    inside drops the updates. Norms may not be read for their running statistics before the end.
    """
    if torch.compiler.is_compiling() or _waiting["updates"] is not None:
        yield
        return
    queue: list[tuple[GhostBatchNorm, Tensor]] = []
    _waiting["updates"] = queue
    try:
        yield
    finally:
        _waiting["updates"] = None
    _update_running(queue)


def _update_running(waiting: list[tuple["GhostBatchNorm", Tensor]]) -> None:
    """Fold (norm, statistics) pairs in, one call for all first runs of a norm, one for all second runs, and so on."""
    while waiting:
        calls: dict[tuple[float, torch.device, str], dict[GhostBatchNorm, Tensor]] = {}
        again = []
        for norm, stats in waiting:
            call = calls.setdefault((norm.momentum, stats.device, norm.backend), {})
            if norm in call:
                again.append((norm, stats))
            else:
                call[norm] = stats
        for call in calls.values():
            _fold(list(call), list(call.values()))
        waiting = again


@torch.no_grad()
def _fold(norms: list["GhostBatchNorm"], stats: list[Tensor]) -> None:
    """Fold one (G, 3, C) of each norm into its running statistics; different norms of one momentum, device, backend."""
    fused = use_fused(stats[0], norms[0].backend)
    update = torch.ops.avsf.running_stats_update_ if fused else reference_ops.running_stats_update_
    buffers = [n.running_mean for n in norms], [n.running_var for n in norms], [n.num_batches_tracked for n in norms]
    update(*buffers, stats, norms[0].momentum)


def _is_recomputed() -> bool:
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


class GhostBatchNorm(nn.Module):
    """Batch normalisation over groups of clips, with the end of a residual block in the same operation.

    Paper section 4.1: statistics over 8 clips. state_dict keys are those of `nn.BatchNorm3d`. Forward hooks see what
    the caller asked for; a norm that works inside another's operation (residual_norm, a lateral's) runs none.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        clips_per_group: clips that share statistics in training.
        zero_init: gamma starts at 0 (last normalisation of a residual branch), else at 1.

    `backend` ("auto", "fused", "reference"; see `choose_backend`) says which implementation runs, here and where this
    norm is part of a `LateralFusion`; a residual_norm runs in the operation of the norm that it is given to.
    """

    backend: str
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        clips_per_group: int = 8,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if num_features < 1 or clips_per_group < 1:
            raise KernelInputError(
                f"num_features ({num_features}) and clips_per_group ({clips_per_group}) must be at least 1"
            )
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.clips_per_group = clips_per_group
        self.frozen = False
        self.backend = "auto"
        self.process_group: Any = None
        self.collected: list[Tensor] | None = None
        self.weight = nn.Parameter(torch.zeros(num_features) if zero_init else torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, clips_per_group={self.clips_per_group}"

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_norm: "GhostBatchNorm | None" = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Tensor:
        """Normalise; add the residual, itself normalised if a norm is given; rectify; or rectify and pool (the stem).

        Args:
            x: (N, C, T, H, W) channels_last_3d or (N, C, H, W) channels_last; float16, bfloat16, float32 or float64.
            residual: like x, or None.
            residual_norm: the projection shortcut's normalisation, applied to residual.
            relu: end with max(., 0).
            pool: then max pooling 1x3x3, stride 1,2,2, padding 0,1,1, in the same operation; with relu, no residual.

        Returns:
            like x, same strides for a dense x; (N, C, T, ceil(H/2), ceil(W/2)) with pool.

        Raises:
            KernelInputError: wrong layout, shape, dtype, device or number of clips. Also in a second derivative, which
                only the reference without SyncBN has.
        """
        self._check(x, "x")
        if residual is not None:
            (residual_norm or self)._check(residual, "residual")
            if residual.shape != x.shape or residual.dtype != x.dtype:
                raise KernelInputError(
                    f"residual {tuple(residual.shape)} {residual.dtype} must equal x {tuple(x.shape)} {x.dtype}"
                )
        elif residual_norm is not None:
            raise KernelInputError("residual_norm without residual: pass the tensor that it normalises")
        if pool:
            return self._pooled(x, residual, relu)
        if self._is_synchronized or (residual_norm is not None and residual_norm._is_synchronized):
            return self._synchronized(x, residual, residual_norm, relu)
        if use_fused(x, self.backend):
            return self._fused(x, residual, residual_norm, relu)
        if residual is None:
            return self._normalize(x, relu)
        if residual_norm is not None:
            residual = residual_norm._normalize(residual)
        return reference.end_block(self._normalize(x), residual, relu)

    @property
    def uses_batch_statistics(self) -> bool:
        """True in training, unless frozen."""
        return self.training and not self.frozen

    def _check(self, x: Tensor, name: str) -> None:
        check_channels_last(x, name)
        same_place(x, self.weight, "BatchNorm weight")
        if x.shape[1] != self.num_features:
            raise KernelInputError(f"{name} has {x.shape[1]} channels but this norm has {self.num_features}")
        check_precision(x, self.weight, name)

    def _normalize(self, x: Tensor, relu: bool = False) -> Tensor:
        if not self.uses_batch_statistics:
            return reference.normalize(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, relu)
        groups = group_count(x.shape[0], self.clips_per_group)
        y, stats = reference.batch_norm(x, self.weight, self.bias, self.eps, groups, relu)
        self._track(stats)
        return y

    def _fused(self, x: Tensor, residual: Tensor | None, other: "GhostBatchNorm | None", relu: bool) -> Tensor:
        groups = self._groups(x)
        if residual is not None and other is not None:
            if self.uses_batch_statistics and other.uses_batch_statistics and other._groups(x) != groups:
                residual, other = other.forward(residual), None
            elif other.uses_batch_statistics:
                groups = other._groups(x)
        given = (None,) * 4 if other is None else (other.weight, other.bias, *other._given())
        y, _, stats, _, other_stats, _ = torch.ops.avsf.norm_act(
            x,
            self.weight,
            self.bias,
            *self._given(),
            self.eps,
            residual,
            *given,
            self.eps if other is None else other.eps,
            other is not None,
            groups,
            relu,
            blocked_groups(x.device.type),
        )
        if self.uses_batch_statistics:
            self._track(stats)
        if other is not None and other.uses_batch_statistics:
            other._track(other_stats)
        return y

    def _pooled(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if residual is not None or not relu:
            raise KernelInputError(
                f"pool needs relu=True (is {relu}) and no residual (given: {residual is not None}); "
                "pool in a step of its own"
            )
        if self._is_synchronized or not use_fused(x, self.backend):
            return reference.max_pool(self.forward(x, relu=True))
        record = torch.is_grad_enabled()
        y, _, _, stats, _ = torch.ops.avsf.norm_pool(
            x, self.weight, self.bias, *self._given(), self.eps, self._groups(x), record
        )
        if self.uses_batch_statistics:
            self._track(stats)
        return y

    @property
    def _is_synchronized(self) -> bool:
        return self.process_group is not None and self.uses_batch_statistics

    def _synchronized(self, x: Tensor, residual: Tensor | None, other: "GhostBatchNorm | None", relu: bool) -> Tensor:
        """SyncBN form: its statistics wait for the other ranks, so the block end is a step of its own."""
        if not self._is_synchronized:
            y = self.forward(x)
        else:
            end = relu and residual is None
            y, stats = sync_norm(
                x, self.weight, self.bias, self.eps, self._groups(x), end, self.process_group, self.backend
            )
            self._track(stats)
        if residual is None:
            return y
        return reference.end_block(y, residual if other is None else other.forward(residual), relu)

    def _groups(self, x: Tensor) -> int:
        return group_count(x.shape[0], self.clips_per_group) if self.uses_batch_statistics else 1

    def _given(self) -> tuple[Tensor | None, Tensor | None]:
        """Running statistics where they are used, else none."""
        return (None, None) if self.uses_batch_statistics else (self.running_mean, self.running_var)

    def _track(self, stats: Tensor) -> None:
        """Fold (G, 3, C) statistics of this batch into the running ones, or hand them to `precise_bn`."""
        if self.collected is not None:
            self.collected.append(stats)
        elif _updates["allowed"] and not _is_recomputed():
            queue = _waiting["updates"]
            if queue is None or torch.compiler.is_compiling():
                _fold([self], [stats])
            else:
                queue.append((self, stats))


class LateralFusion(nn.Module):
    """F->S concatenation and A->FS addition, written once (paper section 3.2, Fig. 2).

    Args:
        norm: normalisation of the F->S convolution's output.
    """

    def __init__(self, norm: GhostBatchNorm) -> None:
        super().__init__()
        self.norm = norm

    @property
    def backend(self) -> str:
        """Which implementation runs: that of its norm."""
        return self.norm.backend

    def forward(
        self, slow: Tensor, lateral: Tensor, *, audio: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """concat(slow, relu(norm(lateral))) + keep * audio.

        Args:
            slow: (N, Cs, T, H, W) finished stage output, channels_last_3d.
            lateral: (N, Cl, T, H, W) F->S convolution before BN and ReLU, channels_last_3d, dtype of slow.
            audio: (N, Cs + Cl, T), added at every H, W; None = host-side drop.
            keep: (N,) bool or float, device-side drop: 0 selects zero; None keeps all.

        Returns:
            (N, Cs + Cl, T, H, W) channels_last_3d.

        Raises:
            KernelInputError: shapes, layout or devices do not fit.
        """
        check_channels_last(slow, "slow")
        self.norm._check(lateral, "lateral")
        check_fusion(slow, lateral, audio, keep)
        norm = self.norm
        if use_fused(slow, norm.backend) and not norm._is_synchronized:
            out, stats, _ = torch.ops.avsf.lateral_fuse(
                slow,
                lateral,
                norm.weight,
                norm.bias,
                *norm._given(),
                norm.eps,
                None if audio is None else audio.to(slow.dtype),
                None if keep is None else keep.to(torch.float32),
                norm._groups(lateral),
            )
            if norm.uses_batch_statistics:
                norm._track(stats)
            return out
        return reference.fuse_lateral(slow, norm.forward(lateral, relu=True), audio, keep)


def choose_backend(module: nn.Module, name: str) -> str:
    """Set the backend of every norm in a module, and with them of its lateral fusions; other modules keep theirs.

    Args:
        module: a model or a part of one.
        name: "auto" (what `set_backend` chose for the process), "fused", "reference".

    Returns:
        what its supported inputs get: "fused" or "reference"; why is logged once.

    Raises:
        KernelInputError: unknown name, or "fused" without a built library.
    """
    chosen = announce_backend(name)
    for norm in module.modules():
        if isinstance(norm, GhostBatchNorm):
            norm.backend = name
    return chosen


def check_fusion(slow: Tensor, lateral: Tensor, audio: Tensor | None, keep: Tensor | None) -> None:
    """Raise unless the four tensors of a lateral fusion fit each other.

    Raises:
        KernelInputError: naming both shapes.
    """
    if slow.dim() != 5:
        raise KernelInputError(f"slow of shape {tuple(slow.shape)} must be (N, Cs, T, H, W); one frame: unsqueeze(2)")
    if slow.shape[:1] + slow.shape[2:] != lateral.shape[:1] + lateral.shape[2:]:
        raise KernelInputError(
            f"slow {tuple(slow.shape)} and lateral {tuple(lateral.shape)} must agree except in channels"
        )
    if slow.dtype != lateral.dtype:
        raise KernelInputError(f"slow is {slow.dtype} but lateral is {lateral.dtype}; they must be equal")
    same_place(slow, lateral, "lateral")
    if audio is not None:
        same_place(slow, audio, "audio")
        expected = (slow.shape[0], slow.shape[1] + lateral.shape[1], slow.shape[2])
        if audio.shape != expected:
            raise KernelInputError(f"audio {tuple(audio.shape)} must be (N, Cs + Cl, T) = {expected}")
    if keep is not None:
        same_place(slow, keep, "keep")
        if keep.shape != slow.shape[:1]:
            raise KernelInputError(f"keep {tuple(keep.shape)} must be (N,) = ({slow.shape[0]},)")
