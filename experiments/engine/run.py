"""A training run: its parts, where it stands, and what happens between the steps."""

from __future__ import annotations

import logging
import math
from typing import IO, Any

import torch

from experiments.config import Config, check_consistency, config_digest, resolved_yaml
from experiments.engine.data import clips_per_rank, small_group_warning
from experiments.engine.graph_rules import forward_capturer
from experiments.engine.learner import Learner
from experiments.engine.loss_window import LossWindow
from experiments.engine.reporter import Reporter
from experiments.engine.run_data import RunData
from experiments.engine.scoring import evaluate
from experiments.engine.stage_clock import StageClock
from experiments.records.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_state,
    mark_best,
    newest_valid,
    save_checkpoint,
)
from experiments.records.provenance import code_digest, kernels_in_use
from experiments.records.run_folder import check_run_folder, open_run_folder, read_evaluations, record_evaluation
from experiments.records.tracking import Status
from experiments.runtime import Runtime, StopSignal, broadcast_bytes, require_agreement, set_up_logging
from experiments.tasks import Report
from kernels.backend import backend_in_use
from kernels.library import library_text
from kernels.precise_bn import precise_bn

log = logging.getLogger(__name__)


class Run:
    """What the training loop works on: `data`, `learner`, `reporter`, `clock`, `window`, `stop`, and the step.

    Building it checks everything that can be checked before the first step.

    Args:
        config: of the run.
        runtime: of this process.

    Raises:
        ValueError: whatever does not fit; nothing has been written then.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        check_consistency(config)
        share = clips_per_rank(config, runtime.world_size)
        if runtime.is_main:
            check_run_folder(config)
        self._group_warning = small_group_warning(config, share)
        self.data = RunData(config, runtime)
        self.total_steps = self.data.total_steps
        fresh = config.train.fresh or not list_checkpoints(config.run_dir / "checkpoints")
        self.learner = Learner(config, runtime, self.data.task, self.total_steps, fresh=fresh)
        facts = {
            "configuration": config_digest(config),
            "code": code_digest(),
            "kernels": kernels_in_use(config.model.backend),
            "optimizer": self.learner.optimizer_text,
            "obstacle to CUDA graphs": self.learner.obstacle,
            "data": self.data.fingerprint,
        }
        require_agreement(runtime, facts)
        self.step = 0
        self.clock = StageClock()
        self.window = LossWindow(runtime)
        self.stop = StopSignal(runtime)
        self.reporter = Reporter(config, runtime, self.data, self.clock)
        self._lock: IO[str] | None = None
        self._saved_step = -1

    def open(self) -> None:
        """Take the run folder, continue from its newest valid checkpoint, and start logging and tracking."""
        config, runtime = self.config, self.runtime
        if runtime.is_main:
            self._lock = open_run_folder(config)
        set_up_logging(runtime, config.run_dir / "log.txt")
        if self._group_warning and runtime.is_main:
            log.warning("%s", self._group_warning)
        self._resume()
        self.learner.prepare()
        backend = backend_in_use(config.model.backend)
        log.info("kernel backend: %s; %s; optimizer: %s", backend, library_text(), self.learner.optimizer_text)
        self.reporter.open(self.step)
        if config.debug.sync_warnings and runtime.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        self.stop.install()

    def close(self, status: Status) -> None:
        """Write summary and curves, end tracking, give signals, graphs and folder back. Safe after any failure.

        Args:
            status: how the run ended.
        """
        self.stop.restore()
        self.reporter.close(self.step, status)
        self.learner.close()
        if self._lock is not None:
            self._lock.close()

    def is_due(self, interval_steps: int) -> bool:
        """Return whether something with this interval is due after the current step (always at the end)."""
        return self.step == self.total_steps or (interval_steps > 0 and self.step % interval_steps == 0)

    def report_progress(self) -> None:
        """Read the losses since the last report (the one host synchronisation), check, show and record them."""
        with self.clock.stage("step"):
            losses = self.window.close()
        if losses:
            scaler = self.learner.scaler
            scale = scaler.get_scale() if scaler.is_enabled() else None
            self.reporter.losses(self.step, losses, self.learner.learning_rate(self.step - 1), scale)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint holds; the same for any number of ranks."""
        return {
            **self.learner.state(),
            "step": self.step,
            "clips_seen": self.step * self.config.train.clips_per_step,
            "data_fingerprint": self.data.fingerprint,
            "config_digest": config_digest(self.config),
            "class_names": list(self.data.class_names),
            "rng": {"seed": self.config.train.seed, "rule": "every draw is a function of seed, step and rank"},
        }

    def save(self) -> None:
        """Save a checkpoint of the current step on rank 0; a full or failing disk costs a warning, not the run."""
        if self._saved_step == self.step:
            return
        with self.clock.stage("checkpoint"):
            if self.runtime.is_main:
                try:
                    folder = self.config.run_dir / "checkpoints"
                    yaml = resolved_yaml(self.config)
                    save_checkpoint(folder, self.step, self.state(), yaml, keep=self.config.checkpoint.keep)
                except OSError as error:
                    if self.step == self.total_steps:
                        raise
                    log.warning(
                        "checkpoint of step %d could not be written (%s); the one before stays", self.step, error
                    )
        self._saved_step = self.step

    def _resume(self) -> None:
        """Continue from rank 0's newest valid checkpoint, if there is one."""
        data: bytes | None = None
        if self.runtime.is_main:
            checkpoint = newest_valid(self.config.run_dir / "checkpoints")
            data = None if checkpoint is None else checkpoint.state
        data = broadcast_bytes(self.runtime, data)
        if data is None:
            for line in self.learner.initial_lines:
                log.info("%s", line)
            return
        name = f"in {self.config.run_dir}"
        state = load_state(data, name)
        if state["data_fingerprint"] != self.data.fingerprint:
            raise CheckpointError(
                f"checkpoint {name} was trained on other data ({state['data_fingerprint']}) than "
                f"data.path holds now ({self.data.fingerprint}); restore the data, or train.fresh=true starts again"
            )
        if int(state["step"]) > self.total_steps:
            raise CheckpointError(
                f"checkpoint {name} is of step {state['step']}, which must be at most the training's "
                f"{self.total_steps} steps; raise train.steps or train.epochs, or train.fresh=true starts again"
            )
        written_by = state.get("optimizer_backend", "torch")
        if written_by != self.config.optim.backend:
            raise CheckpointError(
                f"checkpoint {name} was written with optim.backend={written_by}, which must be the run's "
                f"({self.config.optim.backend}) to continue it; train.init_from starts a new run from its weights"
            )
        self.learner.load(state, name)
        self.step = self._saved_step = int(state["step"])
        log.info("continuing from step %d of %d", self.step, self.total_steps)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def evaluation_due(self) -> bool:
        """Return whether this step is one to evaluate and was not evaluated yet (in an interrupted run)."""
        due = self.is_due(self.config.eval.interval_steps) and self.step not in read_evaluations(self.config.run_dir)
        word = broadcast_bytes(self.runtime, b"due" if due and self.runtime.is_main else None)  # rank 0's
        return word is not None

    def make_statistics_precise(self) -> None:
        """Recompute the running statistics over `eval.precise_bn_batches` training batches, if asked for."""
        count = self.config.eval.precise_bn_batches
        if count == 0:
            return
        with self.clock.stage("eval"), self.learner.autocast():
            batches = self.data.further_batches(self.step)
            pairs = ((b.frames, b.log_mel) for _, b in zip(range(count), batches, strict=False))
            precise_bn(self.learner.model, pairs, self.learner.model)
            batches.close()

    def evaluate(self) -> bool:
        """Score the validation split, record the result, and mark the checkpoint of this step if it is the best one.

        Returns:
            whether it was finished: a stop signal ends it without a result, and the next start makes up for it.
        """
        data, learner = self.data, self.learner
        with self.clock.stage("eval"):
            loader = data.validation()
            report = evaluate(
                learner.model,
                data.task.accumulator(len(data.val_set.samples), loader.plan.views_per_sample),
                loader,
                self.runtime,
                learner.autocast(),
                should_stop=lambda: self.stop.received > 0,
                subset=data.subset,
                graphs=forward_capturer(self.config, self.runtime),
            )
        if report is None:
            return False
        if self.runtime.is_main:
            self._record(report)
        return True

    def _record(self, report: Report) -> None:
        folder = self.config.run_dir
        self.reporter.result(self.step, report)
        known = read_evaluations(folder).values()
        best = max((s for m in known if not math.isnan(s := m.get(report.primary, -1.0))), default=-1.0)
        saved = dict(list_checkpoints(folder / "checkpoints")).get(self.step)
        if report.metrics[report.primary] > best and saved is not None:
            self.reporter.tracker.artifact(mark_best(folder / "checkpoints", saved), "checkpoints/best")
        record_evaluation(folder, self.step, report.metrics)  # last: a kill before it makes the next start redo all
