"""CUDA graphs of the whole training step and of evaluation's forward pass.

A step launches about 2 000 kernels, for which the host needs longer than the GPU at few clips. A graph is launched as
one. Two graphs, with audio and without, because DropPathway's steps use different parameters; the draw is made on the
host and chooses the graph.

How: every step of a kind runs as it is, on the stream of the captures, for its first `WARM_UP_STEPS`: convolution
algorithms are chosen there, and the steps count. Then the step is captured, which executes nothing, and replayed from
there on. No state is ever rolled back, so that a captured run is the eager run bit by bit where both use the same
algorithms. Inputs are copied into buffers that the graphs read; the learning rate lies in a tensor on the device;
dropout draws from the seed that the generator has at the replay.

Several ranks: forward and backward are one graph, clipping and optimizer another; between them the gradients are
averaged by one all_reduce. No collective operation is inside a graph, so none has to be taken apart before the process
group is left, and a dead rank is noticed as it is without graphs. The price is that the exchange does not overlap the
backward pass: estimated 1 to 2 ms for 154 MB on 8 GPUs with NVLink, unmeasured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experiments.engine.gradients import Packed
from experiments.engine.step import StepInputs, TrainingStep
from experiments.tasks import StepLoss
from pipeline.batch import empty_frames_like, has_padded_channels, is_channels_last

WARM_UP_STEPS = 3  # eager steps of each kind before its capture
MAX_FORWARD_SHAPES = 4  # graphs of an evaluation; further shapes run without
Work = Callable[[], None]
log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A step that cannot be captured."""


class Capturer(Protocol):
    """What turns work into a replay. On a GPU: `CudaCapturer`; tests record the operations instead."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Return the context in which everything runs that is captured or feeds a graph."""

    def capture(self, work: Work) -> Work:
        """Record what `work` would do, without doing it.

        Returns:
            What does it, again and again.
        """

    def memory_bytes(self) -> int:
        """Return the device memory that this process holds."""


class CudaCapturer:
    """Captures on a stream of its own, all graphs in one memory pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []  # the allocator may go on asking a graph that never ended

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the block on the stream, after what the caller's stream has to do and before what it gets to do."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        """Capture `work`; other threads (the loader's) go on working with the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            self._failed.append(graph)
            self._recover()
            raise CaptureError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        return graph.replay

    def _recover(self) -> None:
        """End what a failed capture left behind: generator and allocator may still be in their state of a capture."""
        torch.cuda.synchronize(self.device)
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):  # it was ended
                end(torch.cuda.current_device() if self.device.index is None else self.device.index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self.device)

    def memory_bytes(self) -> int:
        """Return what torch's allocator holds of the device."""
        return torch.cuda.memory_reserved(self.device)


@dataclass
class _Kind:
    """Steps with audio, or those without."""

    name: str
    warmed_up: int = 0
    replay: Work | None = None
    loss: StepLoss | None = None
    packed: Packed | None = None
    failed: bool = field(default=False)


class CapturedStep:
    """Takes training steps as `TrainingStep` does, from CUDA graphs as soon as it can.

    `warming_up` says whether the last step was one of those that come before the replays.

    Load checkpoints first: the graphs keep the memory of weights, momentum and scale. `close` before the process
    group is left.

    Args:
        step: what is captured. Its optimizer must be fused SGD: it gets its learning rate as a tensor on the device.
        capturer: see `Capturer`.
        required: an error of a capture is raised; else the run goes on without graphs, with a warning.
    """

    def __init__(self, step: TrainingStep, capturer: Capturer, *, required: bool = False) -> None:
        self.step, self._capturer, self._required = step, capturer, required
        self._kinds = {False: _Kind("with audio"), True: _Kind("without audio")}
        self._inputs: StepInputs | None = None
        self._said = self.warming_up = False
        device = step.parameters[0].device
        for group in step.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)

    def __call__(self, inputs: StepInputs, *, drop_audio: bool) -> StepLoss:
        """Take one step; arguments and result as for `TrainingStep`. The learning rate is set before."""
        self.warming_up = False
        with self._capturer.on_stream():
            if not self._take_in(inputs):
                return self.step(inputs, drop_audio=drop_audio)
            kind = self._kinds[drop_audio]
            self.warming_up = kind.replay is None and not kind.failed
            if self.warming_up and kind.warmed_up >= WARM_UP_STEPS:
                self._capture(kind, drop_audio)
            if kind.replay is None:
                kind.warmed_up += 1
                assert self._inputs is not None
                return self.step(self._inputs, drop_audio=drop_audio)
            kind.replay()
            assert kind.loss is not None
            return _copied(kind.loss)  # the next replay writes over it

    @property
    def captured(self) -> tuple[str, ...]:
        """The kinds of steps that are replayed by now."""
        return tuple(kind.name for kind in self._kinds.values() if kind.replay is not None)

    def close(self) -> None:
        """Give up the graphs and their memory; steps run eagerly from now on. Safe after a failure of the device."""
        for kind in self._kinds.values():
            kind.replay = kind.loss = kind.packed = None
            kind.failed = True
        self._inputs = None

    def _take_in(self, inputs: StepInputs) -> bool:
        """Copy the inputs into the buffers.

        Returns:
            False for inputs of another shape than the first.
        """
        if self._inputs is None:
            buffers = {name: _empty_like(tensor) for name, tensor in inputs.tensors().items()}
            self._inputs = StepInputs(**{**dict.fromkeys(StepInputs.names()), **buffers})
        if self._inputs.shapes != inputs.shapes:
            if not self._said:
                log.info("a step of other shapes than the first runs without CUDA graph: %s", inputs.shapes)
            self._said = True
            return False
        own = self._inputs.tensors()
        for name, tensor in inputs.tensors().items():
            _copy(own[name], tensor)
        return True

    def _capture(self, kind: _Kind, drop_audio: bool) -> None:
        """Capture the step of a kind; see `Capturer.capture`."""
        step, inputs = self.step, self._inputs
        assert inputs is not None

        def first() -> None:
            """Find the gradients."""
            kind.loss, kind.packed = step.find_gradients(inputs, drop_audio=drop_audio)

        def second() -> None:
            """Use them."""
            step.update_weights(kind.packed, drop_audio=drop_audio)

        def whole() -> None:
            """Do both."""
            first()
            second()

        began, before = time.perf_counter(), self._capturer.memory_bytes()
        try:
            if step.average is None:
                kind.replay = self._capturer.capture(whole)
            else:
                halves = self._capturer.capture(first), self._capturer.capture(second)
                kind.replay = lambda: self._replay_halves(kind, *halves)
        except CaptureError as error:
            self._give_up(kind, error)
            return
        taken_s, more = time.perf_counter() - began, self._capturer.memory_bytes() - before
        log.info(
            "step %s captured as a CUDA graph: %.2f s, reserved memory %+.2f GiB", kind.name, taken_s, more / 2**30
        )

    def _replay_halves(self, kind: _Kind, first: Work, second: Work) -> None:
        first()
        self.step.exchange(kind.packed)
        second()

    def _give_up(self, kind: _Kind, error: CaptureError) -> None:
        """Put things back after a failed capture."""
        self.step.forget_gradients()
        getattr(self.step.scaler, "_per_optimizer_states", {}).clear()  # a step that was never finished
        for name in ("grad_scale", "found_inf"):
            vars(self.step.optimizer).pop(name, None)
        kind.failed, kind.loss, kind.packed = True, None, None
        if self._required:
            raise CaptureError(
                f"the step {kind.name} cannot be captured as a CUDA graph ({error}); use runtime.cuda_graph=off"
            ) from error
        log.warning("the step %s runs without CUDA graph: its capture failed (%s)", kind.name, error)


class CapturedForward:
    """Runs a model without gradients, from a CUDA graph for each of the first shapes; for one evaluation.

    Args:
        model: in evaluation mode, as it stays for the time; called as model(frames, log_mel, has_audio=...).
        capturer: see `Capturer`.
        result: picks the tensor that is wanted out of the model's output.
    """

    def __init__(self, model: nn.Module, capturer: Capturer, result: Callable[[Any], Tensor]) -> None:
        self._model, self._capturer, self._result = model, capturer, result
        self._shapes: dict[object, _Forward] = {}
        self._failed = False

    @torch.no_grad()
    def __call__(self, frames: Tensor | None, log_mel: Tensor | None, *, has_audio: Tensor | None = None) -> Tensor:
        """Return the wanted tensor for a batch; the caller's autocast holds.

        Args:
            frames, log_mel, has_audio: of the model's forward.
        """
        pairs = (("frames", frames), ("log_mel", log_mel), ("has_audio", has_audio))
        given = {name: t for name, t in pairs if t is not None}
        key = tuple((name, tuple(t.shape), t.dtype) for name, t in given.items())
        with self._capturer.on_stream():
            found = self._shapes.get(key)
            if found is None:
                if len(self._shapes) == MAX_FORWARD_SHAPES or self._failed:
                    return self._run(given)
                found = self._shapes[key] = _Forward({name: _empty_like(t) for name, t in given.items()})
            for name, tensor in given.items():
                _copy(found.inputs[name], tensor)
            if found.replay is None and found.runs >= 1 and not self._failed:  # a shape that came twice comes again
                self._capture(found)
            found.runs += 1
            if found.replay is None:
                return self._run(found.inputs)
            found.replay()
            assert found.output is not None
            return found.output.clone()

    def _run(self, given: dict[str, Tensor]) -> Tensor:
        more = {name: t for name, t in given.items() if name == "has_audio"}
        return self._result(self._model(given.get("frames"), given.get("log_mel"), **more))

    def _capture(self, shape: _Forward) -> None:
        def work() -> None:
            """Keep the output where replays put it."""
            shape.output = self._run(shape.inputs)

        try:
            shape.replay = self._capturer.capture(work)
        except CaptureError as error:
            self._failed = True
            log.warning("the evaluation runs without CUDA graphs: the capture failed (%s)", error)


@dataclass
class _Forward:
    """The graph of one shape."""

    inputs: dict[str, Tensor]
    runs: int = 0
    replay: Work | None = None
    output: Tensor | None = None


def _copied(loss: StepLoss) -> StepLoss:
    return StepLoss(loss.total.clone(), loss.per_clip.clone(), {k: v.clone() for k, v in loss.parts.items()})


def _empty_like(tensor: Tensor) -> Tensor:
    """Return memory for a tensor in the same layout; frames keep a fourth channel in memory."""
    return empty_frames_like(tensor) if tensor.dim() == 5 and is_channels_last(tensor) else torch.empty_like(tensor)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy, in one piece where both have a fourth channel in memory that is zero."""
    if target.dim() == 5 and has_padded_channels(target) and has_padded_channels(source):
        n, _, *sizes = source.shape
        shape = (n, 4, *sizes)
        end = source.storage_offset() + n * source.stride(0)
        if source.untyped_storage().nbytes() >= end * source.element_size():
            target.as_strided(shape, target.stride()).copy_(
                source.as_strided(shape, source.stride()), non_blocking=True
            )
            return
    target.copy_(source, non_blocking=True)
