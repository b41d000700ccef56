"""A training run: its parts, where it stands, and what happens between the steps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
import torch.distributed as dist

from experiments.cli.command_line import CommandFailure
from experiments.config import Config, config_digest, resolved_yaml
from experiments.engine.data import clips_per_rank, small_group_warning
from experiments.engine.learner import Learner
from experiments.engine.loss_window import LossWindow, TrainingFailure
from experiments.engine.optim import short_warmup_note
from experiments.engine.replica_check import ReplicaCheck
from experiments.engine.reporter import Reporter
from experiments.engine.run_data import RunData
from experiments.engine.run_evaluation import RunEvaluation
from experiments.engine.run_lines import start_lines
from experiments.engine.shared_norms import ranks_per_group
from experiments.engine.stage_clock import StageClock
from experiments.engine.step_signs import StepSigns
from experiments.engine.step_trace import StepTrace
from experiments.engine.watch import Watch, describe_failure
from experiments.records.checkpoint import list_checkpoints, newest_valid, save_checkpoint
from experiments.records.failures import end_launcher, record_failure, repeated_failure
from experiments.records.finite import few
from experiments.records.launch import agents, is_restart
from experiments.records.provenance import code_digest, kernels_in_use
from experiments.records.run_folder import (
    RunFolderError,
    check_run_folder,
    open_run_folder,
    recreate_run_folder,
    renew_config,
)
from experiments.records.state import CheckpointError, load_state, state_bytes, training_problem
from experiments.records.tracking import Status
from experiments.records.writing import do_all
from experiments.runtime import Runtime, StopSignal, broadcast_bytes, require_agreement, set_up_logging
from experiments.tasks.consistency import check_consistency
from kernels.backend import backend_in_use
from kernels.library import library_text

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
        self._agents = agents(runtime)
        if config.train.fresh and self._is_restart():
            log.warning(
                "train.fresh=true is for the first start only: this one continues what is in %s", config.run_dir
            )
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, fresh=False))
            self.config = config
        self.data = RunData(config, runtime)
        self.config = config = self.data.config
        if runtime.is_main:
            check_run_folder(config)
        together = share * ranks_per_group(config, runtime.world_size)
        self._notes = [*self.data.notes, small_group_warning(config, together)]
        self._notes.append(short_warmup_note(config.optim, self.data.total_steps))
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
            "training samples to score": self.data.scored_text,
        }
        require_agreement(runtime, facts)
        self.step = 0
        self.clock = StageClock()
        self.window = LossWindow(runtime, config.optim.bad_step)
        self.replicas = ReplicaCheck(self.learner.model, runtime, config.runtime.compare_ranks_steps)
        self.stop = StopSignal(runtime)
        self.reporter = Reporter(config, runtime, self.data, self.clock)
        self.signs = StepSigns(
            runtime, self.clock, lambda: self.data.loader.batches_ready, forward_s=lambda: self.learner.forward_s
        )
        self.trace = StepTrace(
            config.debug.profile_steps if runtime.is_main else 0, config.run_dir / "profile", runtime.device
        )
        timeout_s = config.runtime.collective_timeout_s
        self.watch = Watch(runtime, timeout_s, lambda: self.reporter.tracker.finish("FAILED"))
        self.evaluation = RunEvaluation(
            config, runtime, self.data, self.learner, self.reporter, self.clock, self._evaluation_stops
        )
        self._lock: IO[str] | None = None
        self._saved_step = -1
        self._unsaved = False  # rank 0: a checkpoint was due and is not on the disk

    def _is_restart(self) -> bool:
        """Return whether this launch has used the run folder before, by what rank 0 sees."""
        found = self.runtime.is_main and is_restart(self.config.run_dir, self._agents)
        return broadcast_bytes(self.runtime, b"restart" if found else None) is not None

    def open(self) -> None:
        """Take the run folder, continue from its newest valid checkpoint, and start logging and tracking."""
        config, runtime = self.config, self.runtime
        if runtime.is_main:
            self._lock = open_run_folder(config, self._agents)
        set_up_logging(runtime, config.run_dir / "log.txt")
        for note in filter(None, self._notes if runtime.is_main else ()):
            log.warning("%s", note)
        self._resume()
        if runtime.is_main and self._saved_step >= 0:
            renew_config(config)
        self._stop_repeating()
        self.learner.prepare()
        backend = backend_in_use(config.model.backend)
        told = "kernel backend: %s; %s; optimizer: %s", backend, library_text(), self.learner.optimizer_text
        log.info(*told, extra={"detail": True})
        lines = start_lines(config, runtime, self.data) if runtime.is_main else []
        for line in lines:
            log.info("%s", line)
        self.reporter.open(self.step, lines)
        if config.debug.sync_warnings and runtime.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        self.stop.install()
        self.watch.start()

    def _stop_repeating(self) -> None:
        """End the launch where its last two starts ended with the same failure at the same step."""
        text = repeated_failure(self.config.run_dir, self.runtime, self.step, self._agents)
        if text:
            end_launcher()
            raise TrainingFailure(f"the last two starts ended alike and a third would, too: {text}; see the log")

    def failed(self, failure: BaseException) -> BaseException:
        """Take in what ended the main thread, and end the run.

        Returns:
            What to raise: the failure, or, where that is only the echo of it, that of another rank.
        """
        cause, watch = self.watch.explain(failure), self.watch
        if cause is failure and isinstance(failure, Exception) and watch.step >= 0:
            text = describe_failure(self.runtime.rank, watch.step, watch.ids, failure)
            record_failure(self.config.run_dir, self.runtime.rank, watch.step, text, self._agents)
            if not isinstance(failure, CommandFailure):
                log.error("%s", text)
        if isinstance(cause, CommandFailure):  # the command says it, and perhaps nobody listens
            log.error("%s", cause, extra={"for_file": True})
        self.close("FAILED", cause)
        return cause

    def close(self, status: Status, cause: BaseException | None = None) -> None:
        """Write summary and curves, end tracking, give signals, graphs and folder back; each whatever the others do.

        Args:
            status: how the run ended.
            cause: the failure that ended it; what fails here besides is then a warning.

        Raises:
            Exception: the first failure here, where there is no cause.
            TrainingFailure: files of a run that went well are not written, with the list.
        """
        lock = self._lock
        failures = do_all(
            self.stop.ending,
            self.watch.close,
            self.trace.close,
            lambda: self._write_missing(between_steps=cause is None),
            lambda: self.reporter.close(self.step, status),
            self.learner.close,
            lambda: lock.close() if lock is not None else None,
            self.stop.restore,
        )
        if cause is None and failures:
            raise failures[0]
        for failure in failures:
            log.warning("besides, at the end of the run: %s: %s", type(failure).__name__, failure)
        missing = self.reporter.missing
        if missing and cause is None:
            raise TrainingFailure(
                f"training reached step {self.step} of {self.total_steps}, but not all is written: "
                f"{'; '.join(missing)}; make room and start the same command again: it continues from the newest "
                "checkpoint"
            )
        for line in missing:
            log.warning("not written: %s", line)

    def is_due(self, interval_steps: int) -> bool:
        """Return whether something with this interval is due after the current step (always at the end)."""
        return self.step == self.total_steps or (interval_steps > 0 and self.step % interval_steps == 0)

    def is_evaluation_due(self) -> bool:
        """Return whether this step is one to evaluate and was not evaluated yet (in an interrupted run)."""
        return self.evaluation.is_missing(self.step) and self.is_due(self.config.eval.interval_steps)

    def _evaluation_stops(self, step: int) -> bool:
        """Return whether a stop was asked for; called before each batch of an evaluation."""
        self.watch.at(step, "evaluates")
        return self.stop.received > 0

    def reports_after(self, step: int) -> bool:
        """Return whether losses are reported after a step by the interval (saving reports, too)."""
        return (step + 1) % self.config.train.log_interval_steps == 0 or step + 1 == self.total_steps

    def report_progress(self) -> None:
        """Read the losses since the last report (the one host synchronisation), check, show and record them."""
        with self.clock.stage("step"), self._saying_what_is_left():
            losses = self.window.close()
            self.replicas.compare(self.step)
            signs = self.signs.close()
        if losses:
            scaler = self.learner.scaler
            scale = scaler.get_scale() if scaler.is_enabled() else None
            self.reporter.losses(self.step, losses, self.learner.learning_rate(self.step - 1), scale, signs)
        if self.runtime.is_main:
            self._recover()

    @contextmanager
    def _saying_what_is_left(self) -> Iterator[None]:
        """Add to a failure, which all ranks have, from which step the run can be continued."""
        try:
            yield
        except TrainingFailure as failure:
            steps = [step for step, _ in list_checkpoints(self.config.run_dir / "checkpoints")]
            newest = broadcast_bytes(self.runtime, str(steps[0]).encode() if steps else None)
            left = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest.decode()}"
            raise TrainingFailure(f"{failure}; {left}") from None

    def _require_finite_state(self) -> None:
        """Raise TrainingFailure on every rank, and save nothing, unless all of a checkpoint is finite on all ranks."""
        with self._saying_what_is_left():
            bad = self.learner.not_finite()
            everywhere: list[Any] = [bad]
            if self.runtime.world_size > 1:
                everywhere = [None] * self.runtime.world_size
                dist.all_gather_object(everywhere, bad, group=self.runtime.control)
            found = [f"{len(names)} on rank {rank}: {few(names)}" for rank, names in enumerate(everywhere) if names]
            if found:
                raise TrainingFailure(
                    f"weights, statistics and momentum after step {self.step - 1} must be finite and are not "
                    f"({'; '.join(found)}); lower optim.lr; they are not saved"
                )

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
        self.watch.at(self.step, "saves a checkpoint")
        self._require_finite_state()
        self.replicas.compare(self.step, always=True)
        with self.clock.stage("checkpoint"):
            if self.runtime.is_main:
                self._write_checkpoint()
        self._saved_step = self.step

    @property
    def is_saved(self) -> bool:
        """Whether the current step has a checkpoint on the disk, as rank 0 sees it."""
        return self._saved_step == self.step and not self._unsaved

    def _write_checkpoint(self) -> None:
        """Write a checkpoint of the current step; one that fails is made up for at the next chance, see `_recover`."""
        self.reporter.flush()  # a power cut after this checkpoint takes no metric of the steps before it
        folder, need = self.config.run_dir / "checkpoints", state_bytes(self.state())
        self._unsaved = not self.reporter.writes.attempt(folder, self._put_checkpoint, need_bytes=need)

    def _put_checkpoint(self) -> None:
        """Write the state of now, which must be between two steps; one that has diverged is not worth an old one."""
        bad = self.learner.not_finite()
        if bad:  # made up for between two saves, where the ranks cannot agree to end: they do at the next save
            log.warning("the state after step %d is not finite (%s): it is not saved", self.step - 1, few(bad))
            return
        folder, keep = self.config.run_dir / "checkpoints", self.config.checkpoint.keep
        save_checkpoint(folder, self.step, self.state(), resolved_yaml(self.config), keep=keep)

    def _write_missing(self, *, between_steps: bool) -> None:
        """Write, as far as that is possible now, what could not be written before.

        Args:
            between_steps: whether the state is one that a checkpoint may hold; after a failure it is not.
        """
        if not between_steps:
            self.reporter.writes.forget(self.config.run_dir / "checkpoints")
        self.reporter.writes.retry()

    def _recover(self) -> None:
        """On rank 0, between two steps: make a deleted run folder again, and save what an outage kept from the disk."""
        if self.reporter.folder_lost:
            log.warning(
                "run folder %s was deleted or moved under the running training: it is made again", self.config.run_dir
            )
            try:
                lock = recreate_run_folder(self.config, self._agents)
            except (OSError, RunFolderError) as error:
                log.warning("it cannot be made again yet (%s); tried again with the next report", error)
                return
            if self._lock is not None:
                self._lock.close()
            self._lock = lock
            self.reporter.recreate()
            log.warning("its metrics and configuration are there again, its former checkpoints are not")
            self._unsaved = True
        if self._unsaved:
            self._write_checkpoint()
            self.reporter.writes.retry()

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
        problem = training_problem(state)
        if problem:
            raise CheckpointError(f"checkpoint {name} {problem}; use another one, or train.init_from for its weights")
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
