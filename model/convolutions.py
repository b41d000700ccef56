"""Convolutions of channels-last maps, and how each of them is computed. Legend: N clips, C channels, T H W, M F.

`Convolution._run` is the one place that decides between the plain convolution and the one of grouped pixels.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import stem
from kernels.layout import memory_format, merge_axes, split_axis
from model.pixel_groups import (
    FRAME_CHANNELS,
    MEMORY_CHANNELS,
    PixelGroups,
    TapIndices,
    expand_by_padding,
    expand_weight,
    fit_groups,
    group_pixels,
    has_dense_rows,
    preferred_groups,
    ungroup_pixels,
    widest_groups,
    with_four_channels,
)

Grouping = Literal["auto", "off", "always"]
GROUPINGS: Final = ("auto", "off", "always")


def set_grouping(model: nn.Module, grouping: Grouping) -> None:
    """Say how the narrow convolutions of a model are computed, in place.

    Args:
        model: any module that holds convolutions of this file.
        grouping: "auto": pixels are grouped where it pays (`preferred_groups`); "off": never; "always": by the same
            rule on every device and in every dtype, for tests and measurements.
    Raises:
        ValueError: another name.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping ({grouping}) must be one of {', '.join(GROUPINGS)}")
    for module in model.modules():
        if isinstance(module, Convolution):
            module.grouping = grouping


class Convolution(nn.Module):
    """What 2-D and 3-D convolutions have in common; mixed in before `nn.Conv2d` or `nn.Conv3d`."""

    grouping: Grouping = "auto"
    half_weight: Tensor | None = None  # while a model's forward runs under autocast: see half_weights.py
    _kept: dict[Hashable, tuple[Hashable, Tensor]] | None = None  # see `keep_weights`
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None

    @property
    def used_weight(self) -> Tensor:
        """The weight to convolve with now: its 16-bit copy where there is one that autocast would make, or itself."""
        half, kind = self.half_weight, self.weight.device.type
        if (half is None and self._kept is None) or not torch.is_autocast_enabled(kind):
            return self.weight
        dtype = torch.get_autocast_dtype(kind)
        if half is not None and half.dtype == dtype:
            return half
        return self._keep("weight", dtype, lambda: self.weight.to(dtype)) if self.is_kept else self.weight

    def keep_weights(self) -> None:
        """From now on convert and expand the weight once, not in each call: for a model that does not learn any more.

        What was made of a weight is dropped when it changes in place or is replaced.
        """
        self._kept = {}

    @property
    def is_kept(self) -> bool:
        """Whether what is made of the weight is kept now: see `keep_weights`."""
        return self._kept is not None and not (torch.is_grad_enabled() and self.weight.requires_grad)

    def _keep(self, name: str, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once. A compiled program holds what it makes, a CUDA graph its own memory."""
        assert self._kept is not None
        if torch.compiler.is_compiling():
            return make()
        source = self.weight if name == "weight" else self.bias
        assert source is not None
        stamp = source.data_ptr(), 0 if source.is_inference() else source._version
        found = self._kept.get((name, key))
        if found is None or found[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():  # made in an evaluation, it may meet a gradient later
                found = stamp, make()
            if not (source.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._kept[name, key] = found
        return found[1]

    def takes_four_channels(self, frames: Tensor) -> bool:
        """Whether frames (N, 3, ..., H, W) are convolved in groups, for which they need four channels in memory."""
        return (
            self.in_channels == FRAME_CHANNELS and self._groups(frames, self.stride[-1], self.padding[-1]) is not None
        )

    def _run(
        self, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Tensor:
        """Convolve a view of the input with a view of the weight of as many axes.

        Args:
            x: (N, C, ..., W) channels-last; frames may have their fourth channel.
            weight: (O, C, ..., K).
            stride, padding, dilation: per axis.
        """
        groups = self._groups(x, stride[-1], padding[-1]) if dilation[-1] == 1 else None
        if groups is not None and self.in_channels == FRAME_CHANNELS and x.shape[1] != MEMORY_CHANNELS:
            x = with_four_channels(x, x.dtype)
        if groups is None or not has_dense_rows(x):
            return convolve(x[:, : self.in_channels], weight, self._used_bias(x, 1), stride, padding, dilation)
        y = convolve(
            group_pixels(x, groups.inputs),
            self._grouped_weight(weight, groups, x.shape[1]),
            self._used_bias(x, groups.outputs),
            (*stride[:-1], groups.grouped_stride),
            (*padding[:-1], groups.grouped_padding),
            dilation,
        )
        # A no-op but for float64 on a CPU (tests), which has only a row-major convolution.
        return ungroup_pixels(y.contiguous(memory_format=memory_format(y)), groups.outputs)

    def _groups(self, x: Tensor, stride: int, padding: int) -> PixelGroups | None:
        """The grouped form for rows like x's (of `stride` and `padding` along them), or None."""
        if self.grouping == "off":
            return None
        kind = x.device.type
        if self.grouping == "always":
            preferred = widest_groups(self.in_channels, self.out_channels)
        else:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            preferred = preferred_groups(self.in_channels, self.out_channels, self.kernel_size, kind, dtype)
        if preferred[0] == 1:
            return None
        return fit_groups(preferred, x.shape[-1], self.kernel_size[-1], stride, padding)

    def _grouped_weight(self, weight: Tensor, groups: PixelGroups, channels: int) -> Tensor:
        if torch.compiler.is_compiling():
            return expand_by_padding(weight, groups, channels)

        def expand() -> Tensor:
            """Return W of the weight."""
            cache = self.__dict__.setdefault("_tap_indices", {})
            key = weight.shape, groups, channels, weight.device
            if key not in cache:
                cache[key] = TapIndices(*key)
            return expand_weight(weight, cache[key])

        if not self.is_kept:
            return expand()
        return self._keep("weight", (groups, channels, weight.shape, weight.dtype), expand)

    def _used_bias(self, x: Tensor, repeats: int) -> Tensor | None:
        """The bias for `repeats` pixels of each output pixel, in the dtype to convolve in where it is kept."""
        bias, kind = self.bias, x.device.type
        if bias is None or not self.is_kept:
            return bias if bias is None or repeats == 1 else bias.repeat(repeats)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else bias.dtype
        return self._keep("bias", (repeats, dtype), lambda: bias.to(dtype).repeat(repeats))


class Conv2d(Convolution, nn.Conv2d):  # type: ignore[misc]
    """Conv2d of channels_last maps."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, M, F) channels_last -> (N, C', M', F') channels_last."""
        return self._run(x, self.used_weight, self.stride, self.padding, self.dilation)


class FactoredConv3d(Convolution, nn.Conv3d):  # type: ignore[misc]
    """Conv3d that runs kernels of one frame or of one pixel as 2-D convolutions on views; weights stay 5-D.

    A channels_last_3d map is N*T channels_last images, and also N channels_last images of T x (H*W). Both are views, so
    nothing is copied, and 2-D channels_last convolutions are the ones that libraries have tuned (and, on a CPU with one
    thread, the only ones that keep the layout). All of Table 1 but Fast's conv1 factors like this.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) channels_last_3d -> (N, C', T', H', W') channels_last_3d.

        A convolution of frames also takes them with their fourth channel in memory, which is zero.
        """
        frames = self._stem_frames(x)
        if frames is not None:
            y, bias = stem.stem_conv(frames, self.weight), self._used_bias(frames, 1)
            return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1, 1)
        taps, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        if taps[0] == 1 and stride[0] == 1:
            images = merge_axes(x, 0)  # (N*T, C, H, W)
            y = self._run(images, self.used_weight.squeeze(2), stride[1:], padding[1:], dilation[1:])
            return split_axis(y, 0, (x.shape[0], x.shape[2]))
        if taps[1:] == (1, 1) and stride[1:] == (1, 1):
            rows = merge_axes(x, 2)  # (N, C, T, H*W)
            y = self._run(rows, self.used_weight.squeeze(4), (stride[0], 1), (padding[0], 0), (1, 1))
            return split_axis(y, 2, x.shape[3:])
        y = self._run(x, self.used_weight, stride, padding, dilation)
        # A no-op wherever libraries keep the layout; float64 on a CPU (tests) has only a row-major convolution.
        return y.contiguous(memory_format=torch.channels_last_3d)

    def _stem_frames(self, x: Tensor) -> Tensor | None:
        """Frames as the library's own kernels take them (a conv1, grouping "auto"), or None where they do not."""
        geometry = tuple(self.stride), tuple(self.padding), tuple(self.dilation)
        taken = stem.STRIDE, stem.padding(self.weight), (1, 1, 1)
        if self.grouping != "auto" or geometry != taken:
            return None
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if not stem.serves(kind, dtype) or x.requires_grad or tuple(self.weight.shape) not in stem.STEM_WEIGHTS:
            return None
        frames = x.to(dtype) if x.shape[1] == MEMORY_CHANNELS else with_four_channels(x, dtype)
        return frames if stem.covers(frames, self.weight) else None


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`F.conv2d` or `F.conv3d` of a channels-last input, by the axes of `weight`; y in autocast's dtype, else in x's.

    Two weight gradients of PyTorch 2.14 on CPUs are kept out, as they write outside their memory without an error:

    - of strided 1x1 convolutions of few input channels (up to 8 with stride 2 in both axes, below 16 with a stride in
      one): the positions are picked first. No variant of the table has so few.
    - of maps that `_is_small` in bfloat16 (seen with AVX-512), which is also wrong: they are convolved in float32.
    """
    apply = F.conv2d if weight.dim() == 4 else F.conv3d
    geometry = tuple(padding), tuple(dilation)
    if x.device.type == "cpu":
        if weight.shape[1] < 16 and weight.shape[2:] == (1, 1) and max(stride) > 1:
            rows = x.movedim(1, -1)[:, :: stride[0], :: stride[1]]  # channels last, so that the gradient has them last
            x, stride = rows.movedim(-1, 1), (1, 1)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype in (torch.bfloat16, torch.float16) and _is_small(x, weight):
            with torch.autocast("cpu", enabled=False):
                wide_bias = bias if bias is None else bias.float()
                return apply(x.float(), weight.float(), wide_bias, tuple(stride), *geometry).to(dtype)
    return apply(x, weight, bias, tuple(stride), *geometry)


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3-D map is shorter than the kernel along an axis, or a 2-D one is a single column of a wider kernel."""
    if weight.dim() == 4:
        return x.shape[3] == 1 < weight.shape[3]
    return any(n < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))
