"""Every recipe from official annotation files, in miniature, to a trained and scored model, at small shapes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.config import Config, load_config
from experiments.evaluate import main as evaluate_main
from experiments.train import main as train_main
from pipeline.annotations import read
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.store.reader import Store
from tests.experiments.test_recipes import RECIPES
from tests.pipeline.support.miniatures import MINIATURES
from tests.pipeline.test_datasets_end_to_end import write_videos

DATA_SETS = {"epic55": "epic_kitchens55", "epic100": "epic_kitchens100"}  # name in data.path: miniature
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
    name = Path(config.data.path).name
    miniature = MINIATURES[DATA_SETS.get(name, name)](folder)
    (folder / "scratch").mkdir()
    write_videos(miniature, folder / "scratch")
    annotations = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    settings = TranscodeSettings(codec="h264", short_side_px=48, clip_s=1.6)
    report = ingest(annotations, miniature.videos, folder / "store", settings, options=IngestOptions(workers=1))
    assert report.counts["refused"] == 0
    return folder / "store", len(Store.open(folder / "store").split("train").classes[config.data.label_set])


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_and_is_scored(tmp_path: Path, path: Path, capsys: Any) -> None:
    config = load_config(path)
    store, classes = store_for(config, tmp_path)
    overrides = [*SMALL, f"data.path={store}", f"output_dir={tmp_path / 'runs'}", f"model.num_classes={classes}"]
    overrides += [f"eval.precise_bn_batches={min(1, config.eval.precise_bn_batches)}"]
    if config.model.nonlocal_blocks:
        overrides.append("model.nonlocal_blocks=[0]")
    if config.model.res4_temporal_blocks:
        overrides.append("model.res4_temporal_blocks=1")
    assert run_command(train_main, [str(path), "--dry-run", *overrides]) == 0
    assert run_command(train_main, [str(path), *overrides]) == 0
    run_dir = tmp_path / "runs" / path.stem
    assert run_command(evaluate_main, [str(run_dir)]) == 0
    (report,) = (run_dir / "evaluations").glob("*/report.json")
    found = json.loads(report.read_text(encoding="utf-8"))
    primary = "mean_ap" if config.train.task == "multilabel" else "top1"
    assert 0 <= found["metrics"][primary] <= 1
    assert found["samples"]["scored"] > 0
    kept = {f.name for f in dataclasses.fields(config.model)} - {"num_classes"}
    changed = {text.split("=")[0].removeprefix("model.") for text in overrides if text.startswith("model.")}
    trained = load_config(run_dir / "config.yaml").model
    assert {k: getattr(trained, k) for k in kept - changed} == {k: getattr(config.model, k) for k in kept - changed}
