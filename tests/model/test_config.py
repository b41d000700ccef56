"""Rules and derived values of ModelConfig."""

import json

import pytest

from model.config import ModelConfig, ModelConfigError
from model.variants import VARIANTS
from tests.model.cases import tiny


def test_defaults_are_table_1() -> None:
    config = ModelConfig()
    assert (config.num_fast_frames, config.num_mel_frames) == (32, 128)
    assert [config.channels(p, "pool1") for p in ("slow", "fast", "audio")] == [64, 8, 32]
    assert [config.channels("slow", s) for s in ("res2", "res3", "res4", "res5")] == [256, 512, 1024, 2048]
    assert [config.channels("fast", s) for s in ("res2", "res3", "res4", "res5")] == [32, 64, 128, 256]
    assert [config.channels("audio", s) for s in ("res2", "res3", "res4", "res5")] == [128, 256, 512, 1024]
    assert [config.lateral_stride(s) for s in ("pool1", "res2", "res3", "res4", "res5")] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 51}, r"depth \(51\) must be one of 14, 26, 50, 101, 152"),
        ({"fusion_stages": ("pool5",)}, r"audio always joins at pool5"),
        ({"lateral_stages": ("res3",)}, r"lateral_stages .* must hold res4"),
        ({"beta_audio": 0.3}, r"width x beta_audio .* whole number"),
        ({"nonlocal_blocks": (7,)}, r"nonlocal_blocks .* lie in \[0, 0\]"),
        ({"drop_pathway_rate": 1.5}, r"drop_pathway_rate \(1.5\) must lie in \[0, 1\]"),
        ({"alpha_audio": 1}, r"alpha_audio \(1\) must give audio at res3"),
        ({"sync_loss": "contrastive", "fusion": "none", "sync_levels": ("res3",)}, r"sync_levels .* pool5"),
        ({"sync_loss": "contrastive", "pathways": ("slow", "fast"), "fusion": "none"}, r"all three for a sync_loss"),
        ({"pathways": ("audio",), "fusion": "none", "head": "detection"}, r"head \(detection\)"),
        ({"lateral_kernel": 4}, r"lateral_kernel \(4\) must be odd"),
    ],
)
def test_broken_rules_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        tiny(**changes)


def test_dict_round_trip_through_json() -> None:
    for config in VARIANTS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ModelConfigError, match="widht"):
        ModelConfig.from_dict({"widht": 64})


def test_variants_cover_the_instantiations() -> None:
    values = VARIANTS.values()
    assert {(c.depth, c.num_frames, c.frame_stride) for c in values} >= {
        (50, 4, 16), (50, 8, 8), (50, 16, 4), (101, 8, 8), (101, 16, 8),
    }  # fmt: skip
    assert {c.fusion for c in values} == {"none", "a_fs", "a_f_s", "av_nonlocal"}
    assert {c.beta_audio for c in values} >= {1 / 8, 1 / 4, 1 / 2, 1.0}
    assert {c.num_mel_bins for c in values} >= {40, 80}
    assert {c.head for c in values} == {"softmax", "sigmoid", "detection", "ssl"}
    assert {c.fusion_stages for c in values} >= {(), ("res4",), ("res3", "res4"), ("res2", "res3", "res4")}
