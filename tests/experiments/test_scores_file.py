"""evaluate --scores: the same file by one process and by two, with the report's own numbers in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli.command_line import run_command
from experiments.combine import metrics_of
from experiments.evaluate import main as evaluate
from experiments.records.score_files import read_scores
from experiments.train import main as train
from pipeline import plan
from tests.experiments.support.forked import run_ranks

pytestmark = pytest.mark.integration


def test_one_and_two_processes_write_the_same_file(write_config: Callable[..., Path], tmp_path: Path) -> None:
    assert run_command(train, [str(write_config()), "train.steps=3"]) == 0
    run = tmp_path / "runs" / "tiny"
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    keys = [str(run), "eval.clips_per_batch=4"]
    assert run_command(evaluate, [*keys, "--scores", str(one)]) == 0
    code, output = run_ranks("experiments.evaluate", [*keys, "--scores", str(two)], 2, timeout_s=500)
    assert code == 0, output[-3000:]
    assert one.read_bytes() == two.read_bytes()
    found = read_scores(one)
    assert (len(found.ids), len(set(found.ids)), found.scores.shape) == (16, 16, (16, 4))
    assert found.views.tolist() == [1] * 16
    assert found.facts["split"] == "val"
    report = json.loads(next(run.glob("evaluations/*/report.json")).read_text())
    assert metrics_of(found)["top1"] == pytest.approx(report["metrics"]["top1"])
    assert found.scores.sum(1) == pytest.approx(np.ones(16))


def test_views_are_averaged_and_labels_may_be_absent(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    path, run = tmp_path / "three.npz", str(tmp_path / "runs" / "tiny")
    assert run_command(evaluate, [run, "views.num_clips=3", "--scores", str(path)]) == 0
    assert read_scores(path).views.tolist() == [3] * 16
    whole = plan.clip_labels
    monkeypatch.setattr(plan, "clip_labels", lambda samples, i, *rest: whole(samples, i, *rest) if i > 4 else ())
    here = [run, "data.num_workers=0"]  # worker processes would not see the change
    assert run_command(evaluate, [*here, "--scores", str(tmp_path / "test.npz"), "--output", str(tmp_path / "r")]) == 0
    found = read_scores(tmp_path / "test.npz")
    assert found.labels[:5].tolist() == [-1] * 5
    assert len(found.ids) == 16
    assert found.labels[5:].min() >= 0
    capsys.readouterr()
    assert run_command(evaluate, [run, "--scores", str(tmp_path / "scores.csv")]) == 2
    assert "must end in .npz" in capsys.readouterr().err
