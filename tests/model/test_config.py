"""Rules and derived values of ModelConfig."""

import json
from typing import Any

import pytest

from model.config import ModelConfig, ModelConfigError
from model.variants import VARIANTS
from tests.model.support.cases import built, inputs, tiny


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
        ({"dropout_rate": 1.5}, r"dropout_rate \(1.5\) must be at most 1"),
        ({"nonlocal_blocks": (-1,)}, r"nonlocal_blocks \(-1\) must be at least 0"),
        ({"width": 0}, r"width \(0\) must be at least 1"),
        ({"freeze": "all"}, r"freeze \(all\) must be one of none, bn_statistics, bn, backbone"),
        ({"pathways": ("slow", "audio")}, r"pathways .* must be one of \[slow, fast\], "),
        ({"sync_levels": ("pool1",)}, r"sync_levels .* must name only res2, res3, res4, res5, pool5"),
        ({"audio_res2_stride": True}, r"audio_res2_stride \(True\) must be a whole number"),
        ({"alpha_audio": 1}, r"alpha_audio \(1\) must give audio at res3"),
        ({"sync_loss": "contrastive", "fusion": "none", "sync_levels": ("res3",)}, r"sync_levels .* pool5"),
        ({"sync_loss": "contrastive", "pathways": ("slow", "fast"), "fusion": "none"}, r"all three for a sync_loss"),
        ({"pathways": ("audio",), "fusion": "none", "head": "detection"}, r"head \(detection\)"),
        ({"lateral_kernel": 4}, r"lateral_kernel \(4\) must be odd"),
        ({"num_classes": 2.5}, r"num_classes \(2.5\) must be a whole number"),
        ({"num_classes": "7"}, r"num_classes \('7'\) must be a whole number"),
        ({"num_mel_bins": True}, r"num_mel_bins \(True\) must be a whole number"),
        ({"clips_per_bn_group": 2.5}, r"clips_per_bn_group \(2.5\) must be a whole number"),
        ({"dropout_rate": "0.5"}, r"dropout_rate \('0.5'\) must be a finite number"),
        ({"sync_weight": float("nan")}, r"sync_weight \(nan\) must be a finite number"),
        ({"sync_weight": -1}, r"sync_weight \(-1\) must be at least 0"),
        ({"beta_fast": float("inf")}, r"beta_fast \(inf\) must be a finite number"),
        ({"activation_checkpointing": 1}, r"activation_checkpointing \(1\) must be a true-or-false value"),
        ({"head": ["softmax"]}, r"head \(\('softmax',\)\) must be a name"),
        ({"lateral_stages": None}, r"lateral_stages \(None\) must be a list of names"),
        ({"sync_levels": "res3"}, r"sync_levels \('res3'\) must be a list of names"),
        ({"pathways": [["slow"], "fast"]}, r"pathways .* must be a list of names"),
        ({"nonlocal_blocks": (0.5,)}, r"nonlocal_blocks \(\(0.5,\)\) must be a list of whole numbers"),
        ({"nonlocal_blocks": (0, 0)}, r"nonlocal_blocks \(\[0, 0\]\) must name nothing twice"),
        ({"fusion_stages": ("res3", "res3")}, r"fusion_stages .* must name nothing twice"),
        ({"sync_loss": "contrastive", "alpha_audio": 4}, r"sync_levels .* res5 has 2: raise alpha_audio \(4\)"),
    ],
)
def test_broken_rules_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        tiny(**changes)


def test_a_stride_that_is_no_whole_number_is_none() -> None:
    assert tiny(fusion="none", alpha_audio=3).lateral_stride("res4") is None
    assert tiny(fusion="none", alpha_audio=1).lateral_stride("res3") is None
    assert tiny(fusion="a_f_s", sync_loss="contrastive", alpha_audio=16).lateral_stride("res5") is None


@pytest.mark.parametrize("fusion", ["a_f_s", "av_nonlocal"])
def test_levels_that_need_no_stride_take_any_number_of_audio_frames(fusion: str) -> None:
    config = tiny(fusion=fusion, sync_loss="contrastive", alpha_audio=16 if fusion == "a_f_s" else 4)
    frames, log_mel = inputs(config)
    out: Any = built(config)(frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=True)
    assert out.sync_pairs.item() == 12


def test_a_whole_number_is_a_number() -> None:
    assert tiny(dropout_rate=0, sync_weight=2, beta_audio=1).sync_weight == 2


def test_dict_round_trip_through_json() -> None:
    for config in VARIANTS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        older = config.to_dict() | {"drop_pathway_rate": 0.8}  # in config.json of exports before it was the loop's
        assert ModelConfig.from_dict(older) == config
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
    assert VARIANTS["avslowfast_r101_nl_16x8"].nonlocal_blocks == (6, 13, 20)


def test_probes_train_a_classifier_on_fixed_features() -> None:
    probes = {name: config for name, config in VARIANTS.items() if name.endswith("_probe")}
    assert len(probes) == 4
    assert {(c.freeze, c.dropout_rate) for c in probes.values()} == {("backbone", 0.5)}
    assert {c.freeze for name, c in VARIANTS.items() if name not in probes} == {"none"}
