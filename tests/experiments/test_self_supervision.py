"""Self-supervision from the command line: both losses, each alone, both accuracies, and a probe that starts from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError
from experiments.config import load_config
from experiments.evaluate import main as evaluate
from experiments.records.run_folder import read_evaluations
from experiments.records.spool import read_metrics
from experiments.tasks.consistency import check_consistency
from experiments.tasks.self_supervision import PretextScores, SelfSupervision
from experiments.train import main as train
from model.output import ModelOutput
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.open import open_dataset
from pipeline.plan import MIN_HARD_SHIFT_S, EvalPlan, Pretext

SSL = ["train.task=self_supervision", "model.head=ssl", "model.fusion=none", "model.lateral_stages=[]"]
ROT = ["data.rotation=true"]
CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
UNTRAINED = ["optim.lr=1e-12", "train.steps=30"]  # statistics of the norms, no weights
AVS = ["model.sync_loss=contrastive", "model.sync_levels=[pool5]", "data.negatives=curriculum"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("losses", "metrics"),
    [
        (ROT, {"rotation_accuracy"}),
        (AVS, {"sync_accuracy_easy", "sync_accuracy_hard"}),
        ([*ROT, *AVS], {"rotation_accuracy", "sync_accuracy_easy", "sync_accuracy_hard"}),
    ],
    ids=["rotation", "synchronization", "both"],
)
def test_each_loss_alone_and_both(
    losses: list[str], metrics: set[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert run_command(train, [str(write_config()), *SSL, *losses, "train.steps=4"]) == 0
    run = tmp_path / "runs" / "tiny"
    found = read_evaluations(run)[4]
    assert found.keys() == metrics | {"pretext_accuracy"}
    assert all(0 <= value <= 1 for value in found.values())
    logged = {name for name in read_metrics(run / "metrics.jsonl") if name.endswith("accuracy") and "train/" in name}
    assert logged == {f"train/{n}" for n in ("rotation_accuracy", "sync_accuracy") if any(n[:4] in m for m in metrics)}
    if len(metrics) < 3:
        return
    assert run_command(evaluate, [str(run), "--checkpoint", "last", "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["metrics"] == pytest.approx(found)
    assert report["samples"]["rotation_answers"] == 16
    assert report["samples"]["sync_answers_hard"] == 16
    probe = ["model.fusion=none", "model.lateral_stages=[]", "model.freeze=backbone", f"train.init_from={run}"]
    assert run_command(train, [str(write_config("probe")), *probe, "model.drop_pathway_rate=0.0"]) == 0
    log = (tmp_path / "runs" / "probe" / "log.txt").read_text()
    assert "the classifier starts afresh, the classes are others" in log  # four rotations are not four classes


def test_evaluations_turn_clips_and_choose_negatives_by_position(tiny_store: Path) -> None:
    dataset = open_dataset(tiny_store, "val")
    spec = ClipSpec(16, 2, 64, 40)

    def plans(**asked: Any) -> list[Any]:
        plan = EvalPlan(dataset, spec, DataConfig(), ViewConfig(4, 1, 32), Pretext(**asked))
        return [plan.clip(position) for position in range(plan.num_positions)]

    hard, easy, none = plans(rotation=True, negatives="hard"), plans(rotation=True, negatives="easy"), plans()
    assert hard == plans(rotation=True, negatives="hard")
    counts = np.bincount([clip.rotation for clip in hard], minlength=4)
    assert counts.min() > len(hard) / 8
    assert [clip.rotation for clip in hard] == [clip.rotation for clip in easy]
    assert {(clip.rotation, clip.negative_media) for clip in none} == {(0, -1)}
    shifts = [abs(c.negative_start - c.audio_start) / 16_000 for c in hard if c.negative_media >= 0]
    assert len(shifts) > len(hard) / 2
    assert min(shifts) >= MIN_HARD_SHIFT_S
    assert all(clip.negative_media in (clip.media, -1) for clip in hard)
    assert not any(dataset.same_video(clip.negative_media, clip.media) for clip in easy)


def test_right_answers_are_counted() -> None:
    scores = PretextScores(8)
    turned = torch.eye(4)[[0, 1, 2, 2]]
    sync = {"sync_loss": torch.tensor(0.0), "sync_accuracy": torch.tensor(0.5), "sync_pairs": torch.tensor(3.0)}
    scores.add(ModelOutput(turned, "scores", **sync), torch.tensor([0, 1, 2, 3]), "easy")
    scores.add(ModelOutput(turned, "scores", **sync), None, "hard")
    scores.add(ModelOutput(turned, "scores", **{**sync, "sync_accuracy": torch.tensor(1.0)}), None, "hard")
    report = scores.report(8)
    assert report.metrics["rotation_accuracy"] == 0.75
    assert (report.metrics["sync_accuracy_easy"], report.metrics["sync_accuracy_hard"]) == (0.5, 0.75)
    assert report.metrics["pretext_accuracy"] == pytest.approx((0.75 + 0.5 + 0.75) / 3)


def test_loss_is_cross_entropy_of_the_turns_plus_synchronization() -> None:
    logits, turns = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    task = SelfSupervision()
    alone = task.step_loss(ModelOutput(logits, "logits"), turns)
    torch.testing.assert_close(alone.total, torch.nn.functional.cross_entropy(logits, turns))
    sync = {"sync_loss": torch.tensor(0.3), "sync_accuracy": torch.tensor(0.5), "sync_pairs": torch.tensor(6.0)}
    both = task.step_loss(ModelOutput(logits, "logits", **sync), turns)
    torch.testing.assert_close(both.total, alone.total + 0.3)
    synchronization = task.step_loss(ModelOutput(logits, "logits", **sync), turns[:0])
    assert synchronization.total.item() == pytest.approx(0.3)
    assert synchronization.parts.keys() == {"sync_loss", "sync_accuracy"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing would be learnt"),
        ([*ROT, "views.num_crops=3"], "views.num_crops (3) must be 1 for data.rotation"),
        ([*ROT, "model.head=softmax"], "data.rotation (true) must have model.head=ssl"),
        ([*ROT, "eval.class_subset=x"], "eval.class_subset must be empty"),
        (["model.sync_loss=contrastive", "model.sync_levels=[pool5]"], "set data.negatives=easy or curriculum"),
    ],
)
def test_what_does_not_fit_is_refused(write_config: Callable[..., Path], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_consistency(load_config(write_config(), [*SSL, *overrides]))
    assert message in str(caught.value)


@pytest.mark.slow
def test_toy_recipes_learn_what_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/self_supervision.md: both pretexts, then a probe on their features and one on an untrained network's."""
    monkeypatch.chdir(tmp_path)  # data, runs

    def trained(config: str, name: str, *overrides: str) -> dict[str, float]:
        command = [str(CONFIGS / config), f"name={name}", "tracking.backend=none", *overrides]
        assert run_command(train, command) == 0
        return next(iter(read_evaluations(tmp_path / "runs" / name).values()))

    found = trained("events_ssl.yaml", "events_ssl")
    assert found["rotation_accuracy"] >= 0.95
    assert found["sync_accuracy_hard"] >= 0.8
    assert found["sync_accuracy_easy"] >= 0.8
    untrained = trained("events_ssl.yaml", "events_untrained", *UNTRAINED)
    assert untrained["rotation_accuracy"] < 0.35
    probe = trained("events_probe.yaml", "events_probe")
    blind = trained("events_probe.yaml", "events_probe_untrained", "train.init_from=runs/events_untrained")
    assert probe["top1"] >= blind["top1"] + 0.2
