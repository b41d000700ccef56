"""Every recipe of the paper's rows: it loads, is consistent, and its header says what its model and data come to."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest

from experiments.config import Config, load_config
from experiments.tasks.consistency import check_consistency
from model.config import ModelConfig
from model.flops import Cost, count

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
FOLDERS = ("kinetics", "audio", "ablations", "epic", "charades")
RECIPES = sorted(path for folder in FOLDERS for path in (CONFIGS / folder).glob("*.yaml"))
LINES = ("Paper", "Expected", "Counted", "Cost", "Command")
# Clips of the training split: docs/datasets. Kinetics-Sounds: 32 of 400 classes, by their share.
TRAINING_CLIPS = {"kinetics400": 240_258, "kinetics600": 392_622, "kinetics_sounds": 19_000}
H200_RESULT = ROOT / "benchmarks" / "results" / "gpu-nvidia-h200-2026-11-26.json"
BASE = "kinetics400_avslowfast_r50_4x16"


def header(path: Path) -> str:
    """The comment lines above the settings."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


@cache
def cost(model: ModelConfig) -> Cost:
    return count(model)


def gmacs(model: ModelConfig) -> float:
    """Giga multiply-adds of one view, with the laterals of the synchronization loss, as the paper counts.

    Models that differ in their classes are counted once: the head is one linear layer.
    """
    classes = 400
    found = cost(dataclasses.replace(model, num_classes=classes))
    head = sum(value for (pathway, _), value in found.multiply_adds.items() if pathway == "head") / 1e9
    return found.gmacs + found.sync_gmacs + head * (model.num_classes / classes - 1)


def test_head_grows_with_the_classes() -> None:
    model = ModelConfig(pathways=("audio",), fusion="none", num_classes=12)
    exact = count(model)
    assert gmacs(model) == pytest.approx(exact.gmacs + exact.sync_gmacs, abs=1e-12)


def counted(config: Config) -> float:
    """`gmacs` of a run's model; what the loop and the weights decide does not matter, nor what follows the logits."""
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    values = {k: v for k, v in vars(config.model).items() if k in names}
    head = "softmax" if config.model.head == "sigmoid" else config.model.head
    return gmacs(ModelConfig(**{**values, "freeze": "none", "head": head}))


@cache
def seconds_per_clip() -> float:
    """Of a step of the base model on an H200, 32 clips: a fifth of the steps have audio (P_d 0.8), as last measured."""
    rows = json.loads(H200_RESULT.read_text(encoding="utf-8"))["rows"]
    found = {
        row["audio"]: row["ms"] / row["clips"] / 1000
        for row in rows
        if row["benchmark"] == "step" and row["clips"] == 32 and row["way"] == "fused graph" and "ms" in row
    }
    return 0.2 * found["kept"] + 0.8 * found["dropped"]


def gpu_days(config: Config) -> float:
    """Days of one GPU that does nothing but steps: clips x seconds a clip, in proportion to the multiply-adds."""
    train = config.train
    clips = train.steps * train.clips_per_step or train.epochs * TRAINING_CLIPS[Path(config.data.path).name]
    (base,) = [path for path in RECIPES if path.stem == BASE]
    return clips * seconds_per_clip() * counted(config) / counted(load_config(base)) / 86_400


def test_there_is_a_recipe_for_every_row() -> None:
    found = {folder: len(list((CONFIGS / folder).glob("*.yaml"))) for folder in FOLDERS}
    assert found == {"kinetics": 11, "audio": 2, "ablations": 14, "epic": 8, "charades": 2}
    stems = [path.stem for path in CONFIGS.rglob("*.yaml")]
    assert len(stems) == len(set(stems)), "the name of a run is the name of its file"


@pytest.mark.integration  # counts 20 models
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_what_the_model_and_the_data_come_to(path: Path) -> None:
    config, text = load_config(path), header(path)
    check_consistency(config)
    for line in LINES:
        assert f"\n# {line}: " in text, line
    printed = re.search(r"^# Counted: ([\d.]+) GFLOPs x (\d+) view", text, re.M)
    assert printed is not None
    assert printed[1] == f"{counted(config):.1f}"
    assert int(printed[2]) == config.views.num_clips * config.views.num_crops
    days = re.search(r"^# Cost: .* Estimate, not measured: ([\d.]+) GPU-days", text, re.M)
    assert days is not None
    assert float(days[1]) == pytest.approx(gpu_days(config), rel=0.1)
    assert path.relative_to(ROOT).as_posix() in text
    assert config.run_dir == Path("runs") / path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_agree_with_the_appendix_and_with_each_other(path: Path) -> None:
    config = load_config(path)
    assert (config.model.sync_loss != "none") == (config.data.negatives == "curriculum")
    if config.train.epochs:
        assert config.optim.lr / config.optim.lr_clips == 0.1 / 64  # A.4: 1.6 at 1024
        assert config.train.epochs == (196 if config.model.has_visual and config.model.num_frames > 4 else 256)
    assert config.data.jitter_max_px == (340 if config.model.depth == 101 else 320)
    if config.train.init_from:
        start = Path(config.train.init_from).name
        assert start in {other.stem for other in RECIPES}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_statistics_are_made_precise_where_drop_pathway_trains(path: Path) -> None:
    """Moving averages mix steps with audio and without; see LOG.md for what that costs."""
    config = load_config(path)
    both = config.model.has_audio and config.model.has_visual
    if both and config.model.drop_pathway_rate > 0 and config.model.freeze == "none":
        assert config.eval.precise_bn_batches == 200


def test_table_of_the_page_names_every_recipe() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [path.stem for path in RECIPES if f"`{path.stem}`" not in page] == []
