"""A training run in one object: model, optimizer, data and folder, and what the loop does between steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from experiments.config import Config, check_consistency, config_digest, flat_config, resolved_yaml
from experiments.engine.data import (
    class_names,
    class_subset,
    clips_per_rank,
    eval_loader,
    open_splits,
    random_batch,
    repeated,
    require_labels,
    require_samples,
    resolve_data_path,
    small_group_warning,
    train_loader,
)
from experiments.engine.gradients import GradientAverage
from experiments.engine.graph_rules import forward_capturer, graph_obstacle
from experiments.engine.graphs import WARM_UP_STEPS, CapturedStep, CudaCapturer
from experiments.engine.initial_weights import load_initial_weights
from experiments.engine.loss_window import LossWindow
from experiments.engine.optim import build_optimizer, learning_rate, optimizer_state, optimizer_text, set_learning_rate
from experiments.engine.precision import autocast, channels_last
from experiments.engine.replicas import SharedStatistics, data_parallel
from experiments.engine.scoring import evaluate
from experiments.engine.stage_clock import StageClock
from experiments.engine.step import TrainingStep
from experiments.records.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_model_state,
    load_state,
    mark_best,
    newest_valid,
    save_checkpoint,
)
from experiments.records.progress import Progress
from experiments.records.provenance import code_digest, environment, kernels_in_use, versions
from experiments.records.reporting import draw_confusion, draw_curves, result_lines, write_table
from experiments.records.run_folder import (
    SUMMARY_NAME,
    check_run_folder,
    open_run_folder,
    read_evaluations,
    read_summary,
    record_evaluation,
    write_summary,
)
from experiments.records.spool import SPOOL_NAME
from experiments.records.system_metrics import SystemSampler
from experiments.records.tracking import NullTracker, Status, Tracker, make_tracker
from experiments.runtime import Runtime, StopSignal, broadcast_bytes, require_agreement, seed_step, set_up_logging
from experiments.tasks import Report, make_task
from kernels.backend import backend_in_use
from kernels.library import library_text
from kernels.precise_bn import precise_bn
from model.avslowfast import build_model
from model.drop_pathway import should_drop
from pipeline.batch import Batch
from pipeline.dataset import Dataset
from pipeline.store.durable import write_file

log = logging.getLogger(__name__)


class Run:
    """What the training loop works on. Building it checks everything that can be checked before the first step.

    Args: config: of the run; runtime: of this process. Raises ValueError subclasses for whatever does not fit; nothing
        has been written then.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        check_consistency(config)
        self.clips_per_rank = clips_per_rank(config, runtime.world_size)
        if runtime.is_main:
            check_run_folder(config)
        path = resolve_data_path(config, runtime)
        self.splits = open_splits(path, config.data)
        self.train_set: Dataset = self.splits.train
        self.val_set: Dataset = self.splits.val
        self.task = make_task(config.train.task, class_names(config, self.train_set))
        self.subset = class_subset(config, self.val_set)
        require_samples(config, self.train_set, self.val_set)
        require_labels(config, self.train_set)
        self.total_steps = config.train.total_steps(len(self.train_set.samples))
        learning_rate(config.optim, 0, self.total_steps)  # a warm-up that is too long fails here
        self.loader = train_loader(config, self.train_set, runtime, self.total_steps)
        eval_loader(config, self.val_set, runtime)  # one that cannot be fails here, not after the training
        self.fingerprint = self.splits.fingerprint
        self._build_model()
        code = {
            "configuration": config_digest(config),
            "code": code_digest(),
            "kernels": kernels_in_use(config.model.backend),
        }
        require_agreement(runtime, code | {"optimizer": self.optimizer_text, "data": self.fingerprint})
        self.step = self.start_step = 0
        self.clock = StageClock()
        self.window = LossWindow(runtime)
        self.stop = StopSignal(runtime)
        self.tracker: Tracker = NullTracker()
        self.progress = Progress(self.total_steps, 0, visible=False)
        self._lock: IO[str] | None = None
        self._sampler: SystemSampler | None = None
        self._saved_step = -1
        self._evaluated = False  # in this process
        self._opened = False  # the folder's contents are this run's to write
        self._reported = 0  # quarantined clips that were logged

    def _build_model(self) -> None:
        config, device = self.config, self.runtime.device
        torch.manual_seed(config.train.seed)
        self.model = channels_last(build_model(config.model).to(device))
        self._initial: list[str] = []
        self.optimizer = build_optimizer(self.model, config.optim, fused=device.type == "cuda")
        self.optimizer_text = optimizer_text(config.optim, fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.runtime.precision == "fp16")
        if config.train.init_from and (config.train.fresh or not list_checkpoints(config.run_dir / "checkpoints")):
            self._initial = load_initial_weights(self.model, Path(config.train.init_from), self.task.class_names)
        self.drop_rate = config.model.drop_pathway_rate if config.model.has_audio and config.model.has_visual else 0.0

        self._obstacle = graph_obstacle(config, self.runtime)
        self._graphs: CapturedStep | None = None

    def open(self) -> None:
        """Take the run folder, continue from its newest valid checkpoint, and start logging and tracking."""
        config, runtime = self.config, self.runtime
        if runtime.is_main:
            self._lock = open_run_folder(config)
        set_up_logging(runtime, config.run_dir / "log.txt")
        warning = small_group_warning(config, self.clips_per_rank)
        if warning and runtime.is_main:
            log.warning("%s", warning)
        self._resume()
        self.take_step = self._build_step()
        self.statistics = SharedStatistics(self.model, runtime)
        log.info(
            "kernel backend: %s; %s; optimizer: %s",
            backend_in_use(config.model.backend),
            library_text(),
            self.optimizer_text,
        )
        self.tracker = make_tracker(config.tracking, config.run_dir, config.name, is_main=runtime.is_main)
        self.tracker.start(
            flat_config(config), {**versions(config.model.backend), "data_fingerprint": self.fingerprint}
        )
        if runtime.is_main:
            write_file(config.run_dir / "environment.txt", environment())
            for name in ("config.yaml", "environment.txt"):
                self.tracker.artifact(config.run_dir / name)
            self._sampler = SystemSampler(
                lambda values: self.tracker.metrics(self.step, values), config.tracking.system_metrics_interval_s
            ).start()
        self.progress = Progress(self.total_steps, self.step, visible=runtime.is_main)
        if config.debug.sync_warnings and runtime.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        self.stop.install()
        self._opened = True

    def _build_step(self) -> TrainingStep | CapturedStep:
        """Return what takes a training step: captured as CUDA graphs where that can be, else launch by launch."""
        config, runtime = self.config, self.runtime
        module: nn.Module = torch.compile(self.model) if config.runtime.compile else self.model  # type: ignore[assignment]
        average = None
        if runtime.world_size > 1 and self._obstacle:
            varies = self.drop_rate > 0 or config.model.sync_loss != "none"  # which parameters a step uses
            module = data_parallel(module, runtime, find_unused_parameters=varies)
        elif runtime.world_size > 1:
            average = GradientAverage((p for p in self.model.parameters() if p.requires_grad), runtime.world_size)
            average.share(self.model)
        step = TrainingStep(
            module, self.optimizer, self.scaler, self.task.step_loss, self.autocast,
            max_grad_norm=config.optim.max_grad_norm, average=average,
        )  # fmt: skip
        if self._obstacle:
            log.info("the step runs without CUDA graph: %s", self._obstacle)
            return step
        log.info("the step becomes a CUDA graph after %d steps of each kind", WARM_UP_STEPS)
        required = config.runtime.cuda_graph == "on"
        self._graphs = CapturedStep(step, CudaCapturer(runtime.device), required=required)
        return self._graphs

    # Data ---------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this rank from the current step on, for ever."""
        if self.config.debug.synthetic_input:
            return repeated(random_batch(self.config, self.runtime, self.clips_per_rank))
        if self.config.debug.overfit_one_batch:
            first = self.loader.batches()
            batch = next(first).clone()
            first.close()
            return repeated(batch)
        return self.loader.batches(self.step)

    # One step -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> bool:
        """Set what is a pure function of the step: dropout's seed and the learning rate. Returns DropPathway's draw."""
        seed = self.config.train.seed
        seed_step(seed, self.step, self.runtime.rank)
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step, self.total_steps))
        return self.drop_rate > 0 and should_drop(seed, self.step, self.drop_rate)

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass and the loss run."""
        return autocast(self.runtime.device, self.config.runtime.precision)

    # Between steps ------------------------------------------------------------------------------------------------

    def is_due(self, interval_steps: int) -> bool:
        """Return whether something with this interval is due after the current step (always at the end)."""
        return self.step == self.total_steps or (interval_steps > 0 and self.step % interval_steps == 0)

    def report_progress(self) -> None:
        """Read the losses since the last report (the one host synchronisation), check, show and record them."""
        with self.clock.stage("step"):
            losses = self.window.close()
        if not losses:
            return
        speed, wait = self.clock.interval()
        rate = float(self.optimizer.param_groups[0]["lr"])
        values = {f"train/{name}": value for name, value in losses.items()}
        values |= {
            "train/learning_rate": rate,
            "train/epoch": self.step * self.config.train.clips_per_step / len(self.train_set.samples),
        }
        if speed > 0:
            values |= {"train/clips_per_second": speed, "train/data_wait_share": wait}
        if self.scaler.is_enabled():
            values["train/grad_scale"] = self.scaler.get_scale()
        values["train/clips_substituted"] = float(self.loader.stats.substituted)
        self.tracker.metrics(self.step, values)
        for name, reason in self.loader.quarantine[self._reported :]:
            log.warning("clip of %s was replaced: %s", name, reason)
        self._reported = len(self.loader.quarantine)
        self.progress.show(self.step, {**losses, "lr": rate}, speed, wait)

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

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint holds; the same for any number of ranks."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "optimizer_backend": self.config.optim.backend,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "clips_seen": self.step * self.config.train.clips_per_step,
            "data_fingerprint": self.fingerprint,
            "config_digest": config_digest(self.config),
            "class_names": list(self.task.class_names),
            "rng": {"seed": self.config.train.seed, "rule": "every draw is a function of seed, step and rank"},
        }

    def _resume(self) -> None:
        data: bytes | None = None
        if self.runtime.is_main:
            checkpoint = newest_valid(self.config.run_dir / "checkpoints")
            data = None if checkpoint is None else checkpoint.state
        data = broadcast_bytes(self.runtime, data)
        if data is None:
            for line in self._initial:
                log.info("%s", line)
            return
        name = f"in {self.config.run_dir}"
        state = load_state(data, name)
        if state["data_fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"checkpoint {name} was trained on other data ({state['data_fingerprint']}) than "
                f"data.path holds now ({self.fingerprint}); restore the data, or train.fresh=true starts again"
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
        load_model_state(self.model, state["model"], name)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.start_step = self._saved_step = int(state["step"])
        log.info("continuing from step %d of %d", self.step, self.total_steps)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def evaluation_due(self) -> bool:
        """Return whether this step is one to evaluate and was not evaluated yet (in an interrupted run)."""
        due = self.is_due(self.config.eval.interval_steps) and self.step not in read_evaluations(self.config.run_dir)
        return (
            broadcast_bytes(self.runtime, b"due" if due and self.runtime.is_main else None) is not None
        )  # rank 0's word

    def make_statistics_precise(self) -> None:
        """Recompute the running statistics over `eval.precise_bn_batches` training batches, if asked for."""
        count = self.config.eval.precise_bn_batches
        if count == 0:
            return
        with self.clock.stage("eval"), self.autocast():
            batches = train_loader(self.config, self.train_set, self.runtime, self.total_steps).batches(self.step)
            pairs = ((b.frames, b.log_mel) for _, b in zip(range(count), batches, strict=False))
            precise_bn(self.model, pairs, self.model)
            batches.close()

    def evaluate(self) -> bool:
        """Score the validation split, record the result, and mark the checkpoint of this step if it is the best one.

        Returns whether it was finished: a stop signal ends it without a result, and the next start makes up for it.
        """
        config, folder = self.config, self.config.run_dir
        with self.clock.stage("eval"):
            loader = eval_loader(config, self.val_set, self.runtime)
            accumulator = self.task.accumulator(len(self.val_set.samples), loader.plan.views_per_sample)
            stopped = lambda: self.stop.received > 0  # noqa: E731
            graphs = forward_capturer(config, self.runtime)
            report = evaluate(
                self.model, accumulator, loader, self.runtime, self.autocast(), stopped, self.subset, graphs
            )
        if report is None:
            return False
        if self.runtime.is_main:
            self._publish(report)
            known = read_evaluations(folder).values()
            best = max((s for m in known if not math.isnan(s := m.get(report.primary, -1.0))), default=-1.0)
            saved = dict(list_checkpoints(folder / "checkpoints")).get(self.step)
            if report.metrics[report.primary] > best and saved is not None:
                self.tracker.artifact(mark_best(folder / "checkpoints", saved), "checkpoints/best")
            record_evaluation(folder, self.step, report.metrics)  # last: a kill before it makes the next start redo all
            self._evaluated = True
        return True

    def _publish(self, report: Report) -> None:
        folder = self.config.run_dir
        for line in result_lines(report):
            log.info("%s", line)
        self.tracker.metrics(self.step, {f"val/{k}": v for k, v in report.metrics.items()})
        self.tracker.metrics(self.step, {f"val/samples_{k}": float(v) for k, v in report.counts.items()})
        write_table(report, folder / "per_class.csv")
        self.tracker.artifact(folder / "per_class.csv")
        if report.confusion is not None:
            draw_confusion(report.confusion, report.class_names, folder / "plots" / "confusion.png")
            self.tracker.artifact(folder / "plots" / "confusion.png", "plots")

    # The end ------------------------------------------------------------------------------------------------------

    def close(self, status: Status) -> None:
        """Write summary and curves, end tracking, give signals and folder back. Safe after any failure."""
        self.stop.restore()
        self.progress.close()
        if self._sampler is not None:
            self._sampler.stop()
        if self.runtime.is_main and self._opened:
            folder = self.config.run_dir
            before = read_summary(folder)
            if before.get("finished") is True and self.start_step == self.total_steps and not self._evaluated:
                scores = [f"{k} {100 * before[k]:.2f} %" for k in ("top1", "mean_ap") if before.get(k) is not None]
                log.info("the run is finished, nothing was due: %s; see %s", ", ".join(scores), folder / SUMMARY_NAME)
            else:
                write_summary(folder, self.summary(before))
            if (folder / SPOOL_NAME).exists():
                draw_curves(folder / SPOOL_NAME, folder / "plots" / "curves.png")
                self.tracker.artifact(folder / "plots" / "curves.png", "plots")
            self.tracker.artifact(folder / "summary.json")
            self.tracker.finish(status)
        if self._graphs is not None:
            self._graphs.close()
        if self._lock is not None:
            self._lock.close()

    def summary(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what summary.json holds; times add up over the processes of a run, speeds are this process's.

        Args: before: what it held when this process took over; empty in a new run.
        """
        earlier = before.get("seconds", {})
        evaluations = read_evaluations(self.config.run_dir)
        last = evaluations[max(evaluations)] if evaluations else {}
        return {
            "name": self.config.name,
            "config_digest": config_digest(self.config),
            "data_fingerprint": self.fingerprint,
            "steps": self.step,
            "total_steps": self.total_steps,
            "finished": self.step == self.total_steps,
            "resumed_from_step": self.start_step,
            "world_size": self.runtime.world_size,
            "device": self.runtime.device.type,
            "clips_per_second": round(self.clock.clips_per_second, 3),
            "data_wait_share": round(self.clock.data_wait_share, 4),
            "top1": None,
            "top5": None,
            **last,
            "evaluated_step": max(evaluations) if evaluations else None,
            "clips_substituted": self.loader.stats.substituted,
            "refused_files": [f"{name}: {reason}" for name, reason in self.splits.refused],
            "quarantined": sorted({f"{name}: {reason}" for name, reason in self.loader.quarantine}),
            "wall_time_s": round(self.clock.wall_time_s + before.get("wall_time_s", 0.0), 2),
            "seconds": {k: round(v + earlier.get(k, 0.0), 2) for k, v in self.clock.ledger().items()},
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(self.config.model.backend),
        }
