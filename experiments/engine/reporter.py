"""What a run tells while it goes: losses, results, the summary; to the log, the run folder and the tracker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import Config, config_digest, flat_config
from experiments.engine.clip_counts import ClipCounts
from experiments.engine.run_data import RunData
from experiments.engine.run_lines import end_lines
from experiments.engine.stage_clock import StageClock
from experiments.records.plots import draw_confusion, draw_curves, draw_per_class
from experiments.records.progress import BatchProgress, Progress
from experiments.records.provenance import environment, versions
from experiments.records.reporting import result_lines, write_table
from experiments.records.run_folder import (
    SUMMARY_NAME,
    read_evaluations,
    read_summary,
    write_summary,
)
from experiments.records.sample_pictures import SampleCollector, draw_samples
from experiments.records.spool import SPOOL_NAME
from experiments.records.system_metrics import SystemSampler
from experiments.records.tracking import NullTracker, Status, Tracker, make_tracker, page_tags, resolve_uri
from experiments.records.writing import Writes, do_all
from experiments.runtime import Runtime
from experiments.tasks import Report
from experiments.tasks.metrics import loss_of_scores
from pipeline.store.durable import write_file

log = logging.getLogger(__name__)


class Reporter:
    """Tells what a run does; on other ranks than 0 it keeps silent. `open` comes when the run folder is there.

    Args:
        config: of the run.
        runtime: of this process.
        data: of the run.
        clock: of the run.
    """

    def __init__(self, config: Config, runtime: Runtime, data: RunData, clock: StageClock) -> None:
        self._config, self._runtime, self._data, self._clock = config, runtime, data, clock
        self.tracker: Tracker = NullTracker()
        if runtime.is_main and config.tracking.backend == "mlflow":
            resolve_uri(config.tracking.uri, config.run_dir.parent)  # a wrong MLFLOW_TRACKING_URI fails here
        self._progress = Progress(data.total_steps, 0, visible=False)
        self._sampler: SystemSampler | None = None
        self._opened = False  # the folder's contents are this run's to write
        self.writes = Writes()
        self.results: dict[int, dict[str, float]] = {}  # of the evaluations in this process, by step
        self._primary = ""  # metric of the results that is the score
        self._samples: SampleCollector | None = None
        self._clips = ClipCounts(data.loader, runtime)
        self._told_clips = 0  # quarantined clips that were logged
        self._start_step = self._step = 0

    def open(self, step: int, description: Sequence[str] = ()) -> None:
        """Start tracking and the progress line.

        Args:
            step: at which this process takes over.
            description: lines of text about the run.
        """
        config = self._config
        self._start_step = self._step = step
        self.tracker = make_tracker(config.tracking, config.run_dir, config.name, is_main=self._runtime.is_main)
        facts = {**versions(config.model.backend), "data_fingerprint": self._data.fingerprint}
        self._opened = True
        page = page_tags(description, facts["git_commit"], config.train.task, self._runtime.device.type)
        self.tracker.start(flat_config(config), {**facts, **page}, self._data_set())
        if self._runtime.is_main:
            path = config.run_dir / "environment.txt"
            self.writes.attempt(path, lambda: write_file(path, environment()))
            for name in ("config.yaml", "environment.txt"):
                self.tracker.artifact(config.run_dir / name)
            self._sampler = SystemSampler(
                lambda values: self.tracker.metrics(self._step, values), config.tracking.system_metrics_interval_s
            ).start()
        self._progress = Progress(self._data.total_steps, step, visible=self._runtime.is_main)

    def _data_set(self) -> dict[str, str]:
        """Return what identifies the data to a tracking server."""
        path = self._config.data.path
        return {"name": Path(path).name or path, "digest": self._data.fingerprint, "source": path}

    def collect_samples(self) -> SampleCollector | None:
        """Return what is to see a validation's batches on every rank, so that `result` can draw some; None: nobody."""
        scores_clips = self._config.train.task in ("classification", "multilabel")
        self._samples = SampleCollector(len(self._data.val_set.samples)) if scores_clips else None
        return self._samples

    def losses(
        self,
        step: int,
        losses: Mapping[str, float],
        learning_rate: float,
        grad_scale: float | None,
        signs: Mapping[str, float],
    ) -> None:
        """Show and record the losses since the last time, and how fast the run is; all ranks call it.

        Args:
            step: steps done.
            losses: "loss" and its parts, means over the steps since the last time.
            learning_rate: of the last step.
            grad_scale: of fp16, or None.
            signs: of what binds, see `StepSigns`.
        """
        self._step = step
        speed, wait = self._clock.interval()
        values = {f"train/{name}": value for name, value in losses.items()}
        values |= {"train/learning_rate": learning_rate, "train/epoch": self._data.epoch(step)}
        if speed > 0:
            values |= {"train/clips_per_second": speed, "train/data_wait_share": wait}
        if grad_scale is not None:
            values["train/grad_scale"] = grad_scale
        loader = self._data.loader
        self._clips.gather()
        values["train/clips_substituted"] = float(self._clips.substituted)
        values |= {f"data/{name}": value for name, value in loader.decoding.items()}
        self.tracker.metrics(step, {**values, **signs})
        for name, reason in loader.quarantine[self._told_clips :]:
            log.warning("clip of %s was replaced: %s", name, reason)
        self._told_clips = len(loader.quarantine)
        self._progress.show(step, {**losses, "lr": learning_rate}, speed, wait)

    def training_result(self, step: int, report: Report) -> None:
        """Show and record how training samples were scored, in the way of a validation.

        Args:
            step: steps done.
            report: the result.
        """
        shown = "  ".join(f"{name} {100 * value:.2f} %" for name, value in report.metrics.items())
        log.info("%d samples of %r scored alike: %s", report.counts["manifest"], self._data.train_set.split, shown)
        self._scores(step, report, "train_eval")

    def _scores(self, step: int, report: Report, group: str) -> None:
        """Hand the metrics of an evaluation to the tracker, and the loss of its scores."""
        self.tracker.metrics(step, {f"{group}/{k}": v for k, v in report.metrics.items()})
        if report.samples is not None:
            self.tracker.metrics(step, {f"{group}/loss": loss_of_scores(report.samples.scores, report.samples.labels)})

    def result(self, step: int, report: Report) -> None:
        """Show and record the result of an evaluation.

        Args:
            step: steps done.
            report: the result.
        """
        folder = self._config.run_dir
        self.results[step], self._primary = dict(report.metrics), report.primary
        for line in result_lines(report):
            log.info("%s", line)
        self._scores(step, report, "val")
        self.tracker.metrics(step, {f"val/samples_{k}": float(v) for k, v in report.counts.items()})
        self._put(folder / "per_class.csv", lambda path: write_table(report, path))
        title = f"{self._config.name}, {self._config.data.val_split}, step {step}"
        confusion = report.confusion
        if confusion is not None:
            names = report.class_names
            self._put(
                folder / "plots" / "confusion.png", lambda path: draw_confusion(confusion, names, path, title), "plots"
            )
        if report.entries is not None:
            self._put(folder / "plots" / "per_class.png", lambda path: draw_per_class(report, path, title), "plots")
        if self._samples is not None and self._samples.found and self._config.tracking.backend == "mlflow":
            found, names = self._samples.found, self._data.class_names
            self._put(folder / "plots" / "samples.png", lambda path: draw_samples(found, names, path), "plots")

    def _put(self, path: Path, write: Callable[[Path], None], artifacts: str = "") -> None:
        """Write a file and hand it to the tracker; where that fails now, when it can be written."""

        def put() -> None:
            write(path)
            self.tracker.artifact(path, artifacts)

        self.writes.attempt(path, put)

    def say(self, what: str) -> None:
        """Say on a terminal what goes on now."""
        self._progress.say(what)

    def batches(self, what: str) -> BatchProgress:
        """Return what says how far work on batches is.

        Args:
            what: is done, such as "evaluating".
        """
        return BatchProgress(what, self._progress.live, visible=self._runtime.is_main)

    def tell_end(self, step: int, *, finished: bool, saved: bool) -> None:
        """Say on rank 0 how a training ended that was neither a failure nor finished before it began.

        Args:
            step: steps done.
            finished: or else stopped on request.
            saved: whether there is a checkpoint of this step.
        """
        if not self._runtime.is_main:
            return
        total = self._data.total_steps
        if not finished:
            what = f"saved step {step} of {total}" if saved else f"step {step} of {total} is not saved"
            log.info("%s; the same command continues", what)
        elif self._start_step < total or self.results:
            summary = read_summary(self._config.run_dir)
            for line in end_lines(
                self._config, self.results.get(step, {}), self._primary, summary.get("wall_time_s", 0.0)
            ):
                log.info("%s", line)

    def flush(self) -> None:
        """Flush the metrics to the disk."""
        self.tracker.flush()

    @property
    def folder_lost(self) -> bool:
        """Whether the run folder was deleted or moved while the run writes to it."""
        return self.tracker.lost

    def recreate(self) -> None:
        """Write metrics and environment again, into a run folder that was made again."""
        path = self._config.run_dir / "environment.txt"
        self.writes.attempt(self._config.run_dir / SPOOL_NAME, self.tracker.recreate)
        self.writes.attempt(path, lambda: write_file(path, environment()))

    @property
    def missing(self) -> list[str]:
        """What could not be written, with reasons."""
        return self.writes.missing + ([self.tracker.failure] if self.tracker.failure else [])

    def close(self, step: int, status: Status) -> None:
        """Write summary and curves, end tracking; each whatever the others do.

        Args:
            step: steps done.
            status: how the run ended.

        Raises:
            Exception: the first failure.
        """
        sampler = self._sampler
        failures = do_all(self._progress.close, lambda: sampler.stop() if sampler is not None else None)
        if self._runtime.is_main and self._opened:
            failures += do_all(
                lambda: self._put(self._config.run_dir / SUMMARY_NAME, lambda path: self._write_summary(path, step)),
                lambda: self._put(self._config.run_dir / "plots" / "curves.png", self._draw_curves, "plots"),
                lambda: self.tracker.finish(status),
            )
        if failures:
            raise failures[0]

    def _draw_curves(self, path: Path) -> None:
        draw_curves(self._config.run_dir / SPOOL_NAME, path, self._config.name)

    def _write_summary(self, path: Path, step: int) -> None:
        before = read_summary(path.parent)
        idle = self._start_step == self._data.total_steps and not self.results
        if before.get("finished") is True and idle:
            scores = [f"{k} {100 * before[k]:.2f} %" for k in ("top1", "mean_ap") if before.get(k) is not None]
            log.info("the run is finished, nothing was due: %s; see %s", ", ".join(scores), path)
            log.info("name=ANOTHER train.init_from=%s starts a new run from its weights", path.parent)
        else:
            write_summary(path.parent, self._summary(step, before))

    def _summary(self, step: int, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what summary.json holds; times and timed clips add up over a run's processes, speeds are this one's.

        Args:
            step: steps done.
            before: what it held when this process took over; empty in a new run.
        """
        earlier, data, clock = before.get("seconds", {}), self._data, self._clock
        evaluations = {**read_evaluations(self._config.run_dir), **self.results}
        last = evaluations[max(evaluations)] if evaluations else {}
        return {
            "name": self._config.name,
            "config_digest": config_digest(self._config),
            "data_fingerprint": data.fingerprint,
            "steps": step,
            "total_steps": data.total_steps,
            "finished": step == data.total_steps,
            "resumed_from_step": self._start_step,
            "world_size": self._runtime.world_size,
            "device": self._runtime.device.type,
            "clips_per_second": round(clock.clips_per_second, 3),
            "timed_clips": clock.clips + before.get("timed_clips", 0),
            "data_wait_share": round(clock.data_wait_share, 4),
            "top1": None,
            "top5": None,
            **last,
            "evaluated_step": max(evaluations) if evaluations else None,
            "decoder": data.loader.decoder,
            "decoding": data.loader.decoding,
            "clips_substituted": self._clips.substituted,
            "refused_files": [f"{name}: {reason}" for name, reason in data.splits.refused],
            "quarantined": self._clips.unreadable,
            "wall_time_s": round(clock.wall_time_s + before.get("wall_time_s", 0.0), 2),
            "seconds": {k: round(v + earlier.get(k, 0.0), 2) for k, v in clock.ledger().items()},
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(self._config.model.backend),
        }
