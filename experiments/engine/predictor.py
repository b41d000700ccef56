"""Predictions about video files: `for found in Predictor.open("runs/mine").predict(["a.mp4"]): print(found.best())`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.config import Config
from experiments.engine.data import eval_loader
from experiments.engine.exported import is_exported, scorer_of_export
from experiments.engine.scorer import Scorer, scorer_of_run
from experiments.engine.trained_model import load_target
from experiments.records.boxes_file import FileBoxes
from experiments.records.checkpoint import BEST
from experiments.records.predictions import BoxPredictions, Prediction
from experiments.runtime import Runtime, init_runtime
from experiments.tasks import make_task
from pipeline.batch import Batch
from pipeline.config import LabelKind
from pipeline.dataset import MediaTable
from pipeline.folder.dataset import FolderSplit
from pipeline.folder.describe import PlainFile
from pipeline.folder.moments import every_moment, key_frames
from pipeline.loader import EvalLoader
from pipeline.open import describe_confined, limits_of

NOT_FINITE = (
    "the model's scores must be finite and are not; use another checkpoint (--checkpoint last), or --set "
    "runtime.precision=fp32"
)
Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


class Predictor:
    """A trained model for video files of any format.

    Args:
        scorer: the model.
        runtime: this process.
    """

    def __init__(self, scorer: Scorer, runtime: Runtime) -> None:
        self.scorer, self.runtime = scorer, runtime
        self.config = _without_labels(scorer.config)

    @classmethod
    def open(cls, target: Path | str, *, checkpoint: str = BEST, overrides: Sequence[str] = ()) -> Predictor:
        """Load a trained model.

        Args:
            target: run folder, checkpoint folder, configuration file, or a folder of `experiments.export` (weights or
                program).
            checkpoint: which one of a run, "best" or "last".
            overrides: settings that differ, as "runtime.device=cpu".

        Raises:
            ValueError: nothing fitting there, or settings that do not fit.
        """
        if is_exported(Path(target)):
            return cls(*scorer_of_export(Path(target), overrides))
        config, found = load_target(Path(target), checkpoint, overrides)
        runtime = init_runtime(config.runtime)
        return cls(scorer_of_run(config, found, runtime), runtime)

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return self.scorer.class_names

    @property
    def detects(self) -> bool:
        """Whether it scores persons in boxes."""
        return self.config.model.head == "detection"

    def predict(
        self,
        files: Sequence[Path | str],
        *,
        every_s: float | None = None,
        boxes: FileBoxes | None = None,
        progress: Progress | None = None,
    ) -> Generator[Prediction, None, None]:
        """Score files, one prediction a file in the order given, each as soon as it is done.

        Memory does not grow with the length of a film, but for its scores (4 bytes a class and moment).

        Args:
            files: video files.
            every_s: score a clip of every piece of so many seconds; None: the views of `config.views`, spread over the
                file, as an evaluation of the run does it.
            boxes: of persons, for a detection and only there.
            progress: called with the clips done and all clips.

        Raises:
            ValueError: a file does not exist, or arguments that do not fit the model.
        """
        paths = [Path(file) for file in files]
        self._check(paths, every_s, boxes)
        return self._predict(paths, every_s, boxes, progress)

    def _predict(
        self, paths: Sequence[Path], every_s: float | None, boxes: FileBoxes | None, progress: Progress | None
    ) -> Generator[Prediction, None, None]:
        described = describe_confined(self.config.data.num_threads, limits_of(self.config.data))(paths)
        looked = list(described)
        for result in looked:
            if isinstance(result, Exception) and not isinstance(result, ValueError | OSError):
                raise result
        for path, result in zip(paths, looked, strict=True):
            if isinstance(result, PlainFile) and result.warning:
                log.warning("%s: %s", path, result.warning)
        usable = [i for i, result in enumerate(looked) if isinstance(result, PlainFile)]
        scored = self._score([looked[i] for i in usable], [paths[i] for i in usable], every_s, boxes, progress)
        with closing(scored):
            for path, result in zip(paths, looked, strict=True):
                yield next(scored) if isinstance(result, PlainFile) else Prediction(path, problem=str(result))

    def _check(self, paths: Sequence[Path], every_s: float | None, boxes: FileBoxes | None) -> None:
        for path in paths:
            if not path.is_file():
                raise ValueError(f"video ({path}) must be an existing file; check the path")
        if self.detects and boxes is None:
            raise ValueError(
                "model.head (detection) must be given boxes of persons, a file has none; name a file of them with "
                "--boxes, or score prepared key frames with experiments.evaluate RUN --detections FILE"
            )
        if boxes is not None and (not self.detects or every_s is not None):
            rule = (
                "without --every" if self.detects else f"for model.head=detection alone, not {self.config.model.head}"
            )
            raise ValueError(f"--boxes ({boxes.path}) must be given {rule}; leave one out")

    def _score(
        self, files: Sequence[object], paths: Sequence[Path], every_s: float | None, boxes: FileBoxes | None,
        progress: Progress | None,
    ) -> Generator[Prediction, None, None]:  # fmt: skip
        """Score usable files, in order."""
        if not files:
            return
        known = [file for file in files if isinstance(file, PlainFile)]
        split = FolderSplit.of_files(known, [f"{i:06d}" for i in range(len(known))])
        if every_s is not None:
            split = every_moment(split, every_s)
        if boxes is not None:
            durations = [split.media.duration_s(i) for i in range(len(known))]
            wanted = boxes.key_frames(paths, durations)
            if not wanted:
                for path, duration_s in zip(paths, durations, strict=True):
                    yield Prediction(path, problem=boxes.problem(path, duration_s))
                return
            split = key_frames(split, wanted)
        loader = eval_loader(self.config, split, self.runtime)
        tallies = _tallies(self, loader, split, by_views=every_s is None and boxes is None)
        done = 0
        with closing(loader.batches()) as batches:
            for batch in batches:
                scores = self.scorer.score(batch).float().cpu().numpy()
                first = int(split.samples.media[int(batch.sample[0])])
                while done < first:  # a loader goes through files in order
                    yield self._result(done, paths[done], split, tallies, loader, boxes)
                    done += 1
                tallies.add(batch, scores)
                if progress is not None:
                    progress(loader.stats.yielded + loader.stats.quarantined, loader.plan.num_positions)
        for number in range(done, len(paths)):
            yield self._result(number, paths[number], split, tallies, loader, boxes)

    def _result(
        self, number: int, path: Path, split: FolderSplit, tallies: _Tallies, loader: EvalLoader,
        boxes: FileBoxes | None,
    ) -> Prediction:  # fmt: skip
        """Return the prediction of a file whose views have all been scored."""
        tally = tallies.take(number)
        file, own = split.files[number], f"{split.media.id(number)}"
        lost = [
            reason.removeprefix(f"{file.path}: ") for name, reason in loader.quarantine if name.split(" ")[0] == own
        ]
        trouble = boxes.problem(path, split.media.duration_s(number)) if boxes is not None else ""
        if tally is None:
            return Prediction(path, problem=lost[0] if lost else trouble or "no frame could be read", file=file)
        if not tally.is_finite:
            return Prediction(path, problem=NOT_FINITE, file=file)
        parts = tally.parts(split.media, number)
        problem = f"parts of it could not be read, and have no score: {lost[0]}" if lost else trouble
        if len(lost) > 1:
            problem += f" (and {len(lost) - 1} more)"
        return dataclasses.replace(
            parts, path=path, class_names=self.class_names, predictable=self.scorer.predictable, problem=problem,
            takes_sound=self.config.model.has_audio, file=file,
        )  # fmt: skip


class _Tally:
    """Scores of one file as they come."""

    def __init__(self, num_classes: int, reduction: str) -> None:
        self.reduction = reduction
        self.total = np.zeros(num_classes) if reduction == "mean" else np.full(num_classes, -np.inf)
        self.views, self.silent, self.is_finite = 0, 0, True
        self.times: dict[tuple[int, int], tuple[float, float]] = {}
        self.moments: dict[tuple[int, int], NDArray[np.float32]] = {}
        self.counts: dict[tuple[int, int], int] = {}
        self.heard: dict[tuple[int, int], bool] = {}
        self.boxes: list[tuple[float, NDArray[np.float32], NDArray[np.float32]]] = []

    def add(self, key: tuple[int, int], times: tuple[float, float], scores: NDArray[np.float32], heard: bool) -> None:
        """Take in one view: (K,) scores."""
        self._sum(scores)
        self.views += 1
        self.silent += not heard
        self.times[key], self.heard[key] = times, heard
        before = self.moments.get(key)
        if before is None:
            self.moments[key] = scores.copy()
        elif self.reduction == "mean":
            before += scores
        else:
            np.maximum(before, scores, out=before)
        self.counts[key] = self.counts.get(key, 0) + 1

    def _sum(self, scores: NDArray[np.float32]) -> None:
        self.is_finite = self.is_finite and bool(np.isfinite(scores).all())
        self.total = self.total + scores if self.reduction == "mean" else np.maximum(self.total, scores)

    def add_box(self, time_s: float, corners: NDArray[np.float32], scores: NDArray[np.float32]) -> None:
        """Take in one box: (4,) corners, (K,) scores."""
        self._sum(scores)
        self.boxes.append((time_s, corners, scores.copy()))

    def parts(self, media: MediaTable, number: int) -> Prediction:
        """Return what the scores say, without the file's name."""
        keys = sorted(self.times)
        mean = self.reduction == "mean"
        rows = [self.moments[key] / self.counts[key] if mean else self.moments[key] for key in keys]
        boxes, scores = None, self.total
        if self.boxes:
            times, corners, each = zip(*self.boxes, strict=True)
            boxes = BoxPredictions(np.array(times), np.stack(corners), np.stack(each))
            scores = boxes.scores.max(0).astype(np.float64)
        elif mean:
            scores = self.total / max(1, self.views)
        return Prediction(
            Path(),
            scores=scores,
            views=self.views or len({time for time, _, _ in self.boxes}),
            has_audio=self.silent < self.views,
            duration_s=media.duration_s(number),
            times_s=np.array([self.times[key] for key in keys]).reshape(-1, 2),
            moments=np.stack(rows) if rows else np.zeros((0, len(self.total)), np.float32),
            heard=np.array([self.heard[key] for key in keys], bool),
            boxes=boxes,
        )


@dataclasses.dataclass
class _Tallies:
    """The files that are being scored."""

    split: FolderSplit
    reduction: str
    num_classes: int
    span_s: float
    by_views: bool
    is_detection: bool
    found: dict[int, _Tally] = dataclasses.field(default_factory=dict)

    def take(self, number: int) -> _Tally | None:
        """Return and forget what is known of a file."""
        return self.found.pop(number, None)

    def of(self, number: int) -> _Tally:
        """Return the tally of a file."""
        return self.found.setdefault(number, _Tally(self.num_classes, self.reduction))

    def add(self, batch: Batch, scores: NDArray[np.float32]) -> None:
        """Take in the scores of a batch: (N, K), or (R, K) of its boxes."""
        heard, rows = batch.has_audio.cpu().tolist(), batch.sample.tolist()
        if self.is_detection:
            self._add_boxes(batch, scores, rows, heard)
            return
        samples = self.split.samples
        for entry, (row, start_s) in enumerate(zip(rows, batch.start_s, strict=True)):
            number = int(samples.media[row])
            end_s = min(start_s + self.span_s, self.split.media.duration_s(number))
            times = (start_s, end_s) if self.by_views else (float(samples.start_s[row]), float(samples.end_s[row]))
            key = (row, round(start_s * 1e6))  # crops of a clip, and clips of a file that has room for one only
            self.of(number).add(key, times, scores[entry], heard[entry])

    def _add_boxes(self, batch: Batch, scores: NDArray[np.float32], rows: list[int], heard: list[bool]) -> None:
        assert batch.boxes is not None
        assert batch.box_index is not None
        samples = self.split.samples
        for row, has_sound in zip(rows, heard, strict=True):
            tally = self.of(int(samples.media[row]))
            tally.views, tally.silent = tally.views + 1, tally.silent + (not has_sound)
        entries = batch.boxes[:, 0].long().cpu().tolist()
        for place, (entry, index) in enumerate(zip(entries, batch.box_index.tolist(), strict=True)):
            row = rows[entry]
            corners = samples.boxes(row).boxes[index]
            self.of(int(samples.media[row])).add_box(float(samples.key_time_s[row]), corners, scores[place])


def _tallies(predictor: Predictor, loader: EvalLoader, split: FolderSplit, *, by_views: bool) -> _Tallies:
    config, names = predictor.config, predictor.class_names
    return _Tallies(
        split=split,
        reduction=make_task(config.train.task, names).reduction if not predictor.detects else "max",
        num_classes=len(names),
        span_s=loader.plan.times.span_s,
        by_views=by_views,
        is_detection=predictor.detects,
    )


def _without_labels(config: Config) -> Config:
    """Return the configuration of a loader of files without labels; no number of unreadable ones ends it."""
    detects = config.model.head == "detection"
    kind: LabelKind = "boxes" if detects else "single"
    data = dataclasses.replace(config.data, label_kind=kind, max_quarantined_share=1.0)
    views = dataclasses.replace(config.views, boxes="detected") if detects else config.views
    return dataclasses.replace(config, data=data, views=views)
