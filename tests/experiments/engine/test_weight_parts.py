"""Parts that may start afresh: what they do to the outputs, what the log says of them, and what stays refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.initial_weights import copy_weights
from model.avslowfast import AVSlowFast
from model.config import ModelConfig
from model.variants import VARIANTS
from tests.model.support.cases import built, inputs, tiny

VISUAL: dict[str, Any] = {"pathways": ("slow", "fast"), "fusion": "none"}


def trained(config: ModelConfig) -> AVSlowFast:
    """A model as after a training: no scale of a residual branch is 0 any more."""
    return built(config, seed=1, settled=True)


def scores(model: AVSlowFast, *given: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return model.eval()(*given).scores


def test_nonlocal_blocks_begin_without_changing_the_output() -> None:
    plain, config = trained(tiny(depth=26)), tiny(depth=26, nonlocal_blocks=(0, 1))
    target = built(config, seed=2)
    lines = copy_weights(target, plain.state_dict(), "run")
    own = [k for k in target.state_dict() if "nonlocal" in k]
    assert len(own) > 10
    learned = sum(not k.endswith("num_batches_tracked") for k in own)
    assert lines[1].startswith(f"  as initialised: Non-local blocks, {learned} tensors: ")
    frames, log_mel = inputs(config)
    assert torch.equal(scores(target, frames, log_mel), scores(plain, frames, log_mel))
    assert torch.equal(target.train()(frames, log_mel).logits, plain.train()(frames, log_mel).logits)
    loss = target(frames, log_mel).logits.square().sum()
    loss.backward()
    moving = [n for n, p in target.named_parameters() if "nonlocal" in n and p.grad is not None and p.grad.any()]
    assert any(n.endswith("norm.weight") for n in moving)  # it can leave 0


def test_audiovisual_models_begin_from_an_own_slowfast_run() -> None:
    visual, config = trained(tiny(**VISUAL)), tiny()
    target = built(config, seed=2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    lines = copy_weights(target, visual.state_dict(), "run")
    assert any(line.startswith("  as initialised: audio, ") for line in lines)
    frames, log_mel = inputs(config)
    assert torch.equal(scores(target, frames, None), scores(visual, frames))
    assert not torch.equal(scores(target, frames, log_mel), scores(visual, frames))
    fresh = {k for k, v in target.state_dict().items() if torch.equal(v, before[k]) and k in visual.state_dict()}
    assert not {k for k in fresh if before[k].dim() > 1}
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items() if k not in visual.state_dict())


@pytest.mark.parametrize("fusion", ["a_fs", "a_f_s", "av_nonlocal"])
def test_synchronization_begins_beside_weights_without_it(fusion: str) -> None:
    plain, config = trained(tiny(fusion=fusion)), tiny(fusion=fusion, sync_loss="contrastive")
    target = built(config, seed=2)
    lines = copy_weights(target, plain.state_dict(), "run")
    assert any(line.startswith("  as initialised: synchronization, ") for line in lines)
    frames, log_mel = inputs(config)
    assert torch.equal(scores(target, frames, log_mel), scores(plain, frames, log_mel))


def test_all_three_at_once_and_from_self_supervision_to_a_probe() -> None:
    target = built(tiny(depth=26, nonlocal_blocks=(1,), sync_loss="contrastive"))
    source = trained(tiny(depth=26, **VISUAL))
    lines = copy_weights(target, source.state_dict(), "run")
    assert [line.split(",")[0] for line in lines if "tensors: " in line] == [
        f"  as initialised: {part}" for part in ("Non-local blocks", "audio", "synchronization")
    ]
    ssl: dict[str, Any] = {"fusion": "none", "lateral_stages": (), "sync_levels": ("pool5",)}
    pretext = trained(tiny(**ssl, head="ssl", sync_loss="contrastive"))
    probe = built(tiny(**ssl, sync_loss="none", freeze="backbone"), seed=2)
    copy_weights(probe, pretext.state_dict(), "run", "other classes")
    for name, value in probe.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, pretext.state_dict()[name]), name


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            {"depth": 26},
            {"depth": 26, "nonlocal_blocks": (0,), "freeze": "bn"},
            "model.freeze=bn keeps their last scale",
        ),
        (VISUAL, {"freeze": "backbone"}, "model.freeze=backbone trains the classifier alone"),
        ({"beta_audio": 1.0}, {}, r"audio\.stages\.res2\.0\.c\.conv\.weight \(32, "),
        ({"audio_block": "table1"}, {}, "audio.stages.res2.0.*is missing|must be"),
        ({"fusion_stages": ("res4",)}, {}, "stages.res3.audio.*is missing"),
        ({**VISUAL, "lateral_stages": ("pool1", "res2", "res3", "res4")}, {}, r"slow.stages.res2.0.a.conv.weight"),
        ({"pathways": ("audio",), "fusion": "none", "sync_loss": "none"}, {}, "is missing"),
    ],
)
def test_everything_else_stays_refused(source: dict[str, Any], target: dict[str, Any], message: str) -> None:
    model = built(tiny(**target))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        copy_weights(model, trained(tiny(**source)).state_dict(), "run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_papers_large_models_begin_from_their_counterparts_by_name() -> None:
    """R101+NL of Charades from R101: only Non-local blocks and the head differ."""
    with torch.device("meta"):
        large, plain = (
            AVSlowFast(ModelConfig.from_dict(VARIANTS["avslowfast_r101_nl_16x8"].to_dict() | changes))
            for changes in ({}, {"nonlocal_blocks": []})
        )
    missing = large.state_dict().keys() - plain.state_dict().keys()
    assert {k.split(".")[3] for k in missing} == {"nonlocal6", "nonlocal13", "nonlocal20"}
