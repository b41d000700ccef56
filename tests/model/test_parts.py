"""Parts by hand: what fresh weights are, the first pooling, the audio lateral and the box head.

Legend: N clips, C channels, T frames, H W pixels, M audio frames, F mel bins.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm
from model.blocks import Bottleneck, TimeFrequencyBlock
from model.fusion import AudioLateral, AudioVisualNonLocal
from model.heads import DetectionHead
from model.nonlocal_block import NonLocalBlock
from tests.model.support.cases import built, tiny


@pytest.mark.parametrize("audio_block", ["parallel", "table1"])
def test_residual_branches_start_at_zero_and_other_norms_at_one(audio_block: str) -> None:
    model = built(tiny(fusion="av_nonlocal", nonlocal_blocks=(0,), audio_block=audio_block))
    ends: set[nn.Module] = set()
    kinds: set[type[nn.Module]] = set()
    for module in model.modules():
        if isinstance(module, Bottleneck | TimeFrequencyBlock):
            ends.add(module.c.norm)
        elif isinstance(module, NonLocalBlock):
            ends.add(module.norm)
        elif isinstance(module, AudioVisualNonLocal):
            ends.add(module.out.norm)
        else:
            continue
        kinds.add(type(module))
    assert kinds == {Bottleneck, TimeFrequencyBlock, NonLocalBlock, AudioVisualNonLocal}
    for name, module in model.named_modules():
        if isinstance(module, GhostBatchNorm):
            assert module.weight.unique().tolist() == [0.0 if module in ends else 1.0], name
            assert not module.bias.any(), name


def test_fresh_weights_have_the_spread_of_the_paper() -> None:
    model = built(tiny(width=32, num_classes=400, sync_loss="contrastive"))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {"head.classifier.visual", "head.classifier.audio"} < linear.keys()
    for name, layer in linear.items():
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05), name
        assert layer.bias is None or not layer.bias.any(), name
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.weight.numel() > 20000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert module.bias is None, name


@pytest.mark.parametrize("training", [False, True])
def test_stem_ends_with_the_maximum_of_3x3_every_second_pixel(training: bool) -> None:
    slow = built(tiny()).slow.train(training)
    frames = torch.randn(2, 3, 4, 16, 20).to(memory_format=torch.channels_last_3d)
    map_ = slow.stem(frames)
    assert torch.equal(slow(frames), F.max_pool3d(map_, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    assert torch.equal(slow(frames)[:, :, :, 1, 2], map_[:, :, :, 1:4, 3:6].amax((3, 4)))


def test_audio_lateral_by_hand() -> None:
    config = tiny()
    torch.manual_seed(0)
    lateral: Any = AudioLateral(6, 10, 4, config).eval()
    for norm in (lateral.reduce.norm, lateral.expand.norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    audio = torch.randn(3, 6, 16, 7).to(memory_format=torch.channels_last)

    def step(x: Tensor, part: Any, stride: int) -> Tensor:
        """5 taps in time, BN, ReLU: (N, C, M) -> (N, C', M / stride)."""
        y = F.conv1d(x, part.conv.weight[..., 0], stride=stride, padding=2)
        norm = part.norm
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    expected = step(step(audio.mean(3), lateral.reduce, 1), lateral.expand, 4)
    found = lateral(audio)
    assert found.shape == (3, 10, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.min() == 0  # the second ReLU has work here


def test_boxes_are_aligned_on_a_sixteenth_and_take_the_maximum() -> None:
    config = tiny(head="detection", pathways=("slow", "fast"), fusion="none")
    head = DetectionHead(config, 5)
    given: list[Tensor] = []
    head.classifier.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    slow, fast = (config.channels(p, "res5") for p in ("slow", "fast"))
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.zeros(2, slow, 4, 16, 16)
    image[:, 0], image[:, 1], image[1, 2] = x, y, -x
    image[:, 3, 1] = 4.0  # one frame of four: 1 on average
    maps = [m.to(memory_format=torch.channels_last_3d) for m in (image, torch.zeros(2, fast, 16, 16, 16))]
    head(maps, None, torch.tensor([[1.0, 32, 48, 200, 160]]))
    # In cells of 16 px with centres at whole numbers the box is x in [1.5, 12], y in [2.5, 9.5]; 7 bins of 1.5 and 1.
    assert given[0].shape == (1, slow + fast)
    expected = torch.tensor([12 - 0.75, 9.5 - 0.5, -(1.5 + 0.75), 1.0])  # centre of the last bin, of the first where -x
    torch.testing.assert_close(given[0][0, :4], expected)
    assert not given[0][0, 4:].any()
