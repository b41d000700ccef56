"""Slow and Fast pathways of Table 1. Legend: N clips, C channels, T frames, H W pixels."""

from torch import Tensor, nn

from model.blocks import Bottleneck, ConvNorm, Stage, conv
from model.config import EXPANSION, RES_STAGES, ModelConfig
from model.nonlocal_block import NonLocalBlock

# Temporal taps of Table 1: conv1, then the first convolution of a block of res2, res3, res4, res5.
TEMPORAL_TAPS = {"slow": (1, 1, 1, 3, 3), "fast": (5, 3, 3, 3, 3)}


class VisualPathway(nn.Module):
    """Slow or Fast: conv1 and pool1, then res2 to res5 as `stages`.

    Args:
        pathway: "slow" or "fast".
        config: the model.
        lateral_channels: channels that fusion adds to this pathway's map after each stage.
    """

    def __init__(self, pathway: str, config: ModelConfig, lateral_channels: dict[str, int]) -> None:
        super().__init__()
        base = config.base_channels(pathway)
        self.stem = ConvNorm(conv(3, base, (TEMPORAL_TAPS[pathway][0], 7, 7), (1, 2, 2)), config)
        self.stages = nn.ModuleDict()
        in_channels = base + lateral_channels.get("pool1", 0)
        for index, stage in enumerate(RES_STAGES):
            width = base << index
            blocks = _stage_blocks(pathway, index, in_channels, width, config)
            self.stages[stage] = Stage(blocks, config.activation_checkpointing)
            in_channels = EXPANSION * width + lateral_channels.get(stage, 0)

    def forward(self, frames: Tensor) -> Tensor:
        """conv1 and pool1: (N, 3, T, H, W) -> (N, C, T, H/4, W/4), channels_last_3d."""
        out: Tensor = self.stem(frames, pool=True)
        return out


def _stage_blocks(pathway: str, index: int, in_channels: int, width: int, config: ModelConfig) -> dict[str, nn.Module]:
    stage = RES_STAGES[index]
    detection = stage == "res5" and config.head == "detection"  # AVA: stride 1, dilation 2 (appendix A.7)
    temporal = config.res4_temporal_blocks if stage == "res4" else 0
    blocks: dict[str, nn.Module] = {}
    for block in range(config.stage_blocks[index]):
        strided = block == 0 and stage != "res2" and not detection
        taps = TEMPORAL_TAPS[pathway][index + 1] if not temporal or block < temporal else 1
        blocks[str(block)] = Bottleneck(
            in_channels if block == 0 else EXPANSION * width,
            width,
            config,
            reduce=(taps, 1, 1),
            middle=(1, 3, 3),
            stride=(1, 2, 2) if strided else (1, 1, 1),
            dilation=2 if detection else 1,
        )
        if pathway == "slow" and stage == "res4" and block in config.nonlocal_blocks:
            blocks[f"nonlocal{block}"] = NonLocalBlock(EXPANSION * width, config)
    return blocks
