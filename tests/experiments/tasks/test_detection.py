"""Detection: the loss of boxes; average precision against AVA's rules written once more, on random and odd input."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.engine.scoring import ScoresNotFinite, require_finite_scores
from experiments.records.detections import DetectionsError, check_detections_file, write_detections
from experiments.records.plots import draw_per_class
from experiments.records.reporting import result_lines
from experiments.runtime import Runtime
from experiments.tasks import BoxTargets, Detection
from experiments.tasks.box_table import BoxTable
from experiments.tasks.detection import BoxScores
from experiments.tasks.detection_metrics import LabelledBoxes, area_under_curve, average_precision_of_boxes
from model.output import ModelOutput
from pipeline.batch import Batch
from tests.experiments.support import ava_oracle

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
NAMES = tuple(f"act {k}" for k in range(8))


# The loss --------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_boxes_and_classes_and_is_told_by_clip() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, -math.log(3)]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    targets = BoxTargets(labels, torch.tensor([0, 2, 2]), num_clips=4)
    loss = Detection(("a", "b")).step_loss(ModelOutput(logits, "logits"), targets)
    each = [math.log(2), (math.log(4 / 3) + math.log(2)) / 2, (math.log(2) + math.log(4 / 3)) / 2]
    assert loss.total.item() == pytest.approx(sum(each) / 3)
    assert loss.per_clip.tolist() == pytest.approx([each[0], 0.0, (each[1] + each[2]) / 2, 0.0])
    assert loss.parts["boxes_per_clip"].item() == 0.75


def test_step_without_any_box_has_loss_zero_and_gradients_of_zero() -> None:
    logits = torch.zeros(0, 2, requires_grad=True)
    targets = BoxTargets(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 3, weight=torch.tensor(0.0))
    loss = Detection(("a", "b")).step_loss(ModelOutput(logits, "logits"), targets)
    loss.total.backward()
    assert (loss.total.item(), loss.per_clip.tolist()) == (0.0, [0.0, 0.0, 0.0])
    assert logits.grad is not None


def test_labels_of_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="labels of clips must be multi-hot"):
        Detection(("a", "b")).step_loss(ModelOutput(torch.zeros(2, 2), "logits"), torch.zeros(2, 2))


# Average precision -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A split with its scores: boxes of each image (corners, labels; none = detected), (R, K) scores."""

    table: BoxTable
    scores: Tensor
    evaluated: tuple[bool, ...]


def corners(rng: np.random.Generator, count: int) -> np.ndarray:
    low = rng.uniform(0, 0.6, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.1, 0.4, (count, 2))], 1).round(3)


def random_case(seed: int, images: int = 30, ties: bool = False, boxes: int = 5) -> Case:
    """Detections near the ground truth and far from it, several of one person, images without any."""
    rng = np.random.default_rng(seed)
    rows, counts, labels, offsets = [], [], [], [0]
    for _ in range(images):
        truth = corners(rng, int(rng.integers(0, 4)))
        for box in truth:
            own = np.flatnonzero(rng.random(len(NAMES)) < 0.25)
            own = own if len(own) else np.array([0])
            rows.append(box)
            counts.append(len(own))
            labels += own.tolist()
        near = truth[rng.integers(0, len(truth), boxes)] if len(truth) else np.zeros((0, 4))
        near = np.clip(near + rng.normal(0, 0.03, near.shape), 0, 1).round(3)
        near = near[(near[:, 2] > near[:, 0]) & (near[:, 3] > near[:, 1])]
        detected = np.concatenate([near, corners(rng, int(rng.integers(0, 3)))])
        rows += list(detected)
        counts += [0] * len(detected)
        offsets.append(len(rows))
    names = tuple(f"video{i:06d},{902 + i:04d}" for i in range(images))
    as_int = (np.array(x, np.int64) for x in (offsets, counts, labels))
    index, number, label = as_int
    table = BoxTable(names, index, np.array(rows).reshape(-1, 4), number, label)
    scores = torch.from_numpy(rng.random((len(rows), len(NAMES)), np.float32))
    scores = (scores * 4).round() / 4 if ties else scores
    return Case(table, scores, tuple(k % 4 != 3 for k in range(len(NAMES))))


def batch(table: BoxTable, images: list[int]) -> Batch:
    """The detected boxes of some images, as a loader gives them."""
    entries = [
        (entry, row - table.offsets[image], row)
        for entry, image in enumerate(images)
        for row in range(table.offsets[image], table.offsets[image + 1])
        if table.label_counts[row] == 0
    ]
    boxes = torch.tensor([[float(e), 0, 0, 1, 1] for e, _, _ in entries]).reshape(-1, 5)
    flags = torch.ones(len(images), dtype=torch.bool)
    rows = torch.tensor(images)
    return Batch(
        frames=None, log_mel=None, negative_log_mel=None, has_audio=flags, has_negative=~flags, is_substitute=~flags,
        labels=torch.full((len(images),), -1), rotation=None, sample=rows, view=torch.zeros_like(rows), position=rows,
        ids=[table.names[i] for i in images], start_s=[0.0] * len(images), boxes=boxes,
        box_labels=torch.zeros(len(boxes), len(NAMES)),
        box_index=torch.tensor([i for _, i, _ in entries], dtype=torch.int64),
    )  # fmt: skip


def scored(case: Case, images: list[int] | None = None, size: int = 7) -> BoxScores:
    """An accumulator that took in the case's scores in batches."""
    table = case.table
    task = Detection(NAMES, table, "detected", case.evaluated)
    accumulator = task.accumulator(len(table.names), 1)
    chosen = list(range(len(table.names))) if images is None else images
    for start in range(0, len(chosen), size):
        part = batch(table, chosen[start : start + size])
        assert part.boxes is not None
        assert part.box_index is not None
        rows = torch.from_numpy(table.offsets)[part.sample[part.boxes[:, 0].long()]] + part.box_index
        accumulator.add(case.scores[rows], part)
    accumulator.gather(ALONE)
    return accumulator


def files_of(case: Case, images: list[int] | None = None) -> tuple[str, str]:
    """Ground truth and **all** detections as the official files."""
    table, truth, found = case.table, io.StringIO(), io.StringIO()
    label_ends = np.cumsum(table.label_counts)
    for image in range(len(table.names)) if images is None else images:
        for row in range(table.offsets[image], table.offsets[image + 1]):
            place = [*table.names[image].split(","), *table.corners[row].tolist()]
            for label in table.labels[label_ends[row] - table.label_counts[row] : label_ends[row]]:
                csv.writer(truth).writerow([*place, label + 1, 7])
            if table.label_counts[row] == 0:
                for k in range(len(NAMES)):
                    csv.writer(found).writerow([*place, k + 1, repr(float(case.scores[row, k]))])
    return truth.getvalue(), found.getvalue()


def check_against_oracle(case: Case, images: list[int] | None = None) -> None:
    report = scored(case, images).report()
    classes = [k + 1 for k in range(len(NAMES)) if case.evaluated[k]]
    expected = ava_oracle.average_precisions(*files_of(case, images), classes)
    assert report.metrics["mean_ap"] == pytest.approx(ava_oracle.mean(expected), abs=1e-6, nan_ok=True)
    assert [row[0] for row in report.table] == [NAMES[k - 1] for k in classes]
    for label, row in zip(classes, report.table, strict=True):
        wanted = "nan" if label not in expected else f"{expected[label]:.4f}"
        assert row[3] == wanted or abs(float(row[3]) - expected[label]) <= 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_that_of_the_rules_on_random_detections(seed: int) -> None:
    check_against_oracle(random_case(seed))


@pytest.mark.parametrize("seed", range(10))
def test_equal_scores_are_one_threshold(seed: int) -> None:
    check_against_oracle(random_case(seed, ties=True, boxes=3))


def test_more_than_fifty_entries_of_an_image_do_not_count() -> None:
    case = random_case(3, images=20, boxes=30)
    assert max(np.diff(case.table.offsets)) * sum(case.evaluated) > 100
    check_against_oracle(case)
    classes = [1, 2, 3, 5, 6, 7]
    unlimited = ava_oracle.average_precisions(*files_of(case), classes, limit=10**6)
    assert unlimited != ava_oracle.average_precisions(*files_of(case), classes)


def test_order_of_detections_decides_nothing() -> None:
    case = random_case(1, ties=True, boxes=2)
    report = scored(case).report()
    backwards = scored(case, list(reversed(range(len(case.table.names)))), size=3).report()
    assert backwards.metrics == report.metrics
    assert backwards.entries is not None
    assert report.entries is not None
    assert np.array_equal(backwards.entries.score, report.entries.score)


def test_constant_scores_earn_the_share_of_right_detections() -> None:
    case = random_case(5, boxes=1)
    case.scores[:] = 0.5
    check_against_oracle(case)


@pytest.mark.parametrize(
    "change", ["no detection", "no truth", "one class", "no evaluated class in the truth", "empty"]
)
def test_odd_splits(change: str) -> None:
    case = random_case(2)
    table = case.table
    if change == "no detection":
        keep = ~table.is_detected
    elif change == "no truth":
        keep = table.is_detected
    elif change == "empty":
        keep = np.zeros(len(table), bool)
    else:
        keep = np.ones(len(table), bool)
        only = "one class" if change == "one class" else ""
        case.evaluated = tuple(k == (2 if only else 3) for k in range(len(NAMES)))
    ends = np.cumsum(keep)[table.offsets[1:] - 1] if len(table) else table.offsets[1:]
    ends = np.where(table.offsets[1:] == 0, 0, ends)
    box_of_label = np.repeat(np.arange(len(table)), table.label_counts)
    labels = table.labels[keep[box_of_label]]
    if change == "no evaluated class in the truth":
        labels = np.where(labels == 3, 2, labels)
    case.table = BoxTable(
        table.names, np.concatenate([[0], ends]), table.corners[keep], table.label_counts[keep], labels
    )
    case.scores = case.scores[torch.from_numpy(keep)]
    check_against_oracle(case)


def test_two_detections_of_one_person_and_the_iou_that_is_just_enough() -> None:
    truth = LabelledBoxes(np.array([0, 0]), np.array([[0, 0, 1, 1], [0.0, 0, 0.5, 1]]), np.array([0, 0]), np.ones(2))
    # Exactly IoU 0.5 with the first box and 1 with the second; the same again; a box of the other image.
    found = LabelledBoxes(
        np.array([0, 0, 0, 1]),
        np.array([[0, 0, 0.5, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1.0]]),
        np.zeros(4, np.int64),
        np.array([0.9, 0.8, 0.7, 0.6]),
    )
    # right, wrong (its box was found before), right at 0.5, wrong: precision 1, 2/3 at recall 1/2, 1
    assert average_precision_of_boxes(truth, found, 2).tolist() == pytest.approx(
        [(1 + 2 / 3) / 2, math.nan], nan_ok=True
    )


def test_area_under_the_raised_curve() -> None:
    right = np.array([False, True, True, False, True])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert area_under_curve(scores, right, 4) == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 4)
    assert area_under_curve(np.zeros(0), np.zeros(0, bool), 3) == 0.0


def test_scores_that_are_not_finite_are_refused_with_the_key_frame() -> None:
    case = random_case(4)
    row = int(np.flatnonzero(case.table.is_detected)[3])
    case.scores[row, 3] = math.nan  # of a class that does not count: the model is broken all the same
    accumulator = scored(case)
    with pytest.raises(
        ScoresNotFinite, match=rf"scores of 1 of 30 views .*{case.table.names[case.table.sample_of[row]]}"
    ):
        require_finite_scores(accumulator.bad)
    case.scores[row, 3] = 0.5
    case.scores[row, 0] = math.inf
    with pytest.raises(ValueError, match="must be finite"):
        scored(case).report()


def test_unread_key_frames_are_left_out_and_counted() -> None:
    case = random_case(6)
    images = [i for i in range(30) if i % 5]
    check_against_oracle(case, images)
    counts = scored(case, images).report().counts
    detected = case.table.is_detected & np.isin(case.table.sample_of, images)
    assert counts == {
        "manifest": 30, "scored": 24, "quarantined": 6, "silent": 0, "boxes_scored": int(detected.sum()),
        "boxes_below_one_pixel": 0,
    }  # fmt: skip


def test_a_key_frame_or_a_box_scored_twice_is_a_bug() -> None:
    table = random_case(0).table
    accumulator = scored(random_case(0))
    again = batch(table, [1])
    assert again.boxes is not None
    accumulator.add(torch.zeros(len(again.boxes), len(NAMES)), again)
    with pytest.raises(AssertionError, match="a view was scored twice"):
        accumulator.report()


# What is written -------------------------------------------------------------------------------------------------


def test_file_of_detections_gives_the_same_score_by_the_official_rules(tmp_path: Path) -> None:
    case = random_case(7, boxes=12)
    report = scored(case).report()
    path = tmp_path / "made" / "detections.csv"
    rows = write_detections(report, path)
    text = path.read_text()
    assert rows == len(text.splitlines())
    assert max(np.unique([line.split(",")[0] for line in text.splitlines()], return_counts=True)[1]) == 50
    classes = [k + 1 for k in range(len(NAMES)) if case.evaluated[k]]
    truth, _ = files_of(case)
    expected = ava_oracle.mean(ava_oracle.average_precisions(truth, text, classes))
    assert report.metrics["mean_ap"] == pytest.approx(expected, abs=1e-9)


def test_file_of_detections_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    def config(task: str) -> Any:
        return type("", (), {"train": type("", (), {"task": task})()})()

    def dataset(*names: str) -> Any:
        samples = type("", (), {"__len__": lambda _: len(names), "id": lambda _, i: names[i]})()
        return type("", (), {"samples": samples})()

    with pytest.raises(DetectionsError, match=r"train.task=detection alone, not classification"):
        check_detections_file(tmp_path / "a.csv", config("classification"), dataset())
    with pytest.raises(DetectionsError, match="a folder"):
        check_detections_file(tmp_path, config("detection"), dataset())
    with pytest.raises(DetectionsError, match="must be called <video>,<second>"):
        check_detections_file(tmp_path / "a.csv", config("detection"), dataset("v,0902", "clip7"))
    check_detections_file(tmp_path / "a.csv", config("detection"), dataset("v,0902"))


def test_report_shows_the_weakest_classes_and_the_picture_is_drawn(tmp_path: Path) -> None:
    report = scored(random_case(8)).report()
    lines = result_lines(report, rows=2)
    values = sorted(float(row[3]) for row in report.table)
    assert lines[-2].endswith(f" {100 * values[1]:.2f} %")
    assert "6 of 8 classes count" in lines[2]
    draw_per_class(report, tmp_path / "per_class.png")
    assert (tmp_path / "per_class.png").stat().st_size > 1000
