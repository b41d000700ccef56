"""AVA v2.1 and v2.2: one row a key frame with its person boxes.

Ground truth and detected boxes share a row: a box with labels is ground truth (or, in training, a detection that
matches it), a box without labels is a detection to be scored. In validation key frames with nothing but detections
are rows, too: the official evaluator counts those detections as wrong.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.annotations.ava_files import (
    NUM_CLASSES,
    Corners,
    KeyFrame,
    check_score,
    overlap,
    read_action_list,
    read_detected,
    read_excluded,
    read_labelled,
)
from pipeline.annotations.files import VideoIndex, annotation_files
from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError, Annotations, Box, Row
from pipeline.annotations.text import error

#: Half of the span that an annotation describes: AVA labels three seconds around each key frame.
HALF_SPAN_S = 1.5
CUT_FOLDER, CUT_START_S = "videos_15min", 900.0
#: Containers without edit lists: a part copied into one begins at the key frame before the second asked for.
COPIES_BEGIN_EARLY = (".mkv", ".webm")
PUBLISHED_VIDEOS = {"train": 235, "val": 64}
PUBLISHED_LINES = {("2.1", "train"): 837_318}
NUM_EVALUATED = 60
LABELLED_SECONDS = range(902, 1799)  # of the film; key frames outside are in no file of ground truth
_LABELLED = re.compile(r"ava_(train|val)_v(2\.[0-9])\.csv", re.IGNORECASE)
_EXCLUDED = re.compile(r"ava_(train|val)_excluded_timestamps_v(2\.[0-9])\.csv", re.IGNORECASE)
_DETECTED = re.compile(r"ava_(?:detection_)?(train|val)_.*boxes.*\.csv", re.IGNORECASE)
_CLASS_LISTS = (".pbtxt", ".pbtxt.txt")  # the evaluator's usage text has the second
_VERSION = re.compile(r"_v(2\.[0-9])", re.IGNORECASE)


def read_ava(
    annotations: Path | None,
    videos: Path,
    *,
    version: str = "auto",
    min_score: float = 0.8,
    min_iou: float = 0.9,
    detections: str = "",
    cut_start_s: float | None = None,
) -> Annotations:
    """Read AVA.

    Args:
        annotations: folder with ``ava_{train,val}_v2.x.csv``, and where there: ``..._excluded_timestamps_v2.x.csv``,
            ``ava_{train,val}_predicted_boxes.csv`` (or ``ava_detection_*boxes*.csv``), ``ava_action_list_v2.x*.pbtxt``.
        videos: folder of the films ``<id>.{mp4,mkv,webm}``.
        version: ``2.1``, ``2.2``, or ``auto`` where the folder holds one of them.
        min_score: detected boxes below this score are left out.
        min_iou: in training, a detection takes the labels of the ground truth that it overlaps at least this much
            (column 7 of a file of detections is never taken for labels).
        detections: part of the path below ``annotations`` of the detected boxes to take, where there are several files.
        cut_start_s: second of the film at which the files start: 0 for the films of CVDF, 900 for cut 15-minute parts;
            without it 900 below a folder called ``videos_15min``, else 0.
    Returns:
        One row a key frame: id ``<video>,<second>``, ``key_time_s`` in the file's time, span of 3 s around it, boxes;
        class lists ``action`` (80 names) and, where its file is there, ``action_evaluated`` (60 of these names).
    Raises:
        AnnotationError: a malformed line, no ground truth, two versions without ``version``, or two files of
            detected boxes for a split.
    """
    check_score(min_score, "min_score")
    check_score(min_iou, "min_iou")
    files = annotation_files(annotations, (".csv", *_CLASS_LISTS))
    labelled = {path: match for path in files if (match := _LABELLED.fullmatch(path.name))}
    version = _version(version, {match.group(2) for match in labelled.values()}, annotations)
    report = ReportBuilder("ava")
    report.layout(f"AVA v{version}")
    files = [path for path in files if (match := _VERSION.search(path.name)) is None or match.group(1) == version]
    classes = _classes(files, report)
    index = VideoIndex(videos, report)
    in_cut_folder = CUT_FOLDER in (videos.name, os.path.basename(os.path.abspath(videos)), videos.resolve().name)
    rows: list[Row] = []
    boxes_of = {split: _detection_file(files, split, detections, annotations) for split in PUBLISHED_VIDEOS}
    for path in files:
        match = _LABELLED.fullmatch(path.name)
        if match:
            split = match.group(1).lower()
            truth = _truth(path, split, version, report)
            excluded = _excluded(files, split)
            detected = _detections(boxes_of[split], split, truth, min_score, min_iou, report)
            rows += _rows(split, truth, excluded, detected, index, in_cut_folder, cut_start_s, report)
    _warn_of_copies(rows, cut_start_s, in_cut_folder, report)
    return Annotations("ava", tuple(rows), classes, report.build(len(rows)))


def _version(asked: str, found: set[str], annotations: Path | None) -> str:
    if asked not in ("auto", "2.1", "2.2"):
        raise AnnotationError(f"version ({asked}) must be 2.1, 2.2 or auto; 2.1 is the paper's")
    if not found:
        raise AnnotationError(
            f"annotations ({annotations}) must be a folder with ava_{{train,val}}_v2.x.csv; unpack the zip of AVA"
        )
    if asked == "auto" and len(found) > 1:
        raise AnnotationError(
            f"annotations ({annotations}) must hold one version, not {', '.join(sorted(found))}; say version=2.1 or 2.2"
        )
    version = min(found) if asked == "auto" else asked
    if version not in found:
        raise AnnotationError(f"version ({version}) must be in {annotations}; there is {', '.join(sorted(found))}")
    return version


def _classes(files: Sequence[Path], report: ReportBuilder) -> dict[str, tuple[str, ...]]:
    lists = [path for path in files if path.name.lower().endswith(_CLASS_LISTS)]
    short = [path for path in lists if "activitynet" in path.name]
    full = [path for path in lists if path not in short]
    names = {number: f"action {number}" for number in range(1, NUM_CLASSES + 1)}
    evaluated = read_action_list(short[-1]) if short else {}
    names.update(evaluated)
    names.update(read_action_list(full[-1]) if full else {})
    if not full:
        report.oddity("no list of all 80 actions", "put ava_action_list_v2.x.pbtxt beside the boxes for all the names")
    classes = {"action": tuple(names[number] for number in range(1, NUM_CLASSES + 1))}
    if evaluated:
        report.count("evaluated classes", len(evaluated), NUM_EVALUATED)
        classes["action_evaluated"] = tuple(names[number] for number in sorted(evaluated))
    else:
        hint = "put ava_action_list_v2.x_for_activitynet_201x.pbtxt beside the boxes; without it all 80 count"
        report.oddity("no list of the 60 evaluated actions", hint)
    return classes


Truth = dict[KeyFrame, dict[tuple[Corners, int], set[int]]]


def _truth(path: Path, split: str, version: str, report: ReportBuilder) -> Truth:
    """Return key frame -> (corners, person) -> labels; several lines make one box."""
    truth: Truth = {}
    lines = 0
    for entry in read_labelled(path, report):
        lines += 1
        boxes = truth.setdefault(entry.frame, {})
        if entry.corners is not None and entry.label is not None:
            boxes.setdefault((entry.corners, entry.person), set()).add(entry.label)
    report.count(f"lines of {split}", lines, PUBLISHED_LINES.get((version, split)))
    report.count(f"videos of {split}", len({video for video, _ in truth}), PUBLISHED_VIDEOS[split])
    return truth


def _excluded(files: Sequence[Path], split: str) -> set[KeyFrame]:
    paths = [path for path in files if (match := _EXCLUDED.fullmatch(path.name)) and match.group(1).lower() == split]
    return {frame for path in paths for frame in read_excluded(path)}


def _detection_file(files: Sequence[Path], split: str, part: str, annotations: Path | None) -> Path | None:
    """Return the one file of detected boxes of a split whose path below ``annotations`` has ``part`` in it, or None."""
    root = annotations if annotations is not None and annotations.is_dir() else Path()
    names = {
        path: os.path.relpath(path, root)
        for path in files
        if (match := _DETECTED.fullmatch(path.name)) and match.group(1).lower() == split
    }
    chosen = [path for path, name in names.items() if part in name]
    if names and not chosen:
        raise AnnotationError(f"detections ({part}) must be part of one of {', '.join(names.values())}; correct it")
    if len(chosen) > 1:
        raise AnnotationError(
            f"detected boxes of {split} ({', '.join(names[path] for path in chosen)}) must be one file below "
            f"{annotations}; name part of its path, as in --option detections=iou90, or move the others away"
        )
    return chosen[0] if chosen else None


def _detections(
    path: Path | None, split: str, truth: Truth, min_score: float, min_iou: float, report: ReportBuilder
) -> Mapping[KeyFrame, list[Box]]:
    """Return the detected boxes by key frame: with the matching labels in training, without labels in evaluation."""
    if path is None:
        return {}
    found: dict[KeyFrame, dict[Corners, float]] = defaultdict(dict)
    weak = 0
    report.layout(f"detected boxes of {split}: {path.parent.name}/{path.name}")
    for entry in read_detected(path, report):
        if entry.score < min_score or entry.corners is None:
            weak += 1
            continue
        score = found[entry.frame].setdefault(entry.corners, entry.score)
        if score != entry.score:
            raise error(path, entry.line, "score", str(entry.score), f"be that of the same box ({score})", "correct it")
    boxes: dict[KeyFrame, list[Box]] = {}
    lost = unmatched = 0
    for frame, candidates in found.items():
        if frame not in truth:
            lost += len(candidates)
            if split == "train" or frame[1] not in LABELLED_SECONDS:
                continue
        for corners, score in candidates.items():
            if split == "train":
                known = _matching(corners, truth[frame], min_iou)
                unmatched += not known
                if known:
                    boxes.setdefault(frame, []).append(Box(*corners, tuple(sorted(known)), score))
            else:
                boxes.setdefault(frame, []).append(Box(*corners, (), score))
    if found or weak:
        report.count(f"detected boxes of {split} used", sum(map(len, boxes.values())))
        report.count(f"detected boxes of {split} below score {min_score:g}", weak)
        report.count(f"detected boxes of {split} on key frames without ground truth", lost)
        if split == "train":
            report.count(f"detected boxes of {split} below IoU {min_iou:g}", unmatched)
    return boxes


def _matching(corners: Corners, truth: Mapping[tuple[Corners, int], set[int]], min_iou: float) -> set[int]:
    best = max(truth, key=lambda box: overlap(corners, box[0]), default=None)
    return truth[best] if best is not None and overlap(corners, best[0]) >= min_iou else set()


def _rows(
    split: str,
    truth: Truth,
    excluded: set[KeyFrame],
    detected: Mapping[KeyFrame, list[Box]],
    index: VideoIndex,
    in_cut_folder: bool,
    cut_start_s: float | None,
    report: ReportBuilder,
) -> list[Row]:
    rows: list[Row] = []
    for frame in sorted({*truth, *detected}):
        name, second = frame
        report.listed += 1
        if frame in excluded:
            report.drop("excluded time stamp")
            continue
        if not truth.get(frame) and frame not in detected:
            report.drop("key frame without a person")
            continue
        path = index.find(name)
        if path is None:
            report.missing(name)
            continue
        start = cut_start_s
        if start is None:
            start = _start_of(path, in_cut_folder)
        report.layout(f"files start at second {start:g} of the film")
        key_time = second - start
        if key_time < 0:
            raise AnnotationError(
                f"key frame ({name},{second}) must lie after cut_start_s ({start:g}); films of CVDF have 0"
            )
        own = truth.get(frame, {})
        boxes = [Box(*box, tuple(sorted(labels)), 1.0, person) for (box, person), labels in own.items()]
        boxes += detected.get(frame, [])
        begin = max(0.0, key_time - HALF_SPAN_S)
        sample = f"{name},{second:04d}"
        rows.append(Row(sample, split, path, begin, key_time + HALF_SPAN_S, key_time_s=key_time, boxes=tuple(boxes)))
    report.count(f"key frames of {split}", len(rows))
    return rows


def _start_of(path: str, in_cut_folder: bool) -> float:
    return CUT_START_S if in_cut_folder or CUT_FOLDER in path.split("/")[:-1] else 0.0


def _warn_of_copies(rows: Sequence[Row], cut_start_s: float | None, in_cut_folder: bool, report: ReportBuilder) -> None:
    """Note the cut parts that may begin before their second: no header says so, but their length does."""
    for path in dict.fromkeys(row.video for row in rows):
        start = _start_of(path, in_cut_folder) if cut_start_s is None else cut_start_s
        if start > 0 and path.lower().endswith(COPIES_BEGIN_EARLY):
            kind = (
                "cut part in .mkv or .webm: made with -c copy it begins at the key frame before, and all labels are "
                "late; such a part is longer than asked for (ffprobe), see docs/datasets/ava.md"
            )
            report.oddity(kind, path)
