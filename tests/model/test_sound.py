"""Clips without sound: what they give is what a dropped clip gives, and nothing of them is learnt from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.sound import stand_ins, with_stand_ins
from tests.model.support.cases import built, inputs, tiny

NONE = torch.zeros(4, dtype=torch.bool)
SOME = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("sound", "group", "rows"),
    [
        ("1111", 4, [0, 1, 2, 3]),
        ("0000", 4, [0, 1, 2, 3]),
        ("1010", 4, [0, 0, 2, 2]),
        ("0100", 8, [1, 1, 1, 1]),
        ("01100000", 8, [1, 1, 2, 2, 1, 2, 1, 2]),
        ("10000001", 4, [0, 0, 0, 0, 7, 7, 7, 7]),
        ("00001001", 4, [4, 7, 4, 7, 4, 4, 7, 7]),  # a group without any takes from the other one
    ],
)
def test_stand_ins_take_turns_within_the_group(sound: str, group: int, rows: list[int]) -> None:
    assert stand_ins(torch.tensor([c == "1" for c in sound]), group).tolist() == rows


def test_stand_ins_always_have_sound_and_are_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sound = torch.rand(24, generator=generator) < torch.rand(1, generator=generator)
        rows = stand_ins(sound, 8)
        assert sound[rows].all() or not sound.any()
        assert torch.equal(rows[sound], torch.arange(24)[sound])
        for start in (0, 8, 16):
            own = sound[start : start + 8]
            if own.any():
                counts = torch.bincount(rows[start : start + 8] - start, minlength=8)[own]
                assert int(counts.max() - counts.min()) <= 1


def test_negatives_that_are_missing_have_stand_ins_too() -> None:
    log_mel, negative = torch.arange(4.0).view(4, 1, 1, 1), torch.arange(10.0, 14).view(4, 1, 1, 1)
    ones, others = with_stand_ins(log_mel, negative, SOME, torch.tensor([False, True, True, True]), 4)
    assert (ones.flatten().tolist(), others.flatten().tolist()) == ([0, 0, 2, 2], [11, 11, 12, 13])  # type: ignore[union-attr]
    _, others = with_stand_ins(log_mel, negative, SOME, NONE, 4)
    assert others is not None
    assert others.flatten().tolist() == [0, 0, 2, 2]


def step(model: Any, frames: Tensor, log_mel: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Loss of a training step, and what it changes: gradients and buffers."""
    out = model(frames, log_mel, **options)
    loss = out.logits.square().sum() if out.sync_loss is None else out.logits.square().sum() + out.sync_loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["zeros", "running_average", "laterals_only"])
def test_scores_of_a_clip_without_sound_are_those_of_a_dropped_one(mode: str) -> None:
    config = tiny(drop_pathway_mode=mode)
    model = built(config, settled=True).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("average"):
            buffer.uniform_(0.1, 0.5)
    frames, log_mel = inputs(config)
    heard, dropped = model(frames, log_mel).scores, model(frames).scores
    if mode == "laterals_only":  # the classifier of a dropped step hears; here there is nothing to hear
        dropped = model(frames, None).scores
    expected = torch.where(SOME[:, None], heard, dropped)
    for content in (0.0, float("nan")):
        given = torch.where(SOME[:, None, None, None], log_mel, content)
        torch.testing.assert_close(model(frames, given, has_audio=SOME).scores, expected, rtol=1e-5, atol=1e-6)
    assert (heard - dropped).abs().max() > 1e-4


@pytest.mark.integration
@pytest.mark.parametrize("fusion", ["a_fs", "a_f_s", "av_nonlocal"])
def test_training_does_not_depend_on_what_a_clip_without_sound_holds(fusion: str) -> None:
    config = tiny(fusion=fusion, sync_loss="contrastive", dropout_rate=0.0)
    frames, log_mel = inputs(config)
    negative = log_mel.flip(0) * 0.9
    results = []
    for content in (0.0, 7.0, float("nan")):
        given = torch.where(SOME[:, None, None, None], log_mel, content)
        other = torch.where(SOME.flip(0)[:, None, None, None], negative, 0)
        options = {"negative_log_mel": other, "has_audio": SOME, "has_negative": SOME.flip(0)}
        results.append(step(built(config, settled=True), frames, given, **options))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(v is found[n] or torch.equal(v, found[n]) for n, v in results[0][1].items())


@pytest.mark.integration
def test_statistics_are_those_of_the_clips_with_sound() -> None:
    config = tiny(clips_per_bn_group=4)
    frames, log_mel = inputs(config)
    silent = torch.where(SOME[:, None, None, None], log_mel, 0)
    masked, spelled, mixed = (built(config, settled=True) for _ in range(3))
    step(masked, frames, silent, has_audio=SOME)
    step(spelled, frames, log_mel[[0, 0, 2, 2]])  # the mean and variance of clips 0 and 2
    step(mixed, frames, silent)
    names = [n for n, _ in masked.named_buffers() if n.startswith("audio.")]
    assert len(names) > 30
    for name in names:
        assert torch.equal(masked.get_buffer(name), spelled.get_buffer(name)), name
    stem = "audio.stem.norm.running_var"
    assert (masked.get_buffer(stem) > mixed.get_buffer(stem)).all()  # two clips of one and the same spectrum vary less


@pytest.mark.integration
@pytest.mark.parametrize(("sync_loss", "dropped"), [("none", False), ("contrastive", False), ("contrastive", True)])
def test_a_batch_without_any_sound_is_a_step_without_audio(sync_loss: str, dropped: bool) -> None:
    config = tiny(sync_loss=sync_loss, dropout_rate=0.0)
    frames, log_mel = inputs(config)
    silent, absent = built(config, settled=True), built(config, settled=True)
    negative = {} if sync_loss == "none" else {"negative_log_mel": log_mel, "has_negative": ~NONE}
    loss, found = step(silent, frames, log_mel * 0, has_audio=NONE, drop_audio=dropped, **negative)
    expected_loss, expected = step(absent, frames, None)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected_loss)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
