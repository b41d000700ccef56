"""Every recipe from official annotation files, in miniature, to a trained and scored model, at small shapes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.config import Config, load_config
from experiments.engine.trained_model import load_target
from experiments.evaluate import main as evaluate_main
from experiments.train import main as train_main
from pipeline.annotations import read
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.store.reader import Store
from tests.experiments.test_recipes import CONFIGS, RECIPES
from tests.pipeline.support.miniatures import MINIATURES
from tests.pipeline.test_datasets_end_to_end import write_videos

DATA_SETS = {  # name in data.path: miniature
    "epic55": "epic_kitchens55", "epic100": "epic_kitchens100", "ava2.1": "ava_v2.1", "ava2.2": "ava_v2.2",
}  # fmt: skip
PRIMARY = {
    "classification": "top1", "multilabel": "mean_ap", "detection": "mean_ap", "self_supervision": "pretext_accuracy",
}  # fmt: skip
AVA = sorted(CONFIGS.glob("ava*.yaml"))
SSL = sorted((CONFIGS / "ssl").glob("*.yaml"))
SMALL = [
    "runtime.device=cpu", "runtime.precision=fp32", "runtime.num_threads=1", "tracking.backend=none",
    "data.target_fps=10", "data.crop_size_px=32", "data.jitter_min_px=32", "data.jitter_max_px=48",
    "data.num_threads=1", "data.num_workers=0", "views={num_clips: 1, num_crops: 1, crop_size_px: 32}",
    "model.depth=14", "model.width=16", "model.beta_fast=0.25", "model.num_frames=2", "model.frame_stride=8",
    "model.alpha_fast=4", "model.alpha_audio=64", "model.pool_window=1", "model.clips_per_bn_group=2",
    "train.clips_per_step=4", "train.epochs=0", "train.steps=2", "optim.warmup_steps=0", 'train.init_from=""',
    "eval.interval_steps=0", "train.max_clips_per_pass=2",
]  # fmt: skip


def store_for(config: Config, folder: Path) -> tuple[Path, int]:
    """Make the recipe's data set in miniature; returns the store and the number of its classes."""
    folder.mkdir(exist_ok=True)
    name = Path(config.data.path).name
    miniature = MINIATURES[DATA_SETS.get(name, name)](folder)
    (folder / "scratch").mkdir()
    write_videos(miniature, folder / "scratch")
    annotations = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    settings = TranscodeSettings(codec="h264", short_side_px=48, clip_s=1.6)
    report = ingest(annotations, miniature.videos, folder / "store", settings, options=IngestOptions(workers=1))
    assert report.counts["refused"] == 0
    return folder / "store", len(Store.open(folder / "store").classes[config.data.label_set])


def train_recipe(path: Path, folder: Path, *more: str) -> Path:
    """Train a recipe on its data set in miniature, at small shapes; returns the folder of the run.

    Args:
        path: of the recipe. folder: for data and runs. more: settings besides.
    """
    config = load_config(path)
    store, classes = store_for(config, folder)
    overrides = [*SMALL, f"data.path={store}", f"output_dir={folder / 'runs'}"]
    overrides += [f"eval.precise_bn_batches={min(1, config.eval.precise_bn_batches)}"]
    if config.model.head != "ssl":
        overrides.append(f"model.num_classes={classes}")
    if config.train.task == "detection":
        overrides.append("views={num_clips: 1, num_crops: 0, crop_size_px: 48}")
    if config.model.nonlocal_blocks:
        overrides.append("model.nonlocal_blocks=[0]")
    if config.model.res4_temporal_blocks:
        overrides.append("model.res4_temporal_blocks=1")
    overrides += more
    assert run_command(train_main, [str(path), "--dry-run", *overrides]) == 0
    assert run_command(train_main, [str(path), *overrides]) == 0
    run_dir = folder / "runs" / path.stem
    kept = {f.name for f in dataclasses.fields(config.model)} - {"num_classes"}
    changed = {text.split("=")[0].removeprefix("model.") for text in overrides if text.startswith("model.")}
    trained = load_config(run_dir / "config.yaml").model
    assert {k: getattr(trained, k) for k in kept - changed} == {k: getattr(config.model, k) for k in kept - changed}
    return run_dir


def score_run(run_dir: Path) -> None:
    """Evaluate a run; its metric is a share of the samples that were scored."""
    assert run_command(evaluate_main, [str(run_dir)]) == 0
    (report,) = (run_dir / "evaluations").glob("*/report.json")
    found = json.loads(report.read_text(encoding="utf-8"))
    assert 0 <= found["metrics"][PRIMARY[load_config(run_dir / "config.yaml").train.task]] <= 1
    answers = sum(count for name, count in found["samples"].items() if name == "scored" or "answers" in name)
    assert answers > 0  # of samples, or of the pretext tasks


@pytest.mark.slow
@pytest.mark.parametrize("path", [*RECIPES, *AVA], ids=lambda path: path.stem)
def test_recipe_trains_and_is_scored(tmp_path: Path, path: Path) -> None:
    score_run(train_recipe(path, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("path", SSL, ids=lambda path: path.stem)
def test_self_supervised_recipe_trains_after_the_one_it_starts_from(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    if not config.train.init_from:
        score_run(train_recipe(path, tmp_path))
        return
    (start,) = [other for other in SSL if other.stem == Path(config.train.init_from).name]
    before = train_recipe(start, tmp_path / "before")
    after = train_recipe(path, tmp_path / "after", f"train.init_from={before}")
    score_run(after)
    old, new = weights(before), weights(after)
    same = [torch.equal(old[name], new[name]) for name in old.keys() & new.keys() if "head" not in name]
    assert same
    assert all(same) == (config.model.freeze == "backbone")  # only the classifier learns


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The model of a run's last checkpoint."""
    found: dict[str, torch.Tensor] = load_target(run_dir, "last", [])[1].load()["model"]
    return found
