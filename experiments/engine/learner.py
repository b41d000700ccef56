"""What learns in a run: model, optimizer, gradient scaler, and what takes a step with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.config import Config
from experiments.engine.accumulation import AccumulatedStep, weights_by_count
from experiments.engine.boxes import box_count, with_boxes
from experiments.engine.gradients import GradientAverage
from experiments.engine.graph_rules import graph_obstacle
from experiments.engine.graphs import WARM_UP_STEPS, CapturedStep, CudaCapturer
from experiments.engine.guard import StepGuard
from experiments.engine.initial_weights import load_initial_weights
from experiments.engine.optim import (
    build_optimizer,
    learning_rate,
    optimizer_state,
    optimizer_text,
    set_learning_rate,
)
from experiments.engine.precision import autocast, channels_last
from experiments.engine.replicas import SharedStatistics, data_parallel, pair_count
from experiments.engine.shared_norms import share_norms
from experiments.engine.step import StepInputs, TrainingStep, task_loss
from experiments.records.finite import not_finite
from experiments.records.state import CheckpointError, load_model_state, optimizer_problem
from experiments.runtime import Runtime, seed_step
from experiments.tasks import StepLoss, Task
from kernels.modules import GhostBatchNorm
from model.avslowfast import build_model
from model.drop_pathway import should_drop
from pipeline.batch import Batch

log = logging.getLogger(__name__)


class Learner:
    """Model and optimizer of a run on this rank; `prepare` makes what takes steps, after a checkpoint was loaded.

    Args:
        config: of the run.
        runtime: of this process.
        task: gives the loss.
        total_steps: of the training, for the learning rate.
        fresh: weights are those that `train.init_from` names, if it does; False where a checkpoint will be loaded.

    Raises:
        ValueError: an optimizer that is not available, weights of another model, CUDA graphs that cannot be.
    """

    def __init__(self, config: Config, runtime: Runtime, task: Task, total_steps: int, *, fresh: bool) -> None:
        self._config, self._runtime, self._task, self._total_steps = config, runtime, task, total_steps
        device = runtime.device
        torch.manual_seed(config.train.seed)
        self.model = channels_last(build_model(config.model).to(device))
        self.optimizer = build_optimizer(self.model, config.optim, fused=device.type == "cuda")
        self.optimizer_text = optimizer_text(config.optim, fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.runtime.precision == "fp16")
        scaled = self.scaler.is_enabled()
        self.guard = StepGuard(self.model, spike_ratio=config.optim.spike_ratio, scaled=scaled)
        self.initial_lines: list[str] = []
        if config.train.init_from and fresh:
            self.initial_lines = load_initial_weights(self.model, Path(config.train.init_from), task.class_names)
        both = config.model.has_audio and config.model.has_visual
        self.drop_rate = config.model.drop_pathway_rate if both else 0.0
        self.obstacle = graph_obstacle(config, runtime)
        self._graphs: CapturedStep | None = None
        self._step: TrainingStep | None = None

    def prepare(self) -> None:
        """Make `take_step`, from CUDA graphs where that can be, and `statistics`, which joins those of the ranks."""
        config, runtime = self._config, self._runtime
        shared = share_norms(self.model, config, runtime)
        if shared:
            log.info("%s", shared)
        module: nn.Module = torch.compile(self.model) if config.runtime.compile else self.model  # type: ignore[assignment]
        average = None
        if runtime.world_size > 1 and self.obstacle:
            varies = self.drop_rate > 0 or config.model.sync_loss != "none"  # which parameters a step uses
            module = data_parallel(module, runtime, find_unused_parameters=varies)
        elif runtime.world_size > 1:
            average = GradientAverage((p for p in self.model.parameters() if p.requires_grad), runtime.world_size)
            average.share(self.model)
        step = TrainingStep(
            module,
            self.optimizer,
            self.scaler,
            task_loss(self._task),
            self.autocast,
            max_grad_norm=config.optim.max_grad_norm,
            average=average,
            guard=self.guard,
        )
        self._step = step
        self.take_step: TrainingStep | CapturedStep = step
        self._take_passes = AccumulatedStep(step) if self.obstacle else None
        if self.obstacle:
            log.info("the step runs without CUDA graph: %s", self.obstacle)
        else:
            log.info("the step becomes a CUDA graph after %d steps of each kind", WARM_UP_STEPS)
            required = config.runtime.cuda_graph == "on"
            self.take_step = self._graphs = CapturedStep(step, CudaCapturer(runtime.device), required=required)
        self.statistics = SharedStatistics(self.model, runtime)

    @property
    def norm_group(self) -> Any:
        """Process group whose ranks form BN groups together; None: every rank has its own."""
        return next((m.process_group for m in self.model.modules() if isinstance(m, GhostBatchNorm)), None)

    def begin_step(self, step: int) -> bool:
        """Set what is a pure function of the step: dropout's seed and the learning rate.

        Returns:
            DropPathway's draw.
        """
        seed = self._config.train.seed
        seed_step(seed, step, self._runtime.rank)
        set_learning_rate(self.optimizer, self.learning_rate(step))
        return self.drop_rate > 0 and should_drop(seed, step, self.drop_rate)

    def step_of(self, batches: Sequence[Batch], *, drop_audio: bool) -> StepLoss:
        """Take a step: forward, backward and optimizer.

        Args:
            batches: one, or one for each pass (`train.max_clips_per_pass`).
            drop_audio: of `begin_step`.
        """
        passes = self._passes(batches)
        if len(passes) == 1:
            return self.take_step(passes[0], drop_audio=drop_audio)
        assert self._take_passes is not None, "engine/graph_rules.py rules graphs out"
        return self._take_passes(passes, drop_audio=drop_audio)

    def inputs(self, batch: Batch) -> StepInputs:
        """Return what a step of one pass reads of a batch."""
        return self._passes([batch])[0]

    def _passes(self, batches: Sequence[Batch]) -> list[StepInputs]:
        """Return what a step reads, with weights by the pairs or boxes of all its passes and ranks."""
        passes, world = [self._unweighted(batch) for batch in batches], self._runtime.world_size
        if world * len(passes) == 1:
            return passes
        if all(p.log_mel is not None and p.negative_log_mel is not None for p in passes):
            counts = [pair_count(p.log_mel, p.negative_log_mel) for p in passes]  # type: ignore[arg-type]
            weights = weights_by_count(counts, world)
            passes = [replace(p, pair_weight=w) for p, w in zip(passes, weights, strict=True)]
        if self._config.model.head == "detection":
            weights = weights_by_count([box_count(batch) for batch in batches], world)
            passes = [replace(p, box_weight=w) for p, w in zip(passes, weights, strict=True)]
        return passes

    def _unweighted(self, batch: Batch) -> StepInputs:
        inputs = StepInputs.of(batch, drop_silence=self._config.model.drops_silence)
        if self._config.train.task == "self_supervision":
            return replace(inputs, labels=batch.labels[:0] if batch.rotation is None else batch.rotation)
        return with_boxes(inputs, batch) if self._config.model.head == "detection" else inputs

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(self._config.scaled_optim, step, self._total_steps)

    @property
    def forward_s(self) -> float:
        """Seconds of the host in forward passes so far, which end before ranks wait for each other; 0 in graphs."""
        return 0.0 if self._step is None else self._step.forward_s

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass and the loss run."""
        return autocast(self._runtime.device, self._config.runtime.precision)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it; the same for any number of ranks."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "optimizer_backend": self._config.optim.backend,
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state(),
        }

    def not_finite(self) -> list[str]:
        """Return the names of weights, statistics and momentum that hold nan or inf; waits for the device once."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        held = {
            f"{key} of {names[id(parameter)]}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        return not_finite({**self.model.state_dict(), **held})

    def load(self, state: dict[str, Any], name: str) -> None:
        """Take over the state of a checkpoint; before `prepare`. The optimizer's settings stay the configuration's.

        Args:
            state: see `state`; without `training_problem`.
            name: of the checkpoint, for messages.

        Raises:
            CheckpointError: weights or an optimizer of another model, a state that lacks something.
        """
        own, parameters = self.optimizer.state_dict(), [p for g in self.optimizer.param_groups for p in g["params"]]
        problem = optimizer_problem(state["optimizer"], own, parameters)
        if problem:
            raise CheckpointError(f"checkpoint {name} {problem}; use another one, or train.init_from for its weights")
        load_model_state(self.model, state["model"], name)
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own["param_groups"]})
        try:
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {name} has a gradient scaler of another kind ({error}): runtime.precision must be the "
                "same; train.init_from starts a new run from its weights"
            ) from None
        self.guard.load(state.get("guard"))

    def close(self) -> None:
        """Give up the CUDA graphs, before the process group is left."""
        if self._graphs is not None:
            self._graphs.close()
