"""Normalisation and lateral fusion as the model uses them. Legend: N clips, C channels, T frames, H W pixels."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels import eager
from kernels.backend import announce_backend, blocked_groups, set_backend, use_fused
from kernels.layout import KernelInputError, check_channels_last, check_precision, group_count, same_place
from kernels.nodes import NormAct, fork_norm_act
from kernels.running import joint_statistics_update, track_statistics
from kernels.sync import sync_norm

__all__ = [
    "GhostBatchNorm",
    "LateralFusion",
    "choose_backend",
    "joint_statistics_update",
    "set_backend",
]


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
        fork: bool = False,
    ) -> Any:
        """Normalise; add the residual, itself normalised if a norm is given; rectify; or rectify and pool (the stem).

        Args:
            x: (N, C, T, H, W) channels_last_3d or (N, C, H, W) channels_last; float16, bfloat16, float32 or float64.
            residual: like x, or None.
            residual_norm: the projection shortcut's normalisation, applied to residual.
            relu: end with max(., 0).
            pool: then max pooling 1x3x3, stride 1,2,2, padding 0,1,1, in the same operation; with relu, no residual.
            fork: give the output twice, for two readers (the next block's convolution and its shortcut): the same
                memory, which nobody may write to, with a gradient each; this operation's backward adds them.

        Returns:
            like x, same strides for a dense x; (N, C, T, ceil(H/2), ceil(W/2)) with pool; with fork a pair of it.

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
        if fork and not pool and self._can_fork(x, residual_norm):
            return self._fused(x, residual, residual_norm, relu, fork=True)
        y = self._pooled(x, residual, relu) if pool else self._single(x, residual, residual_norm, relu)
        return (y, y) if fork else y

    def _can_fork(self, x: Tensor, other: "GhostBatchNorm | None") -> bool:
        """Whether one operation serves both readers; elsewhere autograd adds their gradients."""
        synchronized = self._is_synchronized or (other is not None and other._is_synchronized)
        return use_fused(x, self.backend) and not synchronized and not torch.compiler.is_compiling()

    def _single(self, x: Tensor, residual: Tensor | None, residual_norm: "GhostBatchNorm | None", relu: bool) -> Tensor:
        if self._is_synchronized or (residual_norm is not None and residual_norm._is_synchronized):
            return self._synchronized(x, residual, residual_norm, relu)
        if use_fused(x, self.backend):
            y: Tensor = self._fused(x, residual, residual_norm, relu)
            return y
        if residual is None:
            return self._normalize(x, relu)
        if residual_norm is not None:
            residual = residual_norm._normalize(residual)
        return eager.end_block(self._normalize(x), residual, relu)

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
            return eager.normalize(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, relu)
        groups = group_count(x.shape[0], self.clips_per_group)
        y, stats = eager.batch_norm(x, self.weight, self.bias, self.eps, groups, relu)
        self._track(stats)
        return y

    def _fused(
        self, x: Tensor, residual: Tensor | None, other: "GhostBatchNorm | None", relu: bool, fork: bool = False
    ) -> Any:
        groups = self._groups(x)
        if residual is not None and other is not None:
            if self.uses_batch_statistics and other.uses_batch_statistics and other._groups(x) != groups:
                residual, other = other.forward(residual), None
            elif other.uses_batch_statistics:
                groups = other._groups(x)
        mean, variance = self._given()
        other_mean, other_variance = (None, None) if other is None else other._given()
        given = NormAct(
            x=x,
            weight=self.weight,
            bias=self.bias,
            mean=mean,
            variance=variance,
            eps=self.eps,
            residual=residual,
            residual_weight=None if other is None else other.weight,
            residual_bias=None if other is None else other.bias,
            residual_mean=other_mean,
            residual_variance=other_variance,
            residual_eps=self.eps if other is None else other.eps,
            project=other is not None,
            groups=groups,
            relu=relu,
            blocked=blocked_groups(x.device.type),
        )
        if fork:
            y, again, stats, other_stats = fork_norm_act(given)
        else:
            y, _, stats, _, other_stats, _ = torch.ops.avsf.norm_act(*given)
        if self.uses_batch_statistics:
            self._track(stats)
        if other is not None and other.uses_batch_statistics:
            other._track(other_stats)
        return (y, again) if fork else y

    def _pooled(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if residual is not None or not relu:
            raise KernelInputError(
                f"pool needs relu=True (is {relu}) and no residual (given: {residual is not None}); "
                "pool in a step of its own"
            )
        if self._is_synchronized or not use_fused(x, self.backend):
            return eager.max_pool(self.forward(x, relu=True))
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
        return eager.end_block(y, residual if other is None else other.forward(residual), relu)

    def _groups(self, x: Tensor) -> int:
        return group_count(x.shape[0], self.clips_per_group) if self.uses_batch_statistics else 1

    def _given(self) -> tuple[Tensor | None, Tensor | None]:
        """Running statistics where they are used, else none."""
        return (None, None) if self.uses_batch_statistics else (self.running_mean, self.running_var)

    def _track(self, stats: Tensor) -> None:
        """Fold (G, 3, C) statistics of this batch into the running ones, or hand them to `precise_bn`."""
        if self.collected is not None:
            self.collected.append(stats)
        else:
            track_statistics(self, stats)


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
        """concat(slow, relu(norm(lateral))) + audio of the clips that are kept.

        Args:
            slow: (N, Cs, T, H, W) finished stage output, channels_last_3d.
            lateral: (N, Cl, T, H, W) F->S convolution before BN and ReLU, channels_last_3d, dtype of slow.
            audio: (N, Cs + Cl, T), added at every H, W; None = host-side drop.
            keep: (N,) bool, device-side drop: False selects zero; None keeps all.

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
                keep,
                norm._groups(lateral),
            )
            if norm.uses_batch_statistics:
                norm._track(stats)
            return out
        return eager.fuse_lateral(slow, norm.forward(lateral, relu=True), audio, keep)


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
        if keep.shape != slow.shape[:1] or keep.dtype != torch.bool:
            raise KernelInputError(f"keep {tuple(keep.shape)} {keep.dtype} must be (N,) = ({slow.shape[0]},) bool")
