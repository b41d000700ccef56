"""The instantiations of the paper's tables, by name. The rule: numbers are the default, text is an option.

AV models whose paper row contains the laterals of the synchronization loss are named with it (`sync_loss`).
"""

from dataclasses import replace
from typing import Any, Final

from model.config import ModelConfig

ALL_LATERALS: Final = ("pool1", "res2", "res3", "res4")
NONLOCAL = (6, 13, 20)  # blocks of Slow's res4 in R101

_R50_AV = ModelConfig(sync_loss="contrastive")  # AVSlowFast R50 4x16 on Kinetics-400: Table 1, row 2 of Table 3
_R50_V = replace(_R50_AV, pathways=("slow", "fast"), fusion="none", lateral_stages=ALL_LATERALS, sync_loss="none")
_8X8: dict[str, Any] = {"num_frames": 8, "frame_stride": 8, "alpha_fast": 4, "alpha_audio": 16}
_16X8: dict[str, Any] = {"num_frames": 16, "frame_stride": 8, "alpha_fast": 4, "alpha_audio": 16}
_16X4: dict[str, Any] = {
    "num_frames": 16,
    "frame_stride": 4,
    "alpha_fast": 2,
    "alpha_audio": 8,
}  # alpha_F 4 would cost 124.8 G
_R101_AV = replace(_R50_AV, depth=101, num_mel_bins=40, **_8X8)
_R101_V = replace(_R50_V, depth=101, res4_temporal_blocks=6, **_8X8)
_AVA: dict[str, Any] = {"head": "detection", "num_classes": 80, "sync_loss": "none"}
_SSL = replace(
    _R50_AV,
    fusion="none",
    lateral_stages=(),
    num_mel_bins=40,
    head="ssl",
    sync_loss="contrastive",
    sync_levels=("pool5",),
)
_PROBE = replace(
    _SSL,
    head="softmax",
    num_classes=101,
    sync_loss="none",
    freeze="backbone",
)
_AUDIO = replace(_R50_AV, pathways=("audio",), fusion="none", sync_loss="none")

VARIANTS: dict[str, ModelConfig] = {
    # Kinetics (Table 3) and what fine-tunes from it (EPIC, Table 2: 8x8 R101)
    "slowfast_r50_4x16": _R50_V,
    "avslowfast_r50_4x16": _R50_AV,
    "slowfast_r50_8x8": replace(_R50_V, lateral_kernel=7, **_8X8),  # as released
    "avslowfast_r50_8x8": replace(_R50_AV, **_8X8),
    "slowfast_r101_8x8": _R101_V,
    "avslowfast_r101_8x8": _R101_AV,
    # Charades (Table 4)
    "slowfast_r101_nl_16x8": replace(
        _R101_V, nonlocal_blocks=NONLOCAL, head="sigmoid", num_classes=157, dropout_rate=0.7, **_16X8
    ),
    "avslowfast_r101_nl_16x8": replace(
        _R101_AV, nonlocal_blocks=NONLOCAL, head="sigmoid", num_classes=157, dropout_rate=0.7, **_16X8
    ),
    # Ablations of AVSlowFast R50 4x16 (Tables 5 and 6)
    "avslowfast_r50_4x16_a_f_s": replace(_R50_AV, fusion="a_f_s"),
    "avslowfast_r50_4x16_av_nonlocal": replace(_R50_AV, fusion="av_nonlocal"),
    "avslowfast_r50_4x16_beta_1_8": replace(_R50_AV, beta_audio=1 / 8),
    "avslowfast_r50_4x16_beta_1_4": replace(_R50_AV, beta_audio=1 / 4),
    "avslowfast_r50_4x16_beta_1": replace(_R50_AV, beta_audio=1.0),
    "avslowfast_r50_4x16_pool5": replace(_R50_AV, lateral_stages=(), fusion_stages=(), sync_levels=("res5",)),
    "avslowfast_r50_4x16_res4": replace(
        _R50_AV, lateral_stages=("res4",), fusion_stages=("res4",), sync_levels=("res4", "res5")
    ),
    "avslowfast_r50_4x16_res234": replace(
        _R50_AV, lateral_stages=("res2", "res3", "res4"), fusion_stages=("res2", "res3", "res4")
    ),
    # AVA (Table 7): 256x320, 40 mel bins
    "slowfast_r50_4x16_ava": replace(_R50_V, **_AVA),
    "avslowfast_r50_4x16_ava": replace(_R50_AV, num_mel_bins=40, **_AVA),
    "slowfast_r101_nl_8x8_ava": replace(_R101_V, nonlocal_blocks=NONLOCAL, **_AVA),
    "avslowfast_r101_nl_8x8_ava": replace(_R101_AV, nonlocal_blocks=NONLOCAL, **_AVA),
    # Self-supervised (Tables 8, A.1): no laterals; pretraining, then the linear probe
    "avslowfast_r50_4x16_ssl": _SSL,
    "avslowfast_r50_8x8_ssl": replace(_SSL, **_8X8),
    "avslowfast_r50_16x4_ssl": replace(_SSL, **_16X4),
    "slowfast_r50_4x16_ssl": replace(_SSL, pathways=("slow", "fast"), sync_loss="none"),
    "avslowfast_r50_4x16_probe": _PROBE,
    "avslowfast_r50_8x8_probe": replace(_PROBE, **_8X8),
    "avslowfast_r50_16x4_probe": replace(_PROBE, **_16X4),
    "slowfast_r50_4x16_probe": replace(_PROBE, pathways=("slow", "fast")),
    # Audio only (Table A.3)
    "audio_r50": _AUDIO,
    "audio_r50_beta_1": replace(_AUDIO, beta_audio=1.0),
    # The default model without synchronization, at a size that two CPU cores train in real time: 64 px, 64 log-mels.
    "small": replace(
        _R50_AV,
        sync_loss="none",
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
