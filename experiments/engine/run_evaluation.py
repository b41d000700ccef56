"""The evaluations of a training: precise statistics, the validation split, and a share of the training split.

Both splits are scored by the same weights and statistics, with the same views and nothing that a training adds
(dropout, DropPathway, augmentation), so that their curves can be compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import Tensor

from experiments.config import Config
from experiments.engine.boxes import task_of, without_boxes
from experiments.engine.graph_rules import forward_capturer
from experiments.engine.learner import Learner
from experiments.engine.pretext import evaluate_pretext
from experiments.engine.reporter import Reporter
from experiments.engine.run_data import RunData
from experiments.engine.scoring import evaluate
from experiments.engine.stage_clock import StageClock
from experiments.records.checkpoint import BEST, list_checkpoints, mark_best
from experiments.records.run_folder import EVALUATIONS_NAME, read_evaluations, record_evaluations
from experiments.runtime import Runtime, broadcast_bytes
from experiments.tasks import Report
from kernels.precise_bn import precise_bn
from kernels.sync import any_of_ranks
from pipeline.batch import Batch
from pipeline.dataset import Dataset

log = logging.getLogger(__name__)


class RunEvaluation:
    """Scores the model of a run between two steps, and records what is found.

    Args:
        config: of the run.
        runtime: of this process.
        data: of the run.
        learner: whose model is scored.
        reporter: is told results.
        clock: of the run.
        should_stop: is asked before each batch, with the step; True ends an evaluation.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        data: RunData,
        learner: Learner,
        reporter: Reporter,
        clock: StageClock,
        should_stop: Callable[[int], bool],
    ) -> None:
        self._config, self._runtime, self._data, self._learner = config, runtime, data, learner
        self._reporter, self._clock, self._should_stop = reporter, clock, should_stop

    def is_missing(self, step: int) -> bool:
        """Return whether a step was not evaluated yet (in an interrupted run), by what rank 0 sees."""
        missing = self._runtime.is_main and step not in read_evaluations(self._config.run_dir)
        return broadcast_bytes(self._runtime, b"missing" if missing else None) is not None

    def make_statistics_precise(self, step: int) -> None:
        """Recompute the running statistics over `eval.precise_bn_batches` training batches, if asked for."""
        count = self._config.eval.precise_bn_batches
        if count == 0:
            return
        self._reporter.say("making running statistics precise")
        with self._clock.stage("eval"), self._learner.autocast():
            batches = self._data.further_batches(step)
            model = self._learner.model
            forward = without_boxes(model) if self._config.model.head == "detection" else model
            inputs = (self._heard(batch) for _, batch in zip(range(count * self._data.passes), batches, strict=False))
            precise_bn(model, inputs, lambda frames, log_mel, sound: forward(frames, log_mel, has_audio=sound))
            batches.close()

    def _heard(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Return frames, log-mel and which clips have sound; no log-mel where none has: nothing is learnt from it."""
        if not self._config.model.drops_silence:
            return batch.frames, batch.log_mel, None
        heard = any_of_ranks(batch.has_audio, self._learner.norm_group)  # ranks that form BN groups do the same
        return (batch.frames, batch.log_mel, batch.has_audio) if heard else (batch.frames, None, None)

    def take(self, step: int) -> bool:
        """Score both, record the results, and mark the checkpoint of this step if it is the best one.

        Args:
            step: steps done.

        Returns:
            whether it was finished: a stop signal ends it without a result, and the next start makes up for it.
        """
        share, training = self._data.scored_train_set, None
        with self._clock.stage("eval"):
            if share is not None:
                self._reporter.say("evaluating training samples")
                training = self._score(share, step, "evaluating training samples")
                if training is None:
                    return False
            self._reporter.say("evaluating")
            report = self._score(self._data.val_set, step, "evaluating")
        if report is None:
            return False
        if self._runtime.is_main:
            if training is not None:
                self._reporter.training_result(step, training)
            self._record(step, report)
        return True

    def _score(self, dataset: Dataset, step: int, what: str) -> Report | None:
        """Score a split, or a share of one, and say how far that is; None: stopped."""
        config, data, learner, runtime = self._config, self._data, self._learner, self._runtime

        def stops() -> bool:
            return self._should_stop(step)

        if config.train.task == "self_supervision":
            return evaluate_pretext(learner.model, config, dataset, runtime, learner.autocast(), stops)
        validates = dataset is data.val_set
        task = data.task if validates else task_of(config, data.class_names, dataset)
        loader, seen = data.scoring_loader(dataset), self._reporter.collect_samples() if validates else None
        report = evaluate(
            learner.model,
            task.accumulator(len(dataset.samples), loader.plan.views_per_sample),
            loader,
            runtime,
            learner.autocast(),
            should_stop=stops,
            subset=data.subset,
            graphs=forward_capturer(config, runtime),
            drop_silence=config.model.drops_silence,
            seen=seen,
            progress=self._reporter.batches(what),
        )
        if report is not None and seen is not None:
            seen.gather(runtime)
        return report

    def _record(self, step: int, report: Report) -> None:
        folder, reporter = self._config.run_dir, self._reporter
        known = {**read_evaluations(folder), **reporter.results}
        reporter.result(step, report)
        best = max((s for m in known.values() if not math.isnan(s := m.get(report.primary, -1.0))), default=-1.0)
        saved = dict(list_checkpoints(folder / "checkpoints")).get(step)
        if report.metrics[report.primary] > best and saved is None:
            log.warning("the best result so far has no checkpoint: that of step %d could not be written", step)
        elif report.metrics[report.primary] > best and saved is not None:
            path = folder / "checkpoints" / BEST
            if reporter.writes.attempt(path, lambda: mark_best(path.parent, saved)):
                reporter.tracker.artifact(path, "checkpoints/best")
        # Last: a kill before it makes the next start redo all.
        reporter.writes.attempt(folder / EVALUATIONS_NAME, lambda: record_evaluations(folder, reporter.results))
