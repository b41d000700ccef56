"""Audiovisual synchronization: the formula, the mask, the levels that may be used, and the leak otherwise."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.avslowfast as avslowfast
from model.config import ModelConfig
from model.fusion import SyncFeatures
from model.synchronization import SyncHead, active_levels, pair_mask
from tests.model.support.cases import built, inputs, tiny


def features(seed: int = 0) -> SyncFeatures:
    generator = torch.Generator().manual_seed(seed)
    r, p, n = (torch.randn(6, c, generator=generator) for c in (10, 12, 12))
    return SyncFeatures(r, p, n)


def test_margin_loss_by_hand() -> None:
    torch.manual_seed(0)
    head = SyncHead(10, 12, "contrastive")
    found = features()
    mask = torch.tensor([True, True, False, True, True, False])
    loss, right = head(found, mask)
    total, correct = 0.0, 0
    for i in range(6):
        if not mask[i]:
            continue
        r = 0.5 * F.normalize(head.reference(found.reference[i]), dim=0)
        p = 0.5 * F.normalize(head.signal(found.positive[i]), dim=0)
        n = 0.5 * F.normalize(head.signal(found.negative[i]), dim=0)
        near, far = (r - p).norm().item(), (r - n).norm().item()
        total += near**2 + max(0.0, 0.99 - far) ** 2
        correct += near < far
    assert math.isclose(loss.item(), total / (2 * 4), rel_tol=1e-5)
    assert right.item() == correct


def test_classification_loss_by_hand() -> None:
    torch.manual_seed(0)
    head = SyncHead(10, 12, "classification")
    found = features()
    loss, right = head(found, torch.ones(6, dtype=torch.bool))
    assert head.classify is not None
    logits = []
    for signal in (found.positive, found.negative):
        cosine = F.cosine_similarity(head.reference(found.reference), head.signal(signal))
        logits.append(head.classify(cosine[:, None])[:, 0])
    target = torch.cat([torch.ones(6), torch.zeros(6)])
    expected = F.binary_cross_entropy_with_logits(torch.cat(logits), target)
    torch.testing.assert_close(loss, expected)
    assert right.item() == ((torch.cat(logits) > 0) == (target > 0)).sum().item() / 2


def test_no_pair_gives_zero_and_finite_gradients() -> None:
    head = SyncHead(10, 12, "contrastive")
    loss, right = head(features(), torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == right.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters() if p.grad is not None)


def test_mask_leaves_out_silence_and_equal_sounds() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 1, 8, 6, generator=generator), torch.randn(4, 1, 8, 6, generator=generator)
    a[1] = 3.0 + 0.05 * a[1]  # variance 0.0025
    b[2] = 1.5 * a[2]  # cosine 1
    assert pair_mask(a, b).tolist() == [True, False, False, True]


def test_levels_that_may_be_used() -> None:
    config = tiny(sync_loss="contrastive")
    assert active_levels(config, fused=True) == ("res3",)
    assert active_levels(config, fused=False) == ("res3", "res4", "res5")
    late = tiny(
        sync_loss="contrastive", lateral_stages=("res4",), fusion_stages=("res4",), sync_levels=("res4", "res5")
    )
    assert active_levels(late, fused=True) == ("res4",)
    ssl = tiny(sync_loss="contrastive", fusion="none", lateral_stages=(), sync_levels=("pool5",), head="ssl")
    assert active_levels(ssl, fused=True) == ("pool5",)
    assert active_levels(tiny(), fused=False) == ()


def level_of(name: str) -> str | None:
    for level in ("res3", "res4", "res5"):
        if f"synchronization.heads.{level}" in name or (f"stages.{level}.audio." in name):
            return level
    return None


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", ["contrastive", "classification"])
def test_gradients_come_from_active_levels_only(dropped: bool, kind: str) -> None:
    config = tiny(sync_loss=kind)
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=dropped)
    assert out.sync_pairs.item() == (12 if dropped else 4)
    out.sync_loss.backward()
    active = {"res3", "res4", "res5"} if dropped else {"res3"}
    for name, parameter in model.named_parameters():
        level = level_of(name)
        if level is not None:
            assert (parameter.grad is not None) == (level in active), name
    deepest = "res5" if dropped else "res3"
    assert model.audio is not None
    reached = {s for s, m in model.audio.stages.items() if any(p.grad is not None for p in m.parameters())}
    assert max(reached) == deepest


def test_dropped_step_gives_the_classification_loss_no_audio_gradient() -> None:
    config = tiny(sync_loss="contrastive")
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=True)
    out.logits.sum().backward()
    heard = [
        n for n, p in model.named_parameters() if p.grad is not None and (n.startswith("audio.") or ".audio." in n)
    ]
    assert heard == []


def test_device_side_drop_uses_later_levels_for_dropped_clips_only() -> None:
    config = tiny(sync_loss="contrastive")
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    keep = torch.tensor([True, False, True, True])
    out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0), audio_keep=keep)
    assert out.sync_pairs.item() == 4 + 1 + 1


def test_total_is_the_weighted_sum_of_levels() -> None:
    config = tiny(sync_loss="contrastive")
    frames, log_mel = inputs(config)
    losses = {}
    for weight in (1.0, 0.25):
        model = built(tiny(sync_loss="contrastive", sync_weight=weight), settled=True)
        out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=True)
        losses[weight] = out.sync_loss.item()
    assert math.isclose(losses[0.25], 0.25 * losses[1.0], rel_tol=1e-6)


def sounds(config: ModelConfig, clips: int, generator: torch.Generator) -> Tensor:
    """Log-mels, each with a spectrum of its own."""
    spectrum = torch.randn(clips, 1, 1, config.num_mel_bins, generator=generator)
    return spectrum + 0.3 * torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, generator=generator)


def learned_accuracy(config: ModelConfig, *, drop_audio: bool, steps: int) -> float:
    """Train synchronization on clips whose frames are all alike, so that only leaked audio can answer; then test."""
    model = built(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    frames = (
        inputs(config, clips=1, px=16)[0].expand(16, -1, -1, -1, -1).contiguous(memory_format=torch.channels_last_3d)
    )
    right = []
    for step in range(steps + 10):
        log_mel, negative = sounds(config, 16, generator), sounds(config, 16, generator)
        out: Any = model(frames, log_mel, negative_log_mel=negative, drop_audio=drop_audio)
        if step >= steps:
            right.append(out.sync_accuracy.item())
            continue
        optimizer.zero_grad()
        out.sync_loss.backward()
        optimizer.step()
    return sum(right) / len(right)


@pytest.mark.integration
def test_a_wrongly_active_level_is_solved_from_the_leaked_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(sync_loss="contrastive", sync_levels=("res4",), clips_per_bn_group=16)
    honest = learned_accuracy(config, drop_audio=True, steps=30)
    monkeypatch.setattr(avslowfast, "active_levels", lambda config, fused: config.active_sync_levels)
    leaked = learned_accuracy(config, drop_audio=False, steps=90)
    assert leaked > 0.75, f"accuracy with the leak {leaked:.2f}, without {honest:.2f}"
    assert honest < 0.62, f"accuracy with the leak {leaked:.2f}, without {honest:.2f}"


@pytest.mark.parametrize("fusion", ["a_fs", "a_f_s", "av_nonlocal"])
def test_every_part_learns_from_kept_or_dropped_steps(fusion: str) -> None:
    config = tiny(fusion=fusion, sync_loss="contrastive")
    model = built(config, settled=True)
    before = {n: v.clone() for n, v in model.state_dict().items() if n.endswith("tracked")}
    frames, log_mel = inputs(config)
    for drop_audio in (False, True):
        out: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=drop_audio)
        (out.sync_loss + out.logits.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(model.state_dict()[n] > v for n, v in before.items())
    res5 = {n.split(".")[2] for n, _ in model.named_parameters() if n.startswith("stages.res5")}
    used = {"a_fs": {"fast_to_slow", "audio"}, "a_f_s": {"audio"}, "av_nonlocal": {"fast_to_slow", "query"}}
    assert res5 == used[fusion]
