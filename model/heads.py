"""Heads: pooled classification, box classification. Legend: N clips, C channels, T frames, H W pixels, K classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

ROI_SIZE = 7
ROI_SCALE = 1 / 16  # of a detection model's res5 map: its stride is 16


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 or wider, whatever autocast and the types of input and weights say.

    Logits rounded to bfloat16 tie: 2 % of single views had two best classes, which cost up to 0.75 points of top-1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) of any floating type -> (..., K) float32; float64 for float64 weights."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return F.linear(x.to(dtype), weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight, bias)


class Classifier(nn.Module):
    """The last fc on concat(visual, audio), written as one layer per modality: without audio its half gets no gradient.

    Args:
        visual_channels, audio_channels: 0 = this modality is absent.
        outputs: K.
        dropout_rate: on both inputs, in training.
    """

    def __init__(self, visual_channels: int, audio_channels: int, outputs: int, dropout_rate: float) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.visual = WideLinear(visual_channels, outputs) if visual_channels else None
        self.audio = WideLinear(audio_channels, outputs, bias=not visual_channels) if audio_channels else None

    def forward(self, visual: Tensor | None, audio: Tensor | None) -> Tensor:
        """Visual (N, ..., C_v) and audio (N, ..., C_a), broadcastable; either None -> logits (N, ..., K) float32."""
        parts = []
        for layer, x in ((self.visual, visual), (self.audio, audio)):
            if layer is not None and x is not None:
                parts.append(layer(F.dropout(x, self.dropout_rate, self.training)).float())
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]


class PooledHead(nn.Module):
    """Average over time and a 7x7 window (stride 1), fc per position; softmax or sigmoid, then mean over positions."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        visual, audio = pooled_channels(config)
        self.window = config.pool_window
        self.activation = "sigmoid" if config.head == "sigmoid" else "softmax"
        self.classifier = Classifier(visual, audio, outputs, config.dropout_rate)

    def forward(self, maps: list[Tensor], audio: Tensor | None, boxes: Tensor | None) -> Tensor:
        """Maps (N, C, T, H, W) and audio (N, C_a) -> (N, K): logits in training, scores in evaluation."""
        visual = None
        if maps:
            pooled = torch.cat([window_mean(x, self.window) for x in maps], 1)
            visual = pooled.permute(0, 2, 3, 1)  # (N, h, w, C)
            audio = None if audio is None else audio[:, None, None]
        logits = self.classifier(visual, audio)
        if not self.training:
            logits = logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)
        return logits.mean((1, 2)) if maps else logits


class DetectionHead(nn.Module):
    """RoIAlign on the time-averaged maps, max over the 7x7 grid, per-class sigmoid (appendix A.7)."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        visual, audio = pooled_channels(config)
        self.classifier = Classifier(visual, audio, outputs, config.dropout_rate)

    def forward(self, maps: list[Tensor], audio: Tensor | None, boxes: Tensor | None) -> Tensor:
        """Maps (N, C, T, H, W), audio (N, C_a), boxes (R, 5) -> (R, K): logits in training, sigmoids in evaluation."""
        from torchvision.ops import roi_align  # it imports torch._dynamo: 2 s that no other head needs

        assert boxes is not None, "AVSlowFast checks its inputs"
        boxes = boxes.float()
        found = []
        for x in maps:
            image = mean_frames(x, torch.float32)  # (N, C, H, W)
            rois = roi_align(image, boxes, ROI_SIZE, ROI_SCALE, sampling_ratio=0, aligned=True)
            found.append(rois.amax((2, 3)))
        if audio is not None:
            audio = audio[boxes[:, 0].long()]
        logits = self.classifier(torch.cat(found, 1), audio)
        return logits if self.training else logits.sigmoid()


def pooled_channels(config: ModelConfig) -> tuple[int, int]:
    """Channels of the pooled visual (Slow + Fast) and audio features."""
    visual = sum(config.channels(p, "res5") for p in ("slow", "fast")) if config.has_visual else 0
    return visual, config.channels("audio", "res5") if config.has_audio else 0


def window_mean(x: Tensor, window: int) -> Tensor:
    """Mean over T and over `window` x `window` pixels (at most the map), stride 1: (N, C, T, H, W) -> (N, C, h, w)."""
    height, width = x.shape[3:]
    return F.avg_pool2d(mean_frames(x), (min(window, height), min(window, width)), stride=1)


def mean_frames(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, T, H, W) -> (N, C, H, W), channels_last; reduced in memory order: the gradient is channels-last too."""
    return x.permute(0, 2, 3, 4, 1).mean(1, dtype=dtype).permute(0, 3, 1, 2)
