"""Audio pathway of Table 1. Legend: N clips, C channels, M audio frames, F mel bins."""

from torch import Tensor, nn

from model.blocks import Bottleneck, Stage, TimeFrequencyBlock, TwoAxes
from model.config import EXPANSION, RES_STAGES, ModelConfig


class AudioPathway(nn.Module):
    """conv1 (9 taps in time + 9 in frequency, summed; no pooling), then res2 to res5 as `stages`.

    res2 and res3 treat time and frequency apart, res4 and res5 use 3x3; from res3 on every stage halves both axes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        base = config.base_channels("audio")
        self.stem = TwoAxes(1, base, taps=9, stride=1, config=config, joined="sum")
        self.stages = nn.ModuleDict()
        in_channels = base
        for index, stage in enumerate(RES_STAGES):
            width = base << index
            first_stride = config.audio_res2_stride if stage == "res2" else 2
            blocks: dict[str, nn.Module] = {}
            for block in range(config.stage_blocks[index]):
                stride = first_stride if block == 0 else 1
                if stage in ("res2", "res3"):
                    literal = config.audio_block == "table1"
                    made: nn.Module = TimeFrequencyBlock(in_channels, width, config, stride=stride, literal=literal)
                else:
                    square = (stride, stride)
                    made = Bottleneck(in_channels, width, config, reduce=(1, 1), middle=(3, 3), stride=square)
                blocks[str(block)] = made
                in_channels = EXPANSION * width
            self.stages[stage] = Stage(blocks, config.activation_checkpointing)

    def forward(self, log_mel: Tensor) -> Tensor:
        """conv1: (N, 1, M, F) -> (N, C, M, F), channels_last."""
        out: Tensor = self.stem(log_mel)
        return out
