"""Lateral connections (section 3.3, Fig. 2): F->S, and the three ways in which audio joins.

Legend: N clips, C channels (s Slow, f Fast, a Audio), T frames, H W pixels, M audio frames, F mel bins.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm, LateralFusion
from model.blocks import ConvNorm, conv
from model.config import LATERAL_RATIO, ModelConfig
from model.drop_pathway import AudioAverage
from model.nonlocal_block import attend, in_wide_range, positions, widened

AUDIO_TAPS = 5  # of both convolutions of an audio lateral


class SyncFeatures(NamedTuple):
    """What the synchronization loss of one level compares: float32 (N, C) each, reference free of audio."""

    reference: Tensor
    positive: Tensor
    negative: Tensor


class AudioInput(NamedTuple):
    """Audio maps (N, C_a, M, F) at one stage, and what is done with them in this iteration."""

    positive: Tensor | None = None  # None: the branch is not computed
    negative: Tensor | None = None  # given: this level's synchronization features are wanted
    fuse: bool = False  # add to vision; False on a dropped step
    keep: Tensor | None = None  # (N,) bool: False drops a clip's audio on the device


class FastToSlow(nn.Module):
    """F->S: k_t x 1 x 1 convolution of Fast, stride alpha_F in time, C_f -> 2 C_f, BN, ReLU, concatenated to Slow."""

    def __init__(self, stage: str, config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels("fast", stage)
        out_channels = LATERAL_RATIO * channels
        self.conv = conv(channels, out_channels, (config.lateral_kernel, 1, 1), (config.alpha_fast, 1, 1))
        self.fuse: nn.Module = LateralFusion(GhostBatchNorm(out_channels, clips_per_group=config.clips_per_bn_group))

    def forward(self, slow: Tensor, fast: Tensor, audio: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Slow (N, C_s, T, H, W), Fast (N, C_f, alpha T, H, W), audio (N, C, T) -> (N, C = C_s + 2 C_f, T, H, W)."""
        out: Tensor = self.fuse(slow, self.conv(fast), audio=audio, keep=keep)
        return out


class AudioLateral(nn.Module):
    """Mean over frequency, then two 5-tap convolutions in time: C_a -> width, stride 1; width -> C, stride s."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        taps = (AUDIO_TAPS, 1)
        self.reduce = ConvNorm(conv(in_channels, config.width, taps), config)
        self.expand = ConvNorm(conv(config.width, out_channels, taps, (stride, 1)), config)

    def forward(self, audio: Tensor) -> Tensor:
        """(N, C_a, M, F) -> (N, C, M / s)."""
        return self.expand(self.reduce(mean_frequency(audio))).squeeze(3)


class VisualFusion(nn.Module):
    """F->S alone: a stage of a visual-only model, or one where audio is not fused."""

    def __init__(self, stage: str, config: ModelConfig) -> None:
        super().__init__()
        self.fast_to_slow = FastToSlow(stage, config)

    def forward(self, slow: Tensor, fast: Tensor, audio: AudioInput) -> tuple[Tensor, Tensor, SyncFeatures | None]:
        """Slow (N, C_s, T, H, W) and Fast -> Slow with 2 C_f more channels, Fast as it was, and no features."""
        return self.fast_to_slow(slow, fast), fast, None


class AudioFusion(nn.Module):
    """Common part of the audiovisual forms; a form gives `reference_channels` and `signal_channels` of its features.

    A form has the parts that something uses: at a stage of the synchronization loss alone, what makes the features.
    """

    reference_channels: int
    signal_channels: int

    def __init__(self, stage: str, config: ModelConfig, fused_channels: int) -> None:
        super().__init__()
        self.fused_channels = fused_channels
        averaged = config.drop_pathway_mode == "running_average" and stage in config.audio_fusion_stages
        self.average = AudioAverage(fused_channels) if averaged else None

    def addend(self, signal: Tensor | None, audio: AudioInput, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to visual maps of x's clips, frames and dtype, and the device-side choice still to apply."""
        if self.average is None:
            return (signal, audio.keep) if audio.fuse else (None, None)
        average, keep = self.average((x.shape[0], self.fused_channels, x.shape[2]), x.dtype), audio.keep
        if signal is None or not audio.fuse:
            return average, None
        added = signal if keep is None else torch.where(keep[:, None, None], signal.to(x.dtype), average)
        self.average.update(signal, keep)
        return added, None


class AudioToFastSlow(AudioFusion):
    """A->FS, the default: audio is added to concat(Slow, F->S); Fast and Audio go on unchanged."""

    def __init__(self, stage: str, config: ModelConfig) -> None:
        channels = config.channels("slow", stage) + LATERAL_RATIO * config.channels("fast", stage)
        super().__init__(stage, config, channels)
        self.fast_to_slow = FastToSlow(stage, config)
        self.reference_channels = self.signal_channels = channels
        stride = config.lateral_stride(stage)
        assert stride is not None, "ModelConfig refuses such stages"
        self.audio = AudioLateral(config.channels("audio", stage), channels, stride, config)

    def forward(self, slow: Tensor, fast: Tensor, audio: AudioInput) -> tuple[Tensor, Tensor, SyncFeatures | None]:
        """As `VisualFusion`, with the audio added and, if a negative is given, the features to compare."""
        signal = None if audio.positive is None else self.audio(audio.positive)
        if signal is None or audio.negative is None:
            added, keep = self.addend(signal, audio, slow)
            return self.fast_to_slow(slow, fast, added, keep), fast, None
        fused = self.fast_to_slow(slow, fast)
        features = SyncFeatures(mean_map(fused), mean_time(signal), mean_time(self.audio(audio.negative)))
        added, keep = self.addend(signal, audio, fused)
        return add_audio(fused, added, keep), fast, features


class AudioToFastToSlow(AudioFusion):
    """A->F->S: audio at Fast's frame rate is added to Fast, which carries it on, and reaches Slow through F->S."""

    def __init__(self, stage: str, config: ModelConfig) -> None:
        channels = config.channels("fast", stage)
        super().__init__(stage, config, channels)
        self.fast_to_slow = FastToSlow(stage, config) if stage in config.lateral_stages else None
        self.reference_channels = config.channels("slow", stage) + channels
        self.signal_channels = channels
        stride = config.lateral_stride(stage) or 1
        self.audio = AudioLateral(config.channels("audio", stage), channels, stride, config)

    def forward(self, slow: Tensor, fast: Tensor, audio: AudioInput) -> tuple[Tensor, Tensor, SyncFeatures | None]:
        """As `VisualFusion`; the Fast that comes out holds the audio, and Slow stays where the stage has no F->S."""
        signal = None if audio.positive is None else self.audio(audio.positive)
        features = None
        if signal is not None and audio.negative is not None:
            reference = torch.cat([mean_map(slow), mean_map(fast)], 1)
            features = SyncFeatures(reference, mean_time(signal), mean_time(self.audio(audio.negative)))
        added, keep = self.addend(signal, audio, fast)
        fast = add_audio(fast, added, keep)
        return (slow if self.fast_to_slow is None else self.fast_to_slow(slow, fast)), fast, features


class AudioVisualNonLocal(AudioFusion):
    """AV Nonlocal: every audio step asks concat(Slow, F->S) over T, H, W; the answer, strided to T, is added.

    Keys and values come from the map max-pooled 1x2x2; inner width 64; dot product; zero-initialised last BN.
    """

    def __init__(self, stage: str, config: ModelConfig) -> None:
        channels = config.channels("slow", stage) + LATERAL_RATIO * config.channels("fast", stage)
        super().__init__(stage, config, channels)
        self.fast_to_slow = FastToSlow(stage, config)
        self.reference_channels, self.signal_channels = channels, config.width
        self.query = conv(config.channels("audio", stage), config.width, (1, 1))
        if stage in config.audio_fusion_stages:  # elsewhere nothing asks for an answer
            stride = config.lateral_stride(stage)
            assert stride is not None, "ModelConfig refuses such stages"
            self.key = conv(channels, config.width, (1, 1, 1))
            self.value = conv(channels, config.width, (1, 1, 1))
            self.out = ConvNorm(conv(config.width, channels, (1, 1), (stride, 1)), config, zero_init=True)

    def forward(self, slow: Tensor, fast: Tensor, audio: AudioInput) -> tuple[Tensor, Tensor, SyncFeatures | None]:
        """As `VisualFusion`; the features compare the map with the mean audio query."""
        fused = self.fast_to_slow(slow, fast)
        if audio.positive is None:
            return add_audio(fused, *self.addend(None, audio, fused)), fast, None
        query = self.query(mean_frequency(audio.positive))  # (N, 64, M, 1)
        features = None
        if audio.negative is not None:
            negative = self.query(mean_frequency(audio.negative))
            features = SyncFeatures(mean_map(fused), mean_map(query), mean_map(negative))
        signal = self.answer(query, fused) if audio.fuse else None
        return add_audio(fused, *self.addend(signal, audio, fused)), fast, features

    def answer(self, query: Tensor, fused: Tensor) -> Tensor:
        """Queries (N, 64, M, 1) on the map (N, C, T, H, W) -> (N, C, T)."""
        pooled = F.max_pool3d(fused, (1, *(min(2, size) for size in fused.shape[3:])))
        key, value = self.key(pooled), self.value(pooled)
        with in_wide_range(query.dtype, query.device):
            query, key, value = (positions(widened(x)) for x in (query, key, value))
            attended = attend(query, key, value)  # (N, M, 64)
            out = self.out(attended.unsqueeze(2).permute(0, 3, 1, 2), relu=False).squeeze(3)
        return out.to(fused.dtype)

    def matmul_multiply_adds(self, slow: Tensor, fast: Tensor, audio: AudioInput) -> int:
        """Multiply-adds of the two matrix products per call."""
        if audio.positive is None or not audio.fuse:
            return 0
        n, _, frames, height, width = slow.shape
        keys = frames * (height // min(2, height)) * (width // min(2, width))
        return 2 * n * audio.positive.shape[2] * keys * self.query.out_channels  # type: ignore[operator,return-value]


FUSIONS: dict[str, type[AudioToFastSlow] | type[AudioToFastToSlow] | type[AudioVisualNonLocal]] = {
    "a_fs": AudioToFastSlow,
    "a_f_s": AudioToFastToSlow,
    "av_nonlocal": AudioVisualNonLocal,
}


def add_audio(x: Tensor, audio: Tensor | None, keep: Tensor | None) -> Tensor:
    """x (N, C, T, H, W) + audio (N, C, T) at every pixel; keep (N,) bool, False selects zero; no ReLU after it."""
    if audio is None:
        return x
    audio = audio.to(x.dtype)
    if keep is not None:
        audio = torch.where(keep[:, None, None], audio, 0)
    return x + audio[:, :, :, None, None]


def mean_frequency(audio: Tensor) -> Tensor:
    """(N, C, M, F) -> (N, C, M, 1), channels_last."""
    rows = audio.permute(0, 2, 3, 1)  # reduced in this order the result is channels_last again
    return rows.mean(2, keepdim=True).permute(0, 3, 1, 2)


def mean_map(x: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """(N, C, ...) channels-last -> (N, C). In the order (N, positions, C) the gradient is channels-last as well."""
    return x.flatten(2).transpose(1, 2).mean(1, dtype=dtype)


def mean_time(signal: Tensor) -> Tensor:
    """(N, C, T) -> (N, C) float32."""
    return signal.transpose(1, 2).mean(1, dtype=torch.float32)
