"""Settings made in Python are held to the same rules as those read from YAML."""

import re
from dataclasses import fields, replace

import pytest

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoder": "gpu"}, "data.decoder (gpu) must be one of: auto, cpu, nvdec, dali"),
        ({"decoder": "pyav"}, "data.decoder (pyav) is called cpu now; write data.decoder=cpu"),
        ({"frames": "cpu"}, "data.frames (cpu) must be one of: auto, fused, graph"),
        ({"label_kind": "one"}, "data.label_kind (one) must be one of: single, multi_hot, timed, boxes"),
        ({"negatives": ""}, "data.negatives () must be one of: none, easy, curriculum"),
        ({"target_fps": 0.0}, "data.target_fps (0.0) must be greater than 0.0"),
        ({"target_fps": float("nan")}, "data.target_fps (nan) must be greater than 0.0"),
        ({"num_threads": 513}, "data.num_threads (513) must be at most 512"),
        ({"num_workers": -2}, "data.num_workers (-2) must be at least -1"),
        ({"clip_deadline_s": 0.0}, "data.clip_deadline_s (0.0) must be greater than 0.0"),
        ({"clip_memory_mib": 15}, "data.clip_memory_mib (15) must be at least 16"),
        ({"prefetch_batches": 0}, "data.prefetch_batches (0) must be at least 1"),
        ({"hard_negative_share": 1.1}, "data.hard_negative_share (1.1) must be at most 1.0"),
        ({"crop_size_px": 24.0}, "data.crop_size_px (24.0) must be of type int"),
        ({"flip": 1}, "data.flip (1) must be of type bool"),
        ({"num_threads": True}, "data.num_threads (True) must be of type int"),
        ({"jitter_min_px": 223}, "data.crop_size_px (224) <= data.jitter_min_px (223)"),
        ({"jitter_max_px": 255}, "data.jitter_min_px (256) <= data.jitter_max_px (255) must hold"),
    ],
)
def test_wrong_data_settings_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(DataConfig(), **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_clips": 0}, "views.num_clips (0) must be at least 1"),
        ({"num_crops": 2}, "views.num_crops (2) must be 0 (whole frame), 1 (centre) or 3"),
        ({"clip_rule": "middle"}, "views.clip_rule (middle) must be one of: ends, pyslowfast, offset"),
    ],
)
def test_wrong_views_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ViewConfig(**keys)  # type: ignore[arg-type]


def test_keys_and_defaults_are_those_of_the_paper() -> None:
    config = DataConfig()
    assert {item.name: getattr(config, item.name) for item in fields(config)} == {
        "path": "",
        "train_split": "train",
        "val_split": "val",
        "label_set": "action",
        "label_kind": "single",
        "target_fps": 30.0,
        "crop_size_px": 224,
        "jitter_min_px": 256,
        "jitter_max_px": 320,
        "flip": True,
        "rotation": False,
        "negatives": "none",
        "hard_negative_share": 0.25,
        "shuffle": "full",
        "shuffle_shards": 8,
        "decoder": "auto",
        "frames": "auto",
        "num_threads": 4,
        "num_workers": -1,
        "clip_deadline_s": 60.0,
        "clip_memory_mib": 1024,
        "prefetch_batches": 2,
        "max_quarantined_share": 0.05,
    }


class Shape:
    """What a model's configuration says: AVSlowFast 8x8."""

    num_fast_frames, frame_stride, alpha_fast, num_mel_frames, num_mel_bins = 32, 8, 4, 128, 80


def test_a_clip_is_computed_from_the_model() -> None:
    spec = ClipSpec.for_model(Shape())
    assert spec == ClipSpec(num_frames=32, frame_stride=2, num_mel_frames=128, num_mel_bins=80)
    assert spec == ClipSpec(32, 2)
    assert (spec.num_audio_samples, spec.at(30.0).span_s) == (33_024, pytest.approx(64 / 30))
    wrong = Shape()
    wrong.frame_stride = 6
    with pytest.raises(ValueError, match=r"model.frame_stride \(6\) must be a multiple of model.alpha_fast \(4\)"):
        ClipSpec.for_model(wrong)
