"""A trace of some steps (`debug.profile_steps`): torch.profiler's, with ranges by stage, and a table of them.

Nothing of it is there in other runs: hooks and wrappers are set when the trace begins and taken away when it ends.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.engine.step import TrainingStep

FIRST_STEPS = 3  # not traced: allocation, choice of algorithms
DATA, STEP, FORWARD, BACKWARD, OPTIMIZER = "data", "step", "forward", "backward", "optimizer"
PATHWAYS = ("slow", "fast", "audio")
log = logging.getLogger(__name__)


class StepTrace:
    """Traces a number of steps, once; without effect for 0.

    Args:
        steps: how many, `debug.profile_steps`.
        folder: where trace and table go, made if missing.
        device: of the model.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device) -> None:
        self._left, self._folder, self._on_gpu = steps, folder, device.type == "cuda"
        self._steps, self._seen, self._first = steps, 0, 0
        self._profiler: Any = None
        self._open: list[Any] = []
        self._undo: list[Callable[[], object]] = []

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Show a block in the trace; without effect while nothing is traced."""
        if self._profiler is None:
            yield
            return
        self._push(name)
        try:
            yield
        finally:
            self._pop()

    def before(self, step: int, model: nn.Module, take_step: Any) -> None:
        """Begin a step, and the trace where its turn has come.

        Args:
            step: its number.
            model: whose parts become ranges.
            take_step: takes the step; the halves of a `TrainingStep` become ranges, a CUDA graph's replay is one.
        """
        self._seen += 1
        if not self._left or self._profiler is not None or self._seen <= FIRST_STEPS or take_step.warming_up:
            return
        self._first = step
        self._mark_model(model)
        if isinstance(take_step, TrainingStep):
            self._wrap(take_step, "backward", BACKWARD)
            self._wrap(take_step, "update_weights", OPTIMIZER)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def after(self) -> None:
        """End a step; after the last one write the trace."""
        if self._profiler is None:
            return
        self._left -= 1
        if self._left == 0:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        profiler.stop()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        done, self._left = self._steps - self._left, 0
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._first + max(done, 1) - 1}.json"
        profiler.export_chrome_trace(str(path))
        text = range_table(profiler.events(), max(done, 1)) + "\n\n" + profiler.key_averages().table(row_limit=25)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        log.info("trace of %d steps: %s (chrome://tracing, ui.perfetto.dev), table: %s", done, path, path.stem + ".txt")

    def _push(self, name: str) -> None:
        if self._on_gpu:
            torch.cuda.nvtx.range_push(name)
        entered = record_function(f"avsf: {name}")
        entered.__enter__()
        self._open.append(entered)

    def _pop(self) -> None:
        self._open.pop().__exit__(None, None, None)
        if self._on_gpu:
            torch.cuda.nvtx.range_pop()

    def _mark_model(self, model: nn.Module) -> None:
        """Ranges around the forward pass and its pathways, fusion and head."""
        self._hook(model, FORWARD)
        for name in PATHWAYS:
            pathway = getattr(model, name, None)
            if pathway is not None:
                for part in (pathway, *pathway.stages.values()):
                    self._hook(part, f"{FORWARD}: {name}")
        for fusion in model.stages.values() if isinstance(getattr(model, "stages", None), nn.ModuleDict) else ():
            self._hook(fusion, f"{FORWARD}: fusion")
        if isinstance(getattr(model, "head", None), nn.Module):
            self._hook(model.head, f"{FORWARD}: head")

    def _hook(self, module: nn.Module, name: str) -> None:
        first = module.register_forward_pre_hook(lambda *_: self._push(name))
        last = module.register_forward_hook(lambda *_: self._pop())
        self._undo += [first.remove, last.remove]

    def _wrap(self, owner: Any, name: str, label: str) -> None:
        """Put a range around a method."""
        method = getattr(owner, name)

        def ranged(*arguments: Any, **named: Any) -> Any:
            """Call the method."""
            with self.range(label):
                return method(*arguments, **named)

        setattr(owner, name, ranged)
        self._undo.append(lambda: delattr(owner, name))


def range_table(events: Any, steps: int) -> str:
    """Return a table of the ranges: calls, host and device milliseconds of each step.

    Args:
        events: of a profiler.
        steps: that were traced.
    """
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in events:
        if event.name.startswith("avsf: ") and event.device_type == torch.autograd.DeviceType.CPU:
            row = rows[event.name.removeprefix("avsf: ")]
            row[0] += 1
            row[1] += event.cpu_time_total / 1e3
            row[2] += event.device_time_total / 1e3
    lines = [f"{'range':22} {'calls':>7} {'host ms':>10} {'device ms':>10}   of one step; ranges lie inside each other"]
    for name, (calls, host_ms, device_ms) in sorted(rows.items()):
        lines.append(f"{name:22} {calls / steps:7.1f} {host_ms / steps:10.3f} {device_ms / steps:10.3f}")
    return "\n".join(lines)
