"""Losses and exact scores of the tasks, on small batches made by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.loss_window import LossWindow, TrainingFailure
from experiments.engine.scoring import ScoresNotFinite, require_finite_scores
from experiments.runtime import Runtime
from experiments.tasks import StepLoss, make_task
from model.output import ModelOutput
from pipeline.batch import Batch

ALONE = Runtime(0, 1, 0, torch.device("cpu"))


def batch(labels: Tensor, sample: list[int] | None = None, silent: tuple[int, ...] = (), heard: bool = True) -> Batch:
    count = len(labels)
    log_mel = torch.zeros(count, 1, 1, 1) if heard else None
    rows = torch.tensor(sample if sample is not None else list(range(count)))
    has_audio = torch.tensor([i not in silent for i in range(count)])
    none = torch.zeros(count, dtype=torch.bool)
    return Batch(
        frames=None, log_mel=log_mel, negative_log_mel=None, has_audio=has_audio, has_negative=none,
        is_substitute=none, labels=labels, rotation=None, sample=rows, view=torch.zeros_like(rows), position=rows,
        ids=[f"clip{i}" for i in range(count)], start_s=[0.0] * count,
    )  # fmt: skip


def test_cross_entropy_is_the_mean_over_clips_plus_the_synchronization_loss() -> None:
    task = make_task("classification", ("a", "b"))
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    expected = (math.log(2) + math.log(4)) / 2
    loss = task.step_loss(ModelOutput(logits, "logits"), torch.tensor([0, 1]))
    assert loss.total.item() == pytest.approx(expected)
    assert loss.per_clip.tolist() == pytest.approx([math.log(2), math.log(4)])
    sync = {"sync_loss": torch.tensor(0.5), "sync_accuracy": torch.tensor(1.0), "sync_pairs": torch.tensor(2.0)}
    outputs = ModelOutput(logits, "logits", **sync)
    both = task.step_loss(outputs, torch.tensor([0, 1]))
    assert both.total.item() == pytest.approx(expected + 0.5)
    assert both.parts["sync_loss"].item() == 0.5
    both.total.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-0.25, 0.25])


def test_views_are_averaged_and_every_sample_is_accounted_for() -> None:
    accumulator = make_task("classification", ("a", "b", "c")).accumulator(num_samples=4, views_per_sample=2)
    # Sample 0: the views disagree, the mean says a (right). 1: one view only. 2: no label. 3: not read at all.
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.5, 0.2], [0.2, 0.7, 0.1]])
    accumulator.add(scores, batch(torch.tensor([0, 0, 2]), [0, 0, 1], silent=(2,)))
    accumulator.add(torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]), batch(torch.tensor([-1, -1]), [2, 2]))
    accumulator.gather(ALONE)
    report = accumulator.report()
    assert report.metrics["top1"] == 0.5
    assert report.metrics["top5"] == 1.0
    assert report.metrics["mean_class_accuracy"] == 0.5
    assert report.counts == {
        "manifest": 4, "scored": 3, "quarantined": 1, "partly_read": 1, "silent": 1, "unlabelled": 1,
    }  # fmt: skip
    assert report.confusion is not None
    assert report.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert report.notes == ("top-5 of 3 classes is 100 % by definition",)


@pytest.mark.parametrize("heard", [True, False])
def test_nothing_is_silent_to_a_model_that_takes_no_sound(heard: bool) -> None:
    accumulator = make_task("classification", ("a", "b")).accumulator(num_samples=2, views_per_sample=1)
    accumulator.add(torch.eye(2), batch(torch.tensor([0, 1]), silent=(0, 1), heard=heard))
    assert accumulator.report().counts["silent"] == (2 if heard else 0)


@pytest.mark.parametrize("name", ["classification", "multilabel"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_views_with_scores_that_are_not_finite_are_counted_and_named(name: str, broken: float) -> None:
    accumulator = make_task(name, ("a", "b")).accumulator(num_samples=20, views_per_sample=2)
    single = name == "classification"
    accumulator.add(torch.tensor([[0.9, 0.1]]), batch(torch.tensor([0]) if single else torch.tensor([[1.0, 0]])))
    require_finite_scores(accumulator.bad)
    scores = torch.full((12, 2), 0.5)
    scores[1:11, 1] = broken
    labels = torch.zeros(12, dtype=torch.int64) if single else torch.zeros(12, 2)
    accumulator.add(scores, batch(labels, list(range(1, 13))))
    accumulator.gather(ALONE)
    assert accumulator.bad.views == 10
    with pytest.raises(ScoresNotFinite) as caught:
        require_finite_scores(accumulator.bad)
    assert str(caught.value).startswith(
        "scores of 10 of 40 views must be finite and are not (clip1 view 0, clip10 view"
    )
    assert "clip7 view 0, ...)" in str(caught.value)


def test_multilabel_takes_the_maximum_over_views() -> None:
    accumulator = make_task("multilabel", ("a", "b")).accumulator(num_samples=2, views_per_sample=2)
    labels = torch.tensor([[1.0, 0], [1.0, 0], [0, 0], [0, 0]])
    scores = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.5, 0.6], [0.6, 0.1]])
    accumulator.add(scores, batch(labels, [0, 0, 1, 1]))
    report = accumulator.report()
    assert report.metrics == {"mean_ap": 1.0}  # the mean of the views (0.5 against 0.55) would give 0.5
    assert report.table == (("a", "1", "1.0000"), ("b", "0", "nan"))
    assert report.notes == ("1 classes without positives are left out of the mean",)


def test_multilabel_loss_and_its_labels() -> None:
    task = make_task("multilabel", ("a", "b"))
    loss = task.step_loss(ModelOutput(torch.zeros(2, 2), "logits"), torch.tensor([[1.0, 0], [0, 0]]))
    assert loss.total.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="must be multi-hot"):
        task.step_loss(ModelOutput(torch.zeros(2, 2), "logits"), torch.tensor([0, 1]))


def test_a_view_scored_twice_is_a_bug() -> None:
    accumulator = make_task("classification", ("a", "b")).accumulator(num_samples=1, views_per_sample=1)
    for _ in range(2):
        accumulator.add(torch.tensor([[1.0, 0.0]]), batch(torch.tensor([0]), [0]))
    with pytest.raises(AssertionError, match="scored twice"):
        accumulator.report()


def step_loss(values: list[float], **parts: float) -> StepLoss:
    per_clip = torch.tensor(values)
    return StepLoss(per_clip.mean(), per_clip, {k: torch.tensor(v) for k, v in parts.items()})


def test_window_means_and_names_the_first_bad_step() -> None:
    window = LossWindow(ALONE)
    labels: Any = torch.tensor([0, 0])
    window.add(7, step_loss([1.0, 3.0], top1=0.5), batch(labels).ids)
    window.add(8, step_loss([2.0, 2.0], top1=1.0, sync=4.0), batch(labels).ids)
    assert window.close() == {"loss": 2.0, "sync": 4.0, "top1": 0.75}
    assert window.close() == {}
    for step, values in ((9, [1.0, 1.0]), (10, [1.0, math.nan]), (11, [math.nan, math.nan])):
        window.add(step, step_loss(values), batch(labels).ids)
    with pytest.raises(TrainingFailure, match=r"loss at step 10 must be finite and is not, for the clips clip1;"):
        window.close()
