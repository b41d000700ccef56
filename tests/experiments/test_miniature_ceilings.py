"""Every data set in miniature: its recipe's task reaches what can be known, and blind or deaf exactly what is left.

From official annotation files and encoded films through prepare, train and evaluate, as a user would. The figures are
printed (pytest -s) and stand in docs/datasets/README.md.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from experiments.cli.command_line import run_command
from experiments.combine import main as combine
from experiments.engine.data import eval_loader
from experiments.engine.scorer import scorer_of_run
from experiments.engine.trained_model import load_target
from experiments.evaluate import main as evaluate
from experiments.prepare import main as prepare
from experiments.records.score_files import ScoreFile, read_scores
from experiments.runtime import Runtime
from experiments.train import main as train
from pipeline.store.reader import Store
from tests.experiments.support import planted_sets
from tests.experiments.support.planted_scenes import best_mean_ap, best_top1
from tests.experiments.support.planted_sets import BLIND, Planted
from tests.experiments.test_recipes import CONFIGS

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
WAYS = {"both": [], "sight": ["model.pathways=[slow,fast]"], "sound": ["model.pathways=[audio]"]}
SMALL = [
    "runtime.device=cpu", "runtime.precision=fp32", "runtime.num_threads=1", "tracking.backend=none",
    "data.target_fps=15", "data.crop_size_px=32", "data.jitter_min_px=32", "data.jitter_max_px=40",
    "data.negatives=none", "data.num_threads=1", "data.num_workers=0", "views.num_crops=1", "views.crop_size_px=32",
    "model.variant=small", "model.frame_stride=4", "model.pool_window=1", "model.dropout_rate=0",
    "model.drop_pathway_rate=0.2", "model.freeze=none", "train.clips_per_step=16", "train.epochs=0",
    'train.init_from=""', "optim.lr_clips=0", "optim.warmup_steps=20", "optim.warmup_start_lr=0",
    "eval.interval_steps=0", "eval.precise_bn_batches=4", "eval.clips_per_batch=32", "checkpoint.interval_steps=0",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A data set with the recipe that is trained on it.

    Args:
        make: writes the data set. recipe: below experiments/configs.
        sight, sound: the best score of who has only that, as the data set was thought out; both: 100 %.
        settings: that differ from SMALL and the recipe.
        label_set: of the labels. silent: validation samples without sound: no track, or digital zeros.
    """

    make: Callable[[Path], Planted]
    recipe: str
    sight: float
    sound: float
    settings: tuple[str, ...] = ("train.steps=100", "optim.lr=0.05", "views.num_clips=1")
    label_set: str = "action"
    silent: int = 0


def make_store(planted: Planted, folder: Path) -> Path:
    """Ingest the films with their official files."""
    command = [planted.reader, "--annotations", str(planted.annotations), "--videos", str(planted.videos)]
    command += ["--out", str(folder / "store"), "--codec", "h264", "--short-side", "48", "--workers", "1"]
    command += ["--clip-seconds", "1.1"]
    for option in planted.options:
        command += ["--option", option]
    assert prepare(command) == 0
    return folder / "store"


def train_and_score(recipe: str, way: str, settings: list[str], output: Path) -> ScoreFile:
    """Train a recipe, blind or not, evaluate it, and return the scores that the evaluation wrote."""
    name, path = f"{Path(recipe).stem}-{way}", CONFIGS / recipe
    overrides = [*SMALL, *settings, *WAYS[way], f"output_dir={output / 'runs'}", f"name={name}"]
    assert run_command(train, [str(path), *overrides]) == 0
    scores = output / f"{name}.npz"
    command = [str(output / "runs" / name), "--scores", str(scores), "--output", str(output / name)]
    assert run_command(evaluate, [*command, "--checkpoint", "last"]) == 0
    return read_scores(scores)


def metrics_of(file: ScoreFile) -> dict[str, float]:
    """The metrics of the report beside a score file."""
    found: dict[str, float] = json.loads((Path(file.name).with_suffix("") / "report.json").read_text())["metrics"]
    return found


def require(name: str, reached: dict[str, float], ceilings: dict[str, float]) -> None:
    """Print reached and ceiling, and require that they are within 5 points of each other."""
    for way in BLIND:
        print(f"{name:32s} {way:5s} ceiling {100 * ceilings[way]:6.2f} %  reached {100 * reached[way]:6.2f} %")
    assert reached == pytest.approx(ceilings, abs=0.05)


def test_ceilings_are_counted_right() -> None:
    answers = [("a", 1), ("a", 1), ("b", 1), ("b", 2), ("c", 2)]
    assert best_top1(answers) == (2 + 1) / 5
    rain, wind = frozenset({0}), frozenset({0, 1})
    # 0: both positives of group 1 (score 1), then one of two in group 2. 1: one of two, twice the same score.
    found = best_mean_ap([(rain, 1), (wind, 1), (frozenset(), 2), (wind, 2)])
    assert found == pytest.approx(((2 * 1 + 1 * 3 / 4) / 3 + 2 / 4) / 2)


CASES = {
    "kinetics_sounds": Case(
        planted_sets.kinetics_sounds,
        "kinetics/kinetics_sounds_avslowfast_r50_4x16.yaml",
        sight=1 / 2,
        sound=1 / 2,
        label_set="sounds",
    ),
    "ucf101": Case(planted_sets.ucf101, "ssl/ucf101_finetune_avslowfast_r50_16x4.yaml", 2 / 3, 1 / 2, silent=24),
    "hmdb51": Case(planted_sets.hmdb51, "ssl/hmdb51_finetune_avslowfast_r50_16x4.yaml", 1 / 3, 1 / 2, silent=24),
    "charades": Case(
        planted_sets.charades,
        "charades/charades_avslowfast_r101_nl_16x8.yaml",
        sight=(2 + 6 / 2) / 8,
        sound=(2 + 6 / 2) / 8,
        settings=("model.head=sigmoid", "train.steps=150", "optim.lr=0.3", "views.num_clips=3"),
        silent=4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_reaches_what_can_be_known(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    planted = case.make(tmp_path)
    store = make_store(planted, tmp_path)
    classes = Store.open(store).classes[case.label_set]
    settings = [f"data.path={store}", f"model.num_classes={len(classes)}", *case.settings]
    reached = {}
    for way in BLIND:
        file = train_and_score(case.recipe, way, settings, tmp_path)
        assert set(file.ids) == set(planted.truth)
        check_labels(file, planted, case.label_set)
        silent = int((file.silent == file.views).sum())
        assert silent == (0 if way == "sight" else case.silent)
        metrics = metrics_of(file)
        reached[way] = metrics["mean_ap" if name == "charades" else "top1"]
    ceilings = planted.ceilings(case.label_set)
    assert ceilings == pytest.approx({"both": 1.0, "sight": case.sight, "sound": case.sound})
    require(name, reached, ceilings)
    if name == "charades":
        check_maximum(tmp_path / "runs" / f"{Path(case.recipe).stem}-both", tmp_path)


def check_labels(file: ScoreFile, planted: Planted, label_set: str) -> None:
    """What was scored has the labels of the official files, each sample those of its own."""
    for sample, labels in zip(file.ids, file.labels, strict=True):
        found = set(np.flatnonzero(labels).tolist()) if file.labels.ndim == 2 else {int(labels)}
        assert found == planted.truth[sample][1][label_set], sample


def check_maximum(run_dir: Path, output: Path) -> None:
    """A sample's scores are the largest of its views', counted here: one half of each video shows nothing."""
    file = read_scores(output / f"{run_dir.name}.npz")
    assert file.facts["reduction"] == "max"
    config, checkpoint = load_target(run_dir, "last", [])
    scorer = scorer_of_run(config, checkpoint, ALONE)
    views: dict[str, list[NDArray[np.float32]]] = {name: [] for name in file.ids}
    for batch in eval_loader(config, Store.open(Path(config.data.path)).split("val"), ALONE):
        for name, scores in zip(batch.ids, scorer.score(batch).numpy(), strict=True):
            views[name].append(scores)
    assert {len(found) for found in views.values()} == {3}
    largest, mean = (np.stack([how(views[name], axis=0) for name in file.ids]) for how in (np.max, np.mean))
    assert file.scores == pytest.approx(largest, abs=1e-6)
    assert np.abs(file.scores - mean).max() > 0.2


# EPIC-Kitchens: two recipes, one score -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("edition", [55, 100])
def test_epic_reaches_what_can_be_known_of_verbs_nouns_and_actions(tmp_path: Path, edition: int, capsys: Any) -> None:
    planted = planted_sets.epic(tmp_path, edition)
    store = make_store(planted, tmp_path)
    reached: dict[str, dict[str, float]] = {"verb": {}, "noun": {}, "action": {}}
    for way in BLIND:
        files = {}
        for kind in ("verb", "noun"):
            recipe = f"epic/epic{edition}_{kind}_avslowfast_r101_8x8.yaml"
            settings = [f"data.path={store}", "train.steps=60", "optim.lr=0.05"]
            files[kind] = train_and_score(recipe, way, settings, tmp_path)
            check_labels(files[kind], planted, kind)
            reached[kind][way] = metrics_of(files[kind])["top1"]
        capsys.readouterr()
        assert run_command(combine, ["actions", files["verb"].name, files["noun"].name]) == 0
        reached["action"][way] = actions_right(planted.annotations, files["verb"], files["noun"])
        assert f"action: top1 {100 * reached['action'][way]:.2f} %" in capsys.readouterr().out
    for kind, found in reached.items():
        blind = 1 / 4 if kind == "action" else 1 / 2
        assert planted.ceilings(kind) == {"both": 1.0, "sight": blind, "sound": blind}
        require(f"epic_kitchens{edition} {kind}", found, planted.ceilings(kind))


def actions_right(annotations: Path, verb: ScoreFile, noun: ScoreFile) -> float:
    """Share of validation samples whose best pair is the official one, counted from the CSV file itself."""
    truth = {}
    for table in ("EPIC_train_action_labels.csv", "EPIC_100_validation.csv"):
        if (annotations / table).is_file():
            with (annotations / table).open(newline="") as lines:
                for row in csv.DictReader(lines):
                    name = row.get("uid") or row["narration_id"]
                    truth[name] = int(row["verb_class"]), int(row["noun_class"])
    right = []
    nouns = dict(zip(noun.ids, noun.scores, strict=True))
    for name, verbs in zip(verb.ids, verb.scores, strict=True):
        pairs = np.outer(verbs, nouns[name])
        right.append(np.argwhere(pairs == pairs.max()).tolist() == [list(truth[name])])
    return float(np.mean(right))
