"""The opponents' plain model computes what ours computes: same weights, same logits, in training and evaluation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.steps.plain_model import build_plain
from benchmarks.steps.ways import logits_of, synthetic_batch
from model.avslowfast import build_model
from model.config import ModelConfig
from model.flops import count
from model.variants import VARIANTS

pytestmark = pytest.mark.integration  # starts processes or trains

SMALL = replace(VARIANTS["small"], dropout_rate=0.0)
VISUAL = replace(SMALL, pathways=("slow", "fast"), fusion="none", lateral_stages=("pool1", "res2", "res3", "res4"))


def weights_that_count(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a model with every scale and statistic away from 0 and 1."""
    torch.manual_seed(1)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("norm.weight", "running_var")):
            value.copy_(torch.rand_like(value) + 0.5)
        elif name.endswith(("norm.bias", "running_mean")):
            value.copy_(torch.randn_like(value) * 0.1)
    return state


@pytest.mark.integration
@pytest.mark.parametrize("config", [SMALL, VISUAL], ids=["audiovisual", "visual"])
@pytest.mark.parametrize(("view", "channels_last"), [("5-D", False), ("5-D", True), ("4-D", True)])
@pytest.mark.parametrize("training", [True, False])
def test_plain_model_equals_ours(config: ModelConfig, view: str, channels_last: bool, training: bool) -> None:
    ours = build_model(config).double().train(training)
    ours.load_state_dict(weights_that_count(ours))
    plain = build_plain(config, view=view, channels_last=channels_last).double().train(training)
    plain.load_state_dict(ours.state_dict())
    batch = synthetic_batch(config, 2, 64, "cpu", torch.float64)
    for log_mel in {None, batch.log_mel}:
        frames = batch.frames if channels_last else batch.frames.contiguous()
        with torch.no_grad():
            found = plain(frames, log_mel)
            expected = logits_of(ours(batch.frames, log_mel))
        if not training:
            found = found.softmax(-1)
        assert found.std() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["small", "avslowfast_r50_4x16", "slowfast_r101_8x8"])
def test_plain_model_has_our_parameters(variant: str) -> None:
    config = replace(VARIANTS[variant], sync_loss="none")
    with torch.device("meta"):
        plain = build_plain(config, view="5-D", channels_last=False)
    held = sum(p.numel() for p in plain.parameters()) / 1e6
    assert held == pytest.approx(count(config, 64, 64).params_m, abs=1e-9)


def test_what_the_plain_model_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="no Non-local blocks"):
        build_plain(VARIANTS["slowfast_r101_nl_16x8"], view="5-D", channels_last=True)
    with pytest.raises(ValueError, match="must classify frames"):
        build_plain(VARIANTS["audio_r50"], view="5-D", channels_last=True)
