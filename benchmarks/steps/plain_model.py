"""The same network in plain PyTorch, as PySlowFast writes it: what the opponents of `benchmarks.step` run.

`nn.Conv3d`, `nn.BatchNorm3d`, ReLU, MaxPool3d, concatenation and addition as separate modules and calls; the whole
batch is one normalisation group. Nothing of `kernels` and no block of `model` is used. The names of the parameters are
those of `model.AVSlowFast`, so that weights of one load into the other and a test holds the two together.

Legend: N clips, C channels, T frames, H W pixels, M audio frames, F mel bins.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EXPANSION, LATERAL_RATIO, RES_STAGES, STAGES, ModelConfig

NormView = Literal["5-D", "4-D"]
TEMPORAL_TAPS = {"slow": (1, 1, 1, 3, 3), "fast": (5, 3, 3, 3, 3)}  # conv1, res2, res3, res4, res5 of Table 1


class FlatBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm3d through the view (N, C, T*H, W) of a channels_last_3d map: cuDNN's faster path."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) channels_last_3d -> the same."""
        n, c, t, h, w = x.shape
        view = x.permute(0, 2, 3, 4, 1).reshape(n, t * h, w, c).permute(0, 3, 1, 2)
        buffers = self.running_mean, self.running_var
        y = F.batch_norm(view, *buffers, self.weight, self.bias, self.training, self.momentum or 0.1, self.eps)
        return y.permute(0, 2, 3, 1).reshape(n, t, h, w, c).permute(0, 4, 1, 2, 3)


class ViewConv3d(nn.Conv3d):
    """Conv3d that runs kernels of one frame, or of one pixel, as a 2-D convolution of a channels_last view."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) channels_last_3d -> (N, C', T', H', W') channels_last_3d."""
        n, c, t, h, w = x.shape
        assert not isinstance(self.padding, str)
        if self.kernel_size[1:] == (1, 1) and self.stride[1:] == (1, 1) and self.kernel_size[0] > 1:
            rows = x.permute(0, 2, 3, 4, 1).reshape(n, t, h * w, c).permute(0, 3, 1, 2)
            y = F.conv2d(rows, self.weight.squeeze(4), self.bias, (self.stride[0], 1), (self.padding[0], 0))
            return y.permute(0, 2, 3, 1).reshape(n, y.shape[2], h, w, y.shape[1]).permute(0, 4, 1, 2, 3)
        if self.kernel_size[0] != 1 or self.stride[0] != 1:
            return super().forward(x)
        images = x.permute(0, 2, 3, 4, 1).reshape(n * t, h, w, c).permute(0, 3, 1, 2)
        y = F.conv2d(images, self.weight.squeeze(2), self.bias, self.stride[1:], self.padding[1:])
        return y.permute(0, 2, 3, 1).reshape(n, t, *y.shape[2:], y.shape[1]).permute(0, 4, 1, 2, 3)


class Parts:
    """Makes convolutions and norms of one kind.

    Args:
        view: "5-D": BatchNorm3d; "4-D": the same through a view.
        factored: kernels of one frame as 2-D convolutions (channels-last only).
    """

    def __init__(self, view: NormView, factored: bool) -> None:
        self.norm3d = FlatBatchNorm3d if view == "4-D" else nn.BatchNorm3d
        self.conv3d = ViewConv3d if factored else nn.Conv3d
        self.channels_last = factored
        self.inplace = view != "4-D"  # in place on a view, autograd would copy the map twice

    def conv(self, inside: int, outside: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> nn.Module:
        """Convolution without bias, centred."""
        kind = self.conv3d if len(kernel) == 3 else nn.Conv2d
        return kind(inside, outside, kernel, stride, tuple(k // 2 for k in kernel), bias=False)  # type: ignore[arg-type]

    def norm(self, channels: int, axes: int) -> nn.Module:
        """Batch normalisation of a map with `axes` axes after the channels."""
        return self.norm3d(channels) if axes == 3 else nn.BatchNorm2d(channels)

    def relu(self) -> nn.Module:
        """Rectification, in place where that is cheaper."""
        return nn.ReLU(self.inplace)


class ConvNorm(nn.Module):
    """Convolution and normalisation."""

    def __init__(
        self, parts: Parts, inside: int, outside: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.conv = parts.conv(inside, outside, kernel, stride)
        self.norm = parts.norm(outside, len(kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        out: Tensor = self.norm(self.conv(x))
        return out


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(
        self,
        parts: Parts,
        inside: int,
        width: int,
        reduce: tuple[int, ...],
        middle: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.relu = parts.relu()
        point = one = (1,) * len(middle)
        outside = EXPANSION * width
        self.a = ConvNorm(parts, inside, width, reduce, one)
        self.b = ConvNorm(parts, width, width, middle, stride)
        self.c = ConvNorm(parts, width, outside, point, one)
        projected = inside != outside or stride != one
        self.shortcut = ConvNorm(parts, inside, outside, point, stride) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Map to map, rectified."""
        y = self.relu(self.a(x))
        y = self.c(self.relu(self.b(y)))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class TwoAxes(nn.Module):
    """Convolutions along time and along frequency, summed or concatenated, then normalised and rectified."""

    def __init__(self, parts: Parts, inside: int, width: int, taps: int, stride: int, joined: str) -> None:
        super().__init__()
        self.relu = parts.relu()
        self.joined = joined
        self.time = parts.conv(inside, width, (taps, 1), (stride, stride))
        self.frequency = parts.conv(inside, width, (1, taps), (stride, stride))
        self.norm = parts.norm(width if joined == "sum" else 2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, M, F) to (N, C', M', F')."""
        time, frequency = self.time(x), self.frequency(x)
        y = time + frequency if self.joined == "sum" else torch.cat([time, frequency], 1)
        return self.relu(self.norm(y))


class TimeFrequencyBlock(nn.Module):
    """Block of audio res2 and res3."""

    def __init__(self, parts: Parts, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.relu = parts.relu()
        outside = EXPANSION * width
        self.split = TwoAxes(parts, inside, width, 3, stride, "concat")
        self.c = ConvNorm(parts, 2 * width, outside, (1, 1), (1, 1))
        projected = inside != outside or stride != 1
        self.shortcut = ConvNorm(parts, inside, outside, (1, 1), (stride, stride)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Map to map, rectified."""
        y = self.c(self.split(x))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class VisualPathway(nn.Module):
    """Slow or Fast; `added`: channels that fusion adds after each stage."""

    def __init__(self, parts: Parts, pathway: str, config: ModelConfig, added: dict[str, int]) -> None:
        super().__init__()
        self.channels_last = parts.channels_last
        self.relu = parts.relu()
        base, taps = config.base_channels(pathway), TEMPORAL_TAPS[pathway]
        self.stem = ConvNorm(parts, 3, base, (taps[0], 7, 7), (1, 2, 2))
        self.stages = nn.ModuleDict()
        inside = base + added.get("pool1", 0)
        for index, stage in enumerate(RES_STAGES):
            width, blocks = base << index, []
            for block in range(config.stage_blocks[index]):
                limited = stage == "res4" and 0 < config.res4_temporal_blocks <= block
                reduce = (1 if limited else taps[index + 1], 1, 1)
                stride = (1, 2, 2) if block == 0 and stage != "res2" else (1, 1, 1)
                blocks.append(Bottleneck(parts, inside, width, reduce, (1, 3, 3), stride))
                inside = EXPANSION * width
            self.stages[stage] = nn.Sequential(*blocks)
            inside += added.get(stage, 0)

    def forward(self, frames: Tensor) -> Tensor:
        """conv1 and pool1."""
        y = self.relu(self.stem(frames))
        if not self.channels_last:
            return F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        n, c, t, h, w = y.shape  # the 2-D form has a kernel for channels_last
        images = F.max_pool2d(y.permute(0, 2, 3, 4, 1).reshape(n * t, h, w, c).permute(0, 3, 1, 2), 3, 2, 1)
        return images.permute(0, 2, 3, 1).reshape(n, t, *images.shape[2:], c).permute(0, 4, 1, 2, 3)


class AudioPathway(nn.Module):
    """conv1 without pooling, res2 and res3 in two axes, res4 and res5 with 3x3."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        inside = config.base_channels("audio")
        self.stem = TwoAxes(parts, 1, inside, 9, 1, "sum")
        self.stages = nn.ModuleDict()
        for index, stage in enumerate(RES_STAGES):
            width, blocks = config.base_channels("audio") << index, []
            for block in range(config.stage_blocks[index]):
                stride = 1 if block else config.audio_res2_stride if stage == "res2" else 2
                blocks.append(
                    TimeFrequencyBlock(parts, inside, width, stride)
                    if stage in ("res2", "res3")
                    else Bottleneck(parts, inside, width, (1, 1), (3, 3), (stride, stride))
                )
                inside = EXPANSION * width
            self.stages[stage] = nn.Sequential(*blocks)


class AudioLateral(nn.Module):
    """Mean over frequency and two 5-tap convolutions in time."""

    def __init__(self, parts: Parts, inside: int, outside: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        self.relu = parts.relu()
        self.reduce = ConvNorm(parts, inside, config.width, (5, 1), (1, 1))
        self.expand = ConvNorm(parts, config.width, outside, (5, 1), (stride, 1))

    def forward(self, audio: Tensor) -> Tensor:
        """(N, C_a, M, F) -> (N, C, T, 1, 1)."""
        y = self.relu(self.reduce(audio.mean(3, keepdim=True)))
        return self.relu(self.expand(y)).unsqueeze(4)


class FastToSlow(nn.Module):
    """Time-strided convolution of Fast, normalised, rectified, concatenated to Slow."""

    def __init__(self, parts: Parts, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.relu = parts.relu()
        kernel, stride = (config.lateral_kernel, 1, 1), (config.alpha_fast, 1, 1)
        self.conv = parts.conv(channels, LATERAL_RATIO * channels, kernel, stride)
        self.fuse = nn.ModuleDict({"norm": parts.norm(LATERAL_RATIO * channels, 3)})

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """Slow with 2 C_f more channels."""
        return torch.cat([slow, self.relu(self.fuse["norm"](self.conv(fast)))], 1)


class Lateral(nn.Module):
    """F->S and, where audio is fused, A->FS after one stage."""

    def __init__(self, parts: Parts, stage: str, config: ModelConfig) -> None:
        super().__init__()
        fast = config.channels("fast", stage)
        self.fast_to_slow = FastToSlow(parts, fast, config)
        self.audio: AudioLateral | None = None
        if stage in config.audio_fusion_stages:
            outside = config.channels("slow", stage) + LATERAL_RATIO * fast
            stride = config.num_mel_frames // config.audio_stride(stage) // config.num_frames
            self.audio = AudioLateral(parts, config.channels("audio", stage), outside, stride, config)

    def forward(self, slow: Tensor, fast: Tensor, audio: Tensor | None) -> Tensor:
        """The fused Slow map."""
        fused: Tensor = self.fast_to_slow(slow, fast)
        return fused if audio is None or self.audio is None else fused + self.audio(audio)


class Classifier(nn.Module):
    """One fc over the pooled modalities."""

    def __init__(self, visual: int, audio: int, outputs: int) -> None:
        super().__init__()
        self.visual = nn.Linear(visual, outputs)
        self.audio = nn.Linear(audio, outputs, bias=False) if audio else None


class PlainAVSlowFast(nn.Module):
    """AVSlowFast with A->FS fusion, or a visual-only SlowFast, with a softmax head of one position.

    Args:
        config: of the model; without Non-local blocks.
        view: how batch normalisation sees a visual map.
        factored: kernels of one frame as 2-D convolutions; only for channels_last_3d frames.

    Raises:
        ValueError: a configuration that this form does not hold.
    """

    def __init__(self, config: ModelConfig, *, view: NormView = "5-D", factored: bool = False) -> None:
        super().__init__()
        check_plain(config)
        parts = Parts(view, factored)
        self.config, self.channels_last = config, factored
        self.stages = nn.ModuleDict({stage: Lateral(parts, stage, config) for stage in config.lateral_stages})
        added: dict[str, int] = {
            stage: LATERAL_RATIO * config.channels("fast", stage) for stage in config.lateral_stages
        }
        self.slow = VisualPathway(parts, "slow", config, added)
        self.fast = VisualPathway(parts, "fast", config, {})
        self.audio = AudioPathway(parts, config) if config.has_audio else None
        visual = sum(config.channels(pathway, "res5") for pathway in ("slow", "fast"))
        audio = config.channels("audio", "res5") if config.has_audio else 0
        self.head = nn.ModuleDict({"classifier": Classifier(visual, audio, config.num_classes)})

    def forward(self, frames: Tensor, log_mel: Tensor | None = None) -> Tensor:
        """Frames (N, 3, alpha T, H, W), log-mel (N, 1, M, F) or None (a dropped step) -> logits (N, K), float32."""
        config = self.config
        slow = self.slow(frames[:, :, :: config.alpha_fast])
        fast, audio = self.fast(frames), log_mel
        for stage in STAGES:
            if audio is not None and self.audio is not None:
                audio = self.audio.stem(audio) if stage == "pool1" else self.audio.stages[stage](audio)
            if stage != "pool1":
                slow, fast = self.slow.stages[stage](slow), self.fast.stages[stage](fast)
            if stage in self.stages:
                slow = self.stages[stage](slow, fast, audio)
        head: nn.Module = self.head["classifier"]
        rate = config.dropout_rate
        pooled = torch.cat([self._mean(slow), self._mean(fast)], 1)
        logits: Tensor = head.visual(F.dropout(pooled, rate, self.training)).float()
        if audio is not None and head.audio is not None:
            logits = logits + head.audio(F.dropout(audio.mean((2, 3)), rate, self.training)).float()
        return logits

    def _mean(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, C); reduced in memory's order, so that the gradient lies as the map does."""
        return x.permute(0, 2, 3, 4, 1).flatten(1, 3).mean(1) if self.channels_last else x.mean((2, 3, 4))


def check_plain(config: ModelConfig) -> None:
    """Raise ValueError for a configuration that `PlainAVSlowFast` does not hold."""
    if config.head not in ("softmax", "sigmoid") or not config.has_visual:
        raise ValueError(f"head ({config.head}) and pathways ({', '.join(config.pathways)}) must classify frames")
    if config.nonlocal_blocks or config.fusion not in ("none", "a_fs") or config.audio_block != "parallel":
        raise ValueError("the plain model has A->FS fusion, parallel audio blocks and no Non-local blocks")


def build_plain(config: ModelConfig, *, view: NormView, channels_last: bool) -> PlainAVSlowFast:
    """A plain model with PyTorch's default initialisation, in train mode.

    Args:
        config: of the model.
        view: of batch normalisation; "4-D" needs channels_last.
        channels_last: weights and 2-D views for channels_last_3d frames; else everything contiguous (NCDHW).
    """
    model = PlainAVSlowFast(config, view=view, factored=channels_last)
    for module in model.modules() if channels_last else ():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return model.train()
