"""One training step: forward, loss, backward, clipping, optimizer. Nothing in it waits for the device.

Legend: N clips, T frames, H W pixels, M audio frames, F mel bins, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.engine.gradients import GradientAverage, Packed
from experiments.engine.guard import StepGuard
from experiments.tasks import BoxTargets, StepLoss, Task
from pipeline.batch import Batch


@dataclass(frozen=True)
class StepInputs:
    """What a step reads of a batch, on the device.

    Args:
        frames: (N, 3, T, H, W) channels_last_3d, of 3 or 4 channels in memory; None for an audio-only model.
        log_mel: (N, 1, M, F) float32, or None.
        negative_log_mel: of the same shape, or None.
        labels: (N,) int64 or (N, K) float32; not read where there are boxes.
        pair_weight: () float32, of this rank's synchronization loss (see `pair_weight`); None = 1.
        boxes: (R, 5) float32, see `Batch`, for a detection; their number differs from step to step.
        box_labels: (R, K) float32.
        box_weight: () float32, of this rank's loss (see `BoxTargets`); None = 1.
        has_audio, has_negative: (N,) bool, which clips have a sound and a negative; None = nothing is said about it.
    """

    frames: Tensor | None
    log_mel: Tensor | None
    negative_log_mel: Tensor | None
    labels: Tensor
    pair_weight: Tensor | None = None
    boxes: Tensor | None = None
    box_labels: Tensor | None = None
    box_weight: Tensor | None = None
    has_audio: Tensor | None = None
    has_negative: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, pair_weight: Tensor | None = None, *, drop_silence: bool = False) -> StepInputs:
        """Return the inputs that a batch holds, and the weight given.

        Args:
            batch: on the device.
            pair_weight: see above.
            drop_silence: whether the step is told which clips have sound.
        """
        inputs = cls(batch.frames, batch.log_mel, batch.negative_log_mel, batch.labels, pair_weight)
        if not drop_silence:
            return inputs
        other = None if batch.negative_log_mel is None else batch.has_negative
        return replace(inputs, has_audio=batch.has_audio, has_negative=other)

    @property
    def targets(self) -> Tensor | BoxTargets:
        """What a task compares the model's output with."""
        if self.boxes is None or self.box_labels is None:
            return self.labels
        return BoxTargets(self.box_labels, self.boxes[:, 0].long(), len(self.labels), self.box_weight)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of what a step reads."""
        return tuple(f.name for f in fields(cls))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is there, by name."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value for name, value in values.items() if value is not None}

    def sound(self) -> dict[str, Tensor]:
        """Return what is said about which clips have sound, as arguments of the model."""
        return {name: t for name, t in self.tensors().items() if name in ("has_audio", "has_negative")}

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what is there: two sets of inputs that agree in it fit into the same buffers."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self.tensors().items()}


LossFunction = Callable[[Any, StepInputs], StepLoss]


def task_loss(task: Task) -> LossFunction:
    """Return the loss function of a task.

    Args:
        task: gives a loss for the model's output and labels.
    """
    return lambda outputs, inputs: task.step_loss(outputs, inputs.targets, inputs.pair_weight)


class TrainingStep:
    """The step of one rank, in two halves with the exchange of gradients between them.

    Called as `step(inputs, drop_audio=...)`; `CapturedStep` takes the halves apart.

    Args:
        forward: the model, or the model under DDP or torch.compile, in training mode.
        optimizer: of all trained parameters, with momentum for each from the start (see `build_optimizer`).
        scaler: of the loss for fp16; a disabled one does nothing.
        loss_function: of the model's output and the inputs, see `task_loss`.
        autocast: returns the context of forward and loss.
        max_grad_norm: gradients are clipped to it, all together; 0 = not.
        average: joins the gradients of several ranks; None for one rank, or where DDP does it.
        guard: judges every step; None = none is left out, but for fp16's overflows.
    """

    def __init__(
        self,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        loss_function: LossFunction,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        max_grad_norm: float = 0.0,
        average: GradientAverage | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        self.guard = guard
        self.warming_up = False  # see `CapturedStep`
        self.forward_s = 0.0  # of the host in forward passes so far, before ranks wait for each other
        self.forward, self.optimizer, self.scaler = forward, optimizer, scaler
        self.loss_function, self.autocast = loss_function, autocast
        self.max_grad_norm, self.average = max_grad_norm, average
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, inputs: StepInputs, *, drop_audio: bool) -> StepLoss:
        """Take one step.

        Args:
            inputs: of this rank.
            drop_audio: DropPathway's decision.

        Returns:
            the loss, detached.
        """
        loss, packed = self.find_gradients(inputs, drop_audio=drop_audio)
        self.exchange(packed)
        self.update_weights(packed, drop_audio=drop_audio)
        return loss

    def find_gradients(self, inputs: StepInputs, *, drop_audio: bool) -> tuple[StepLoss, Packed | None]:
        """Run forward, loss and backward; see `__call__`.

        Returns:
            the loss, detached; the gradients in one piece of memory where ranks exchange them.
        """
        if self.guard is not None:
            self.guard.remember()
        detached = self.backward(self.find_loss(inputs, drop_audio=drop_audio))
        return detached, None if self.average is None else self.average.pack()

    def find_loss(self, inputs: StepInputs, *, drop_audio: bool) -> StepLoss:
        """Run forward and loss; see `__call__`."""
        boxes, began = {} if inputs.boxes is None else {"boxes": inputs.boxes}, time.perf_counter()
        with self.autocast():
            outputs = self.forward(
                inputs.frames,
                inputs.log_mel,
                negative_log_mel=inputs.negative_log_mel,
                drop_audio=drop_audio,
                **boxes,
                **inputs.sound(),
            )
            self.forward_s += time.perf_counter() - began
            return self.loss_function(outputs, inputs)

    def backward(self, loss: StepLoss, passes: int = 1) -> StepLoss:
        """Run the backward pass; the guard, if any, sees loss and statistics first.

        Args:
            loss: of `find_loss`.
            passes: of the step, of which this is one: the gradients are divided by their number.

        Returns:
            the loss, detached.
        """
        total = loss.total if self.guard is None else self.guard.guarded(loss.total)
        self.scaler.scale(total if passes == 1 else total / passes).backward()
        return StepLoss(total.detach(), loss.per_clip.detach(), {k: v.detach() for k, v in loss.parts.items()})

    def exchange(self, packed: Packed | None) -> None:
        """Sum packed gradients over the ranks."""
        if self.average is not None and packed is not None:
            self.average.exchange(packed)

    def update_weights(self, packed: Packed | None, *, drop_audio: bool) -> None:
        """Clip if asked, step the optimizer unless the step is bad (fp16: gradients overflowed), forget the gradients.

        Args:
            packed: gradients to use in place of the parameters' own, or None.
            drop_audio: as in `__call__`.
        """
        if packed is not None:
            packed.unpack()
        guard, norm = self.guard, None
        if guard is not None or self.max_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
        if guard is not None:
            norm = guard.judge(self.parameters, drop_audio=drop_audio)
        if self.max_grad_norm > 0:
            norm = (
                nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
                if norm is None
                else norm
            )
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        if guard is None or self._leave_to_optimizer(guard):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.forget_gradients()

    def _leave_to_optimizer(self, guard: StepGuard) -> bool:
        """Hand the verdict to an optimizer that passes bad steps over on the device.

        Returns:
            False if the step is not to be taken: on a CPU, where the host may ask.
        """
        if self.scaler.is_enabled():
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(torch.maximum(found, guard.left_out()))
        elif all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, guard.left_out()  # type: ignore[attr-defined]
        elif guard.verdict.device.type == "cpu":
            return not bool(guard.left_out())
        return True  # apex on CUDA takes the step: it has no such switch, and nobody waits for the device here

    def forget_gradients(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None
