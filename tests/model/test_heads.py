"""Heads: scores, positions, boxes, rotations, and the modes in which only a part learns."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.modules import GhostBatchNorm
from model.heads import Classifier, WideLinear, window_mean
from model.modes import apply_freeze
from tests.model.support.cases import built, inputs, tiny, visual


def test_training_gives_logits_and_evaluation_scores() -> None:
    config = tiny()
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    logits = model(frames, log_mel).logits
    assert logits.dtype == torch.float32
    assert logits.requires_grad
    scores = model.eval()(frames, log_mel).scores
    torch.testing.assert_close(scores.sum(1), torch.ones(4))
    sigmoid = built(tiny(head="sigmoid"), settled=True).eval()(frames, log_mel).scores
    assert ((sigmoid > 0) & (sigmoid < 1)).all()
    assert (sigmoid.sum(1) - 1).abs().max() > 1e-2


def test_two_halves_are_one_fc_on_the_concatenation() -> None:
    torch.manual_seed(0)
    head = Classifier(6, 4, 3, 0.0)
    assert head.visual is not None
    assert head.audio is not None
    v, a = torch.randn(2, 6), torch.randn(2, 4)
    weight = torch.cat([head.visual.weight, head.audio.weight], 1)
    torch.testing.assert_close(head(v, a), F.linear(torch.cat([v, a], 1), weight, head.visual.bias))
    zeros = F.linear(torch.cat([v, torch.zeros(2, 4)], 1), weight, head.visual.bias)
    torch.testing.assert_close(head(v, None), zeros)


def test_logits_of_16_bits_do_not_tie() -> None:
    """2000 samples: one view with vision alone, whose bfloat16 logits tie for 2 % (and a tie counts as wrong)."""
    torch.manual_seed(0)
    head = Classifier(256, 0, 400, 0.5).eval()
    assert head.visual is not None
    nn.init.normal_(head.visual.weight, std=0.6)
    pooled = torch.rand(2000, 256).pow(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(pooled.bfloat16(), None)
        rounded = F.linear(pooled, head.visual.weight, head.visual.bias)
    assert logits.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16

    def tied(values: torch.Tensor) -> float:
        best = values.topk(2, dim=1).values
        return (best[:, 0] == best[:, 1]).float().mean().item()

    assert tied(rounded) > 0.01
    assert tied(logits) == 0
    exact = F.linear(pooled.bfloat16().double(), head.visual.weight.double(), head.visual.bias.double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_wide_layer_gives_float32_or_wider(dtype: torch.dtype) -> None:
    layer = WideLinear(8, 3).to(dtype)
    x = torch.randn(2, 8, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x.to(torch.bfloat16))
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


def test_scores_are_averaged_over_positions_after_the_softmax() -> None:
    config = visual(pool_window=1)
    model: Any = built(config, settled=True).eval()
    frames, _ = inputs(config, px=64)
    maps: list[torch.Tensor] = []
    model.slow.stages["res5"].register_forward_hook(lambda m, i, out: maps.append(out))
    model.fast.stages["res5"].register_forward_hook(lambda m, i, out: maps.append(out))
    scores = model(frames).scores
    pooled = torch.cat([x.mean(2) for x in maps], 1)  # (4, C, 2, 2)
    expected = model.head.classifier.visual(pooled.permute(0, 2, 3, 1)).softmax(-1).mean((1, 2))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_window_mean_is_a_stride_1_average() -> None:
    x = torch.randn(2, 8, 3, 8, 8).to(memory_format=torch.channels_last_3d)
    assert window_mean(x, 7).shape == (2, 8, 2, 2)
    torch.testing.assert_close(window_mean(x, 7)[:, :, 1, 0], x[:, :, :, 1:8, 0:7].mean((2, 3, 4)))
    torch.testing.assert_close(window_mean(x, 9)[:, :, 0, 0], x.mean((2, 3, 4)))


def test_detection_scores_boxes() -> None:
    config = tiny(head="detection")
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config, clips=2, px=64)
    boxes = torch.tensor([[0, 4.0, 4, 60, 60], [1, 0, 0, 32, 32], [1, 30, 30, 64, 64]])
    scores = model(frames, log_mel, boxes=boxes).scores
    assert scores.shape == (3, 5)
    assert ((scores > 0) & (scores < 1)).all()
    alone = model(frames[1:], log_mel[1:], boxes=torch.tensor([[0, 0.0, 0, 32, 32]])).scores
    torch.testing.assert_close(alone[0], scores[1], rtol=1e-4, atol=1e-5)
    assert model(frames, log_mel, boxes=boxes[:0]).scores.shape == (0, 5)
    with pytest.raises(ValueError, match=r"boxes \(None\)"):
        model(frames, log_mel)


def test_self_supervised_form() -> None:
    config = tiny(head="ssl", fusion="none", lateral_stages=(), sync_loss="contrastive", sync_levels=("pool5",))
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0))
    assert out.rotation_logits.shape == (4, 4)
    assert out.rotation_logits is out.logits
    assert out.sync_pairs.item() == 4
    (out.sync_loss + out.rotation_logits.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model.stages) == 0
    with torch.no_grad():
        out = model.eval()(frames, log_mel)
    assert out.rotation_logits is out.sync_loss is None
    torch.testing.assert_close(out.scores.sum(1), torch.ones(4))


def test_audio_only() -> None:
    config = tiny(pathways=("audio",), fusion="none")
    model = built(config, settled=True)
    log_mel = inputs(config)[1]
    model(None, log_mel).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(None, log_mel).scores.shape == (4, 5)
    with pytest.raises(ValueError, match="audio-only"):
        model(None, None)


@pytest.mark.parametrize("freeze", ["none", "bn_statistics", "bn", "backbone"])
def test_modes(freeze: str) -> None:
    config = tiny(freeze=freeze)
    model = built(config)
    before = {n: v.clone() for n, v in model.state_dict().items() if "running" in n or "tracked" in n}
    frames, log_mel = inputs(config)
    model(frames, log_mel).logits.square().sum().backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None}
    norms = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, GhostBatchNorm) for k in ("weight", "bias")}
    everything = {n for n, _ in model.named_parameters()}
    classifier = {n for n in everything if n.startswith("head.classifier")}
    expected = {"none": everything, "bn_statistics": everything, "bn": everything - norms, "backbone": classifier}
    assert learns == expected[freeze]
    changed = any(not torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert changed == (freeze == "none")
    with pytest.raises(ValueError, match=r"freeze \(head\)"):
        apply_freeze(model, "head")
