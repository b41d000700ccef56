"""predict says of a file what an evaluation of the run's task would: the same views, reduction and classes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.engine.predictor import Predictor, _Tally
from experiments.engine.scorer import subset_of_run
from experiments.engine.trained_model import load_target
from experiments.predict import main as predict
from experiments.runtime import Runtime
from experiments.tasks import make_task
from experiments.train import main as train
from tests.pipeline.support.plain_videos import write_video

pytestmark = pytest.mark.integration
ALONE = Runtime(0, 1, 0, torch.device("cpu"))


def scored(run: Path, file: Path, *overrides: str) -> dict[str, float]:
    (found,) = Predictor.open(run, overrides=overrides).predict([file])
    return dict(found.best())


def changing_video(path: Path) -> Path:
    """Noise whose contrast and place change from second to second, so that views differ."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 40 + 2 * i, (48, 64, 3), dtype=np.uint8) for i in range(100)]
    return write_video(path, frames=frames)


def test_a_multilabel_model_takes_the_maximum_of_the_views(write_config: Callable[..., Path], tmp_path: Path) -> None:
    keys = ["model.head=sigmoid", "data.label_kind=multi_hot", "train.task=multilabel", "train.steps=3", "optim.lr=0.2"]
    assert run_command(train, [str(write_config()), *keys]) == 0
    run, file = tmp_path / "runs" / "tiny", changing_video(tmp_path / "a.mp4")
    one, five = (scored(run, file, f"views.num_clips={n}") for n in (1, 5))
    assert one.keys() == five.keys()
    assert all(five[name] >= one[name] for name in one)  # the one clip is the middle one of the five
    assert max(five[name] - one[name] for name in one) > 0


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (5, 1), (10, 3)])
@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_views_and_moments_are_reduced_by_the_task_s_own_rule(task: Any, clips: int, crops: int) -> None:
    scores = np.random.default_rng(clips).random((clips, crops, 4), np.float32)
    tally = _Tally(4, make_task(task, ("a", "b", "c", "d")).reduction)
    for clip in range(clips):
        for crop in range(crops):
            tally.add((0, clip), (clip, clip + 1.0), scores[clip, crop], heard=True)
    media: Any = SimpleNamespace(duration_s=lambda number: float(clips))
    found = tally.parts(media, 0)
    reduce = np.max if task == "multilabel" else np.mean
    assert found.views == clips * crops
    assert found.scores == pytest.approx(reduce(scores, axis=(0, 1)), abs=1e-6)
    assert found.moments == pytest.approx(reduce(scores, axis=1), abs=1e-6)


def test_classes_that_cannot_be_predicted_are_not(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.store.reader import Store

    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    run, file = tmp_path / "runs" / "tiny", changing_video(tmp_path / "a.mp4")
    whole = scored(run, file, "views.num_clips=1")
    lists = {"action": [f"class_{k}" for k in range(4)], "some": ["class_1", "class_3"]}
    monkeypatch.setattr(Store, "classes", property(lambda self: lists))
    found = scored(run, file, "views.num_clips=1", "eval.class_subset=some")
    assert found.keys() == {"class_1", "class_3"}
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert found["class_1"] > whole["class_1"]
    config, _ = load_target(run, "best", ["eval.class_subset=some"])
    subset = subset_of_run(config, ALONE)
    assert subset is not None
    assert subset.allowed == (False, True, False, True)
    capsys.readouterr()
    gone = ["--set", "eval.class_subset=some", "--set", f"data.path={tmp_path}/gone"]
    assert run_command(predict, [str(run), str(file), *gone]) == 2
    assert "must be a class list of the run's data, which are not there" in capsys.readouterr().err
