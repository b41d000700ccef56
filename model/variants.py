"""The instantiations of the paper's tables, by name. The rule: numbers are the default, text is an option."""

from dataclasses import replace

from model.config import ModelConfig

ALL_LATERALS = ("pool1", "res2", "res3", "res4")
NONLOCAL = (6, 13, 20)  # blocks of Slow's res4 in R101

_AV = ModelConfig()  # AVSlowFast R50 4x16
_AV_8X8 = replace(_AV, num_frames=8, frame_stride=8, alpha_fast=4, alpha_audio=16)
_V = replace(_AV, pathways=("slow", "fast"), fusion="none", lateral_stages=ALL_LATERALS)

VARIANTS: dict[str, ModelConfig] = {
    "avslowfast_r50_4x16": _AV,
    "avslowfast_r50_8x8": _AV_8X8,
    "slowfast_r50_4x16": _V,
    # Every part of the large model at a size that two CPU cores train in real time: 64 px, 64 log-mel frames.
    "small": replace(
        _AV,
        num_classes=8,
        depth=14,
        width=16,
        alpha_fast=4,
        alpha_audio=16,
        beta_fast=1 / 4,
        num_mel_bins=40,
        pool_window=2,
    ),
}
