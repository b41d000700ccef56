"""DropPathway: the draw, what a dropped step computes, and what it leaves alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kernels.modules import set_backend
from model.drop_pathway import AudioAverage, should_drop
from tests.model.support.cases import BACKENDS, audio_names, built, inputs, tiny

pytestmark = pytest.mark.integration  # whole models or pipelines run


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


def test_draw_is_a_pure_function_with_the_right_rate() -> None:
    draws = [should_drop(7, step, 0.8) for step in range(4000)]
    assert draws == [should_drop(7, step, 0.8) for step in range(4000)]
    assert abs(sum(draws) / 4000 - 0.8) < 0.02
    assert draws != [should_drop(8, step, 0.8) for step in range(4000)]
    assert not any(should_drop(7, step, 0.0) for step in range(100))
    assert all(should_drop(7, step, 1.0) for step in range(100))


@pytest.mark.parametrize("name", BACKENDS)
def test_dropped_step_leaves_audio_untouched(name: str) -> None:
    set_backend(name)
    config = tiny()
    model = built(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    frames, log_mel = inputs(config)
    model(frames, log_mel).logits.sum().backward()  # a kept step, so that momentum exists
    optimizer.step()
    optimizer.zero_grad()
    names = audio_names(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model(frames, log_mel, drop_audio=True).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == names
    assert len(names) > 40
    optimizer.step()
    after = model.state_dict()
    parts = tuple(n.rpartition(".")[0] + "." for n in names)  # with their norms' running statistics
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {key for key in before if not key.startswith(parts)}


def test_dropped_is_the_same_as_no_audio_and_as_silence_in_the_sums() -> None:
    config = tiny()
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config)
    dropped = model(frames, log_mel, drop_audio=True).scores
    torch.testing.assert_close(dropped, model(frames).scores, rtol=0, atol=0)
    assert (dropped - model(frames, log_mel).scores).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["a_fs", "a_f_s", "av_nonlocal"])
@pytest.mark.parametrize("mode", ["zeros", "running_average"])
def test_device_side_drop_equals_host_side(fusion: str, mode: str) -> None:
    config = tiny(fusion=fusion, drop_pathway_mode=mode)
    model = built(config, settled=True).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("average"):
            buffer.uniform_(0.1, 0.5)
    frames, log_mel = inputs(config)
    keep = torch.tensor([True, False, True, False])
    mixed = model(frames, log_mel, audio_keep=keep).scores
    kept, dropped = model(frames, log_mel).scores, model(frames, log_mel, drop_audio=True).scores
    expected = torch.where(keep[:, None], kept, dropped)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    assert (kept - dropped).abs().max() > 1e-4


def test_keep_zero_selects_zero_even_for_infinite_audio() -> None:
    config = tiny()
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config)
    log_mel[1] = float("inf")
    out = model(frames, log_mel, audio_keep=torch.tensor([True, False, True, True]))
    assert torch.isfinite(out.scores).all()


def test_laterals_only_mode_still_hears_in_the_classifier() -> None:
    config = tiny(drop_pathway_mode="laterals_only")
    model = built(config, settled=True)
    frames, log_mel = inputs(config)
    model(frames, log_mel, drop_audio=True).logits.sum().backward()
    assert model.audio is not None
    assert model.audio.stem.time.weight.grad is not None
    laterals = [p for n, p in model.named_parameters() if n.startswith("stages.") and ".audio." in n]
    assert laterals
    assert all(p.grad is None for p in laterals)


def test_running_average_follows_the_audio_features() -> None:
    config = tiny(drop_pathway_mode="running_average")
    model: Any = built(config, settled=True)
    frames, log_mel = inputs(config, clips=2)
    average: Tensor = model.audio_average.average
    assert torch.equal(average, torch.zeros_like(average))
    model(frames, log_mel)
    first = average.clone()
    assert first.abs().max() > 0
    model(frames, log_mel, drop_audio=True)
    assert torch.equal(average, first)
    for _ in range(30):
        model(frames, log_mel)
    pooled: list[Tensor] = []
    model.audio.stages["res5"].register_forward_hook(lambda m, a, out: pooled.append(out.mean((0, 2, 3)).detach()))
    model(frames, log_mel)
    torch.testing.assert_close(average, pooled[0], rtol=0.08, atol=5e-3)


@pytest.mark.parametrize("sync_loss", ["none", "contrastive"])
@pytest.mark.parametrize(
    ("fusion", "mode"),
    [("a_fs", "zeros"), ("a_fs", "running_average"), ("a_fs", "laterals_only"), ("a_f_s", "running_average"),
     ("av_nonlocal", "zeros")],
)  # fmt: skip
def test_training_is_the_same_however_audio_is_dropped(fusion: str, mode: str, sync_loss: str) -> None:
    config = tiny(fusion=fusion, drop_pathway_mode=mode, sync_loss=sync_loss, dropout_rate=0.5)
    frames, log_mel = inputs(config)
    negative = None if sync_loss == "none" else log_mel.flip(0)
    host, device = built(config, settled=True), built(config, settled=True)
    for number, dropped in enumerate((False, True) if sync_loss == "none" else (True, True)):
        outs: list[Any] = []
        for model, options in (
            (host, {"drop_audio": dropped}),
            (device, {"audio_keep": torch.full((4,), not dropped)}),
        ):
            model.zero_grad()
            torch.manual_seed(number)
            out: Any = model(frames, log_mel, negative_log_mel=negative, **options)
            loss = out.logits.square().sum()
            (loss if out.sync_loss is None else loss + out.sync_loss).backward()
            outs.append(tree_leaves(out))
        assert len(outs[0]) == (1 if sync_loss == "none" else 4)
        for found, value in zip(outs[1], outs[0], strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    for name, buffer in host.named_buffers():
        torch.testing.assert_close(device.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    for name, parameter in host.named_parameters():
        found, expected = device.get_parameter(name).grad, parameter.grad
        assert found is not None or expected is None
        if found is not None:
            torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


def test_running_average_takes_in_kept_clips_alone() -> None:
    average = AudioAverage(3, momentum=0.5)
    feature = torch.arange(24.0).view(4, 3, 2)
    feature[1] = float("nan")
    average.update(feature, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(average.average, feature[[0, 2]].mean((0, 2)) / 2)
    before = average.average.clone()
    average.update(feature[:1], torch.zeros(1, dtype=torch.bool))
    assert torch.equal(average.average, before)


@pytest.mark.parametrize("freeze", ["none", "bn", "backbone"])
def test_running_averages_of_a_frozen_backbone_are_kept(freeze: str) -> None:
    config = tiny(drop_pathway_mode="running_average", freeze=freeze)
    model = built(config)
    before = {n: v.clone() for n, v in model.state_dict().items() if n.endswith("average")}
    assert len(before) == 3
    model(*inputs(config))
    kept = {torch.equal(value, model.state_dict()[name]) for name, value in before.items()}
    assert kept == {freeze == "backbone"}


# Steps of both backends are compared above; tracing costs seconds.
@pytest.mark.integration
@pytest.mark.parametrize("name", [pytest.param("reference", marks=pytest.mark.slow), BACKENDS[1]])
def test_device_side_drop_compiles_to_one_graph(name: str) -> None:
    set_backend(name)
    config = tiny()
    model: Any = built(config, settled=True)
    frames, log_mel = inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    before = model.audio.stem.norm.running_mean.clone()
    compiled(frames, log_mel, audio_keep=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(model.audio.stem.norm.running_mean, before)
    compiled(frames, log_mel, audio_keep=torch.ones(4, dtype=torch.bool))
    assert not torch.equal(model.audio.stem.norm.running_mean, before)
