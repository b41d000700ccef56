"""The key list, the digest, and that the resolved configuration reads back equal."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.cli.strict_yaml import ConfigError
from experiments.config import (
    OPERATIONAL_KEYS,
    PRESETS,
    Config,
    config_digest,
    decisive_keys,
    differing_keys,
    flat_config,
    load_config,
    resolved_yaml,
)
from experiments.tasks.consistency import check_consistency
from model.variants import VARIANTS

CONFIGS = sorted((Path(__file__).parents[2] / "experiments" / "configs").rglob("*.yaml"))
KEYS = """
version name output_dir
optim: lr lr_clips momentum nesterov weight_decay schedule warmup_steps warmup_share warmup_start_lr milestones
optim: milestone_factor max_grad_norm bad_step spike_ratio backend
train: task seed clips_per_step max_clips_per_pass steps epochs log_interval_steps init_from fresh
eval: interval_steps clips_per_batch train_samples class_subset precise_bn_batches
runtime: device precision compile cuda_graph deterministic num_threads collective_timeout_s compare_ranks_steps
checkpoint: interval_steps keep
tracking: backend uri experiment system_metrics_interval_s flush_timeout_s
debug: synthetic_input overfit_one_batch sync_warnings profile_steps
"""


DETECTION = ["train.task=detection", "data.label_kind=boxes", "model.head=detection", "views.num_crops=0"]


def test_key_list_is_frozen() -> None:
    """A new key is a decision: add it here, to docs/configuration.md, and say in the commit why it is needed."""
    expected = set()
    for line in KEYS.strip().splitlines():
        section, _, names = line.rpartition(":")
        expected |= {f"{section}.{name}" if section else name for name in names.split()}
    own = {key for key in flat_config(Config()) if key.split(".")[0] not in ("data", "views", "model")}
    assert own == expected


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = [key for key in flat_config(Config()) if f"`{key}`" not in text]
    assert missing == []


def test_documented_defaults_are_the_codes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)`(?: \*\*o\*\*)? \| (.*?) \|", text, re.MULTILINE))
    flat = flat_config(Config()) | {
        "name": "name of the file",
        "data.path": "(none)",
        "train.epochs": "0 (1 without a file)",
    }
    shown = {
        key: value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        for key, value in flat.items()
    }
    wrong = {
        key: (rows.get(key), default)
        for key, default in shown.items()
        if rows.get(key) not in (default, default.removesuffix(".0"), f'"{default}"')
    }
    assert wrong == {}
    marked = set(re.findall(r"^\| `([\w.]+)` \*\*o\*\* \|", text, re.MULTILINE))
    assert marked == flat_config(Config()).keys() - decisive_keys(Config()).keys()


def test_operational_keys_exist() -> None:
    flat = flat_config(Config())
    assert [o for o in OPERATIONAL_KEYS if not any(k == o or k.startswith(o + ".") for k in flat)] == []


def test_resolved_configuration_reads_back_equal(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config(), ["model.sync_loss=contrastive", "optim.lr=5e-4"])
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config.name == "tiny"


def test_digest_follows_what_decides_the_weights(write_config: Callable[..., Path]) -> None:
    path = write_config()
    base = load_config(path)
    same = load_config(
        path, ["checkpoint.keep=9", "tracking.backend=mlflow", "train.fresh=true", "data.path=/elsewhere"]
    )
    other = load_config(path, ["train.seed=1", "data.flip=true"])
    assert config_digest(base) == config_digest(same)
    assert config_digest(base) != config_digest(other)
    assert differing_keys(other, base) == ["data.flip: False -> True", "train.seed: 0 -> 1"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "exactly one must be > 0"),
        ("version=2", "version (2) must be 1"),
        ("name=../x", "name (../x) must be letters"),
        ("optim.lr=nan", "optim.lr (nan) must be a number"),
        ("optim.warmup_share=0.1", "warmup_steps (2) and warmup_share (0.1) must not both be > 0"),
        ("optim.milestones=[0.5]", "must be given with schedule: steps"),
        ("model.depth=51", "depth (51) must be one of"),
        ("data.decoder=gpu", "data.decoder (gpu) must be one of: auto, cpu, nvdec, dali"),
        ("data.decoder=pyav", "data.decoder (pyav) is called cpu now; write data.decoder=cpu"),
        ("views.num_crops=2", "num_crops (2) must be 0"),
        ("data.num_threads=many", "data.num_threads (many) must be a whole number"),
    ],
)
def test_contradictions_are_refused(write_config: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(), [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"override '{override}'")


def test_number_of_classes_is_open_unless_set(write_config: Callable[..., Path]) -> None:
    (path,) = [path for path in CONFIGS if path.stem == "finetune_folder"]
    config = load_config(path)
    assert config.model.num_classes == 0
    assert config.with_num_classes(7).model == dataclasses.replace(PRESETS["avslowfast_r50_4x16"], num_classes=7)
    assert load_config(write_config()).with_num_classes(7).model.num_classes == 4
    with pytest.raises(ConfigError, match=r"model.num_classes \(-1\) must be at least 0"):
        load_config(path, ["model.num_classes=-1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.label_kind=timed"], "data.label_kind (timed) must be single for train.task=classification"),
        (["model.head=sigmoid"], "model.head (sigmoid) must be softmax for train.task=classification"),
        (["train.task=multilabel"], "data.label_kind (single) must be multi_hot or timed for train.task=multilabel"),
        (["train.task=multilabel", "data.label_kind=timed"], "model.head (softmax) must be sigmoid"),
        (["model.head=ssl"], "model.head (ssl) must be softmax for train.task=classification"),
        (["model.head=detection"], "model.head (detection) must be softmax for train.task=classification"),
        ([*DETECTION, "data.label_kind=single"], "must be boxes for train.task=detection"),
        ([*DETECTION, "model.head=sigmoid"], "model.head (sigmoid) must be detection for train.task=detection"),
        ([*DETECTION, "views.num_crops=1"], "views.num_crops (1) must be 0 (the whole frame)"),
        ([*DETECTION, "model.sync_loss=contrastive"], "must be none for train.task=detection"),
        (["data.rotation=true"], "data.rotation (true) must have model.head=ssl"),
        (["model.sync_loss=contrastive"], "set data.negatives=easy or curriculum"),
    ],
)
def test_task_head_and_labels_must_fit(write_config: Callable[..., Path], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_consistency(load_config(write_config(), overrides))
    assert message in str(caught.value)


def test_tasks_that_fit_pass(write_config: Callable[..., Path]) -> None:
    check_consistency(load_config(write_config(), ["model.sync_loss=contrastive", "data.negatives=easy"]))
    check_consistency(
        load_config(write_config(), ["train.task=multilabel", "data.label_kind=timed", "model.head=sigmoid"])
    )
    check_consistency(load_config(write_config(), [*DETECTION, "eval.class_subset=action_evaluated"]))


def test_steps_or_epochs() -> None:
    train = dataclasses.replace(Config().train, epochs=2.0, clips_per_step=16)
    assert train.total_steps(100) == round(2 * 100 / 16)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    check_consistency(load_config(path))
    assert load_config(path).run_dir == Path("runs") / load_config(path).name


def test_variant_of_the_command_line_names_the_keys_of_the_file_that_stay(caplog: pytest.LogCaptureFixture) -> None:
    (path,) = [path for path in CONFIGS if path.stem == "quickstart"]
    config = load_config(path, ["model.variant=avslowfast_r50_4x16", "model.dropout_rate=0.5"])
    assert (config.model.frame_stride, config.model.dropout_rate) == (8, 0.5)
    assert "num_classes: 2 (400), frame_stride: 8 (16), drop_pathway_rate: 0.2 (0.8)" in caplog.text
    assert "dropout_rate" not in caplog.text
    caplog.clear()
    load_config(path)
    assert not caplog.text


def test_rate_of_drop_pathway_is_the_loops_and_stays_readable() -> None:
    """The key is the section's, not the model's; a linear probe has fixed features and drops nothing (appendix A)."""
    assert {PRESETS[name].drop_pathway_rate for name in VARIANTS if name.endswith("_probe")} == {0.0}
    assert {PRESETS[name].drop_pathway_rate for name in VARIANTS if not name.endswith("_probe")} == {0.8}
    assert "drop_pathway_rate" not in VARIANTS["small"].to_dict()
    (path,) = [path for path in CONFIGS if path.stem == "quickstart"]
    assert load_config(path).model.drop_pathway_rate == 0.2
    with pytest.raises(ConfigError, match=r"model.drop_pathway_rate \(1.5\) must be at most 1.0"):
        load_config(path, ["model.drop_pathway_rate=1.5"])


def test_audio_is_dropped_where_there_is_none_unless_asked_otherwise(write_config: Callable[..., Path]) -> None:
    """The key is the section's: the model is told of every clip; one without vision has nothing else to go by."""
    assert load_config(write_config()).model.drops_silence
    assert not load_config(write_config(), ["model.clips_without_sound=mean_spectrum"]).model.drops_silence
    assert not PRESETS["audio_r50"].drops_silence
    assert not PRESETS["slowfast_r50_4x16"].drops_silence
    assert "clips_without_sound" not in VARIANTS["small"].to_dict()


def test_full_size_configuration_is_the_papers() -> None:
    (path,) = [path for path in CONFIGS if path.stem == "kinetics400_avslowfast_r50_4x16"]
    config = load_config(path)
    assert config.model == PRESETS["avslowfast_r50_4x16"]
    assert config.model.to_dict() == VARIANTS["avslowfast_r50_4x16"].to_dict()
    assert config.model.drop_pathway_rate == 0.8
    data = config.data
    assert (data.crop_size_px, data.jitter_min_px, data.jitter_max_px, data.flip) == (224, 256, 320, True)
    assert (config.views.num_clips, config.views.num_crops, config.views.crop_size_px) == (10, 3, 256)
    assert (config.train.clips_per_step, config.scaled_optim.lr, config.scaled_optim.lr_clips) == (1024, 1.6, 0)
    smaller = load_config(path, ["train.clips_per_step=64"])
    assert smaller.scaled_optim.lr == 0.1
    assert load_config(path, ["optim.lr_clips=0"]).scaled_optim.lr == 0.1
