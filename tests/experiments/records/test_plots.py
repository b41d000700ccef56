"""Pictures of runs: worst pairs, axes, names in any script, and the validation's loss."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.records import plots
from experiments.records.plots import (
    SCORED_LABEL,
    STEPS_LABEL,
    draw_confusion,
    draw_curves,
    draw_per_class,
    worst_pairs,
)
from experiments.records.robustness_plot import in_lines
from experiments.tasks import Report
from experiments.tasks.metrics import loss_of_scores

pytestmark = pytest.mark.pictures
NAMES = ("run $5", "弹钢琴", "नाचना", "a_b")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, without a warning."""
    kept: list[Any] = []

    def keep(path: Path, draw: Any, size: tuple[float, float], dpi: int = 110) -> None:
        def draw_and_keep(figure: Any) -> None:
            draw(figure)
            kept.append(figure)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            original(path, draw_and_keep, size, dpi)

    original = plots.draw_picture
    monkeypatch.setattr(plots, "draw_picture", keep)
    return kept


def test_the_commonest_confusions_come_first() -> None:
    counts = np.array([[5, 3, 0], [1, 0, 3], [0, 0, 9]])
    assert worst_pairs(counts) == [(1, 2, 3, 0.75), (0, 1, 3, 0.375), (1, 0, 1, 0.25)]
    assert worst_pairs(counts, 1) == [(1, 2, 3, 0.75)]
    assert worst_pairs(np.diag([1, 2])) == []


def test_few_classes_have_numbers_and_many_a_list(tmp_path: Path, figures: list[Any]) -> None:
    counts = np.array([[5, 3, 0, 0], [1, 0, 3, 0], [0, 0, 9, 0], [0, 0, 0, 0]])
    draw_confusion(counts, NAMES, tmp_path / "few.png", "run, val, step 3")
    (axes, _) = figures[0].axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3", "3", "5", "9"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert figures[0].get_suptitle() == "run, val, step 3"
    many = np.eye(40, dtype=np.int64) * 9
    many[3, 7] = 4
    draw_confusion(many, [f"class {k}" for k in range(40)], tmp_path / "many.png")
    matrix, *others = figures[1].axes
    listed = [axes for axes in others if axes.get_title() == "commonest confusions"]
    assert [label.get_text() for label in listed[0].get_yticklabels()] == ["class 3 as class 7"]
    assert not matrix.texts


def test_shares_begin_at_zero_and_axes_have_names(tmp_path: Path, figures: list[Any]) -> None:
    spool = tmp_path / "metrics.jsonl"
    lines = []
    for step in (10, 20, 30):
        train = {
            "train/loss": 3.0 - step / 30,
            "train/top1": 0.5,
            "train/learning_rate": 0.1,
            "train/data_wait_share": 0.4,
        }
        lines += [{"step": step, "metrics": train}, {"step": step, "metrics": {"val/loss": 2.5, "val/top1": 0.4}}]
    spool.write_text("".join(json.dumps({"time_ms": 1, **line}) + "\n" for line in lines))
    draw_curves(spool, tmp_path / "curves.png", "my run")
    panels = figures[0].axes
    assert [axes.get_xlabel() for axes in panels] == ["step"] * 4
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylabel() for axes in panels)
    assert [axes.get_ylim()[1] for axes in (panels[2], panels[3])] == [102, 102]
    losses = {line.get_label(): line.get_ydata()[-1] for line in panels[0].lines}
    assert losses == {"training steps, with dropout and augmentation": 2.0, "validation": 2.5}
    assert panels[2].lines[0].get_ydata()[0] == 50
    assert figures[0].get_suptitle() == "my run"
    table = tuple((name, "3", "2", value) for name, value in zip(NAMES, ("0.5", "nan", "0.25", "1.0"), strict=True))
    draw_per_class(Report({"mean_ap": 0.58}, "mean_ap", (), table), tmp_path / "classes.png", "my run")
    (axes,) = figures[1].axes
    assert axes.get_ylim() == (0, 100)
    assert [bar.get_height() for bar in axes.patches] == [100, 50, 25]
    assert axes.get_title() == "my run: mean 58.00 %"


def test_both_splits_have_a_curve_in_the_same_mode(tmp_path: Path, figures: list[Any]) -> None:
    spool = tmp_path / "metrics.jsonl"
    lines = []
    for step in (10, 20):
        lines.append({"train/loss": 3.0, "train/top1": 0.25})
        lines.append({"train_eval/loss": 1.0, "train_eval/top1": 0.75, "train_eval/top5": 1.0})
        lines.append({"val/loss": 2.0, "val/top1": 0.5, "val/top5": 0.875})
        lines[-3:] = [{"time_ms": 1, "step": step, "metrics": metrics} for metrics in lines[-3:]]
    spool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(spool, tmp_path / "curves.png")
    loss, _, accuracy, _ = figures[0].axes
    assert {line.get_label(): list(line.get_ydata()) for line in loss.lines} == {
        "training steps, with dropout and augmentation": [3.0, 3.0],
        "training, scored as validation is": [1.0, 1.0],
        "validation": [2.0, 2.0],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in accuracy.lines} == {
        "training, scored as validation is": [75.0, 75.0],
        "validation": [50.0, 50.0],
        "validation: top 5": [87.5, 87.5],
    }


def test_one_evaluation_tells_its_splits_apart(tmp_path: Path, figures: list[Any]) -> None:
    spool = tmp_path / "metrics.jsonl"
    metrics = {"train/loss": 3.0, "train_eval/loss": 1.0, "val/loss": 2.0}
    spool.write_text(json.dumps({"time_ms": 1, "step": 5, "metrics": metrics}) + "\n")
    draw_curves(spool, tmp_path / "curves.png")
    fills = {line.get_label(): line.get_markerfacecolor() for line in figures[0].axes[0].lines}
    assert fills == {STEPS_LABEL: "0.75", SCORED_LABEL: "white", "validation": "C1"}


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    names = ("as it is", "of another video", "shifted by 0.5 s", "shifted by 1 s")
    assert [in_lines(name) for name in names] == [
        "as it is", "of another\nvideo", "shifted by\n0.5\u00a0s", "shifted by\n1\u00a0s",
    ]  # fmt: skip


def test_the_loss_of_scores_is_that_of_a_training() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]])
    assert loss_of_scores(scores, np.array([0, -1, 2])) == pytest.approx(-(np.log(0.7) + np.log(0.8)) / 2)
    assert loss_of_scores(scores, np.array([2, 2, 2])) == pytest.approx(-(np.log(0.1) + np.log(1e-7) + np.log(0.8)) / 3)
    positive = np.array([[1.0, 0, 0], [-1, -1, -1], [0, 1, 1]])
    expected = -np.log([0.7, 0.8, 0.9, 0.9, 0.1, 0.8]).mean()
    assert loss_of_scores(scores, positive) == pytest.approx(expected)
    assert np.isnan(loss_of_scores(scores, np.array([-1, -1, -1])))
