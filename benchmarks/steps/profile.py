"""Where the time of one training step goes, by kind of work: `python -m benchmarks.step --profile --ways WAY`.

A step is recorded by torch.profiler and read from its trace. Launch by launch every kernel names the operation that
started it, so that the stems can be told from the other convolutions by the shape of their weights (seven rows).
A replayed graph has kernels only: its sequence is laid beside that of the step it was captured from for its kinds.
On the CPU the operations are the "kernels", each whole where those that it calls take less than half of its time.
"""

import difflib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps.measure import Job
from benchmarks.steps.ways import WAYS, synthetic_batch, trainee
from model.variants import VARIANTS

KINDS = (
    "stems",
    "convolutions",
    "BN family and laterals",
    "additions",
    "casts and copies",
    "small reductions",
    "memset",
    "optimizer",
    "other",
)
STEM_ROWS = 7  # height of a stem's kernel; no other convolution has it
# By the operation that launched the kernel; the first that matches. Then, without one, by the kernel's own name.
BY_OPERATION = (
    ("stems", r"avsf::.*stem"),
    (
        "BN family and laterals",
        r"avsf::(?!.*(cast|stem))|batch_norm|relu|threshold_backward|clamp_min|max_pool|aten::cat$",
    ),
    ("casts and copies", r"avsf::.*cast|aten::(copy_|_to_copy|clone|contiguous|_foreach_copy_|to)$"),
    ("convolutions", r"convolution|aten::(addmm|mm|linear|bmm)$"),
    ("optimizer", r"sgd|SGD|_foreach_|_amp_|lerp_|clip_grad"),
    ("memset", r"aten::(zero_|zeros|fill_|zeros_like)$"),
    ("additions", r"aten::(add|add_)$|AccumulateGrad|InputBuffer"),
    ("small reductions", r"aten::(sum|mean|_log_softmax|_softmax|nll_loss|amax|norm|linalg_vector_norm|avg_pool2d)"),
)
BY_KERNEL = (
    ("memset", r"^memset|fillfunctor"),
    ("stems", r"stem"),
    ("casts and copies", r"^memcpy|copy_kernel|copy_device_to_device|cast"),
    ("BN family and laterals", r"avsf|bn_|norm|lateral|frame_sum|running_stats|threshold|clamp|relu|max_pool|catarray"),
    ("optimizer", r"sgd|multi_tensor|foreach"),
    (
        "convolutions",
        r"xmma|cudnn|cutlass|convol|wgrad|dgrad|fprop|implicit_gemm|gemm|nvjet|nhwc|nchw|splitk|conv\dd",
    ),
    ("additions", r"cudafunctor_add|add_kernel|functor_add|binary_?internal.*add"),
    ("small reductions", r"reduce|softmax|nll_loss|avg_pool"),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch: microseconds, and the kind of work."""

    name: str
    begin_us: float
    length_us: float
    kind: str


def kind_of(kernel: str, operation: str | None, shapes: Sequence[Any] = ()) -> str:
    """One of `KINDS`.

    Args:
        kernel: its name.
        operation: that launched it, as the profiler names it; None where unknown.
        shapes: of the operation's inputs.
    """
    if operation is not None and "convolution" in operation:
        weight = shapes[2 if "backward" in operation else 1] if len(shapes) > 2 else []
        stem = isinstance(weight, list) and len(weight) in (4, 5) and weight[-2] == STEM_ROWS
        return "stems" if stem else "convolutions"
    if operation is not None:
        for kind, pattern in BY_OPERATION:
            if re.search(pattern, operation):
                return kind
    for kind, pattern in BY_KERNEL:
        if re.search(pattern, kernel.lower()):
            return kind
    return "other"


def read_trace(path: Path) -> list[Kernel]:
    """Kernels, copies and memsets of a trace of torch.profiler, by time.

    Args:
        path: of the JSON file that `export_chrome_trace` wrote.
    """
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    operations: dict[int, dict[str, Any]] = {}
    for event in events:
        identity = event.get("args", {}).get("External id")
        if event.get("cat") == "cpu_op" and identity is not None:
            operations[identity] = event
    found = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            operation = operations.get(event.get("args", {}).get("External id", -1), {})
            shapes = operation.get("args", {}).get("Input Dims", [])
            kind = kind_of(event["name"], operation.get("name"), shapes)
            found.append(Kernel(event["name"], float(event["ts"]), float(event["dur"]), kind))
    return sorted(found, key=lambda kernel: kernel.begin_us)


def lay_beside(replayed: Sequence[Kernel], launched: Sequence[Kernel]) -> list[Kernel]:
    """Kernels of a replay with the kinds of the launches that they were captured from, where their names agree."""
    matcher = difflib.SequenceMatcher(None, [k.name for k in replayed], [k.name for k in launched], autojunk=False)
    kinds = {}
    for block in matcher.get_matching_blocks():
        for step in range(block.size):
            kinds[block.a + step] = launched[block.b + step].kind
    return [replace(kernel, kind=kinds.get(index, kernel.kind)) for index, kernel in enumerate(replayed)]


def by_kind(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Launches and milliseconds by kind, and the time in which nothing ran ("idle") from the first to the last."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0, "ms": 0.0})
    busy_until = kernels[0].begin_us if kernels else 0.0
    idle_us = 0.0
    for kernel in kernels:
        table[kernel.kind]["launches"] += 1
        table[kernel.kind]["ms"] += kernel.length_us / 1e3
        idle_us += max(0.0, kernel.begin_us - busy_until)
        busy_until = max(busy_until, kernel.begin_us + kernel.length_us)
    found = {kind: table[kind] for kind in KINDS if kind in table}
    found["idle"] = {"launches": 0, "ms": idle_us / 1e3}
    return {kind: {"launches": int(row["launches"]), "ms": round(row["ms"], 3)} for kind, row in found.items()}


def record(step: Callable[[], Any], device: str) -> list[Kernel]:
    """Run one step under the profiler.

    Args:
        step: warmed up.
        device: "cuda", or "cpu", where the operations that call no other one are taken.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cpu":
        return _cpu_operations(profiler)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path)


def _cpu_operations(profiler: Any) -> list[Kernel]:
    """Operations that do their work themselves; the optimizer's, else of the kind of the innermost that says one."""
    found: list[Kernel] = []

    def take(event: Any, kinds: list[str]) -> None:
        """Take an operation, or those that it calls where they take most of its time."""
        length = event.time_range.end - event.time_range.start
        kinds = [kind_of("", event.name, event.input_shapes or []), *kinds]
        inside = sum(child.time_range.end - child.time_range.start for child in event.cpu_children)
        if event.cpu_children and (inside > length / 2 or not event.name.startswith(("aten::", "avsf::"))):
            for child in event.cpu_children:
                take(child, kinds)
            return
        said = [kind for kind in kinds if kind != "other"] or ["other"]
        kind = "optimizer" if "optimizer" in said else said[0]
        found.append(Kernel(event.name, event.time_range.start, length, kind))

    for event in profiler.events():
        if event.cpu_parent is None:
            take(event, [])
    return sorted(found, key=lambda kernel: kernel.begin_us)


def profile_job(job: Job) -> dict[str, Any]:
    """One step of a job, audio as its first word says, by kind.

    Args:
        job: what to run.

    Returns:
        a row: settings, `kinds` (launches and ms), the ten longest kernels, and `text` for a terminal.
    """
    config, way = VARIANTS[job.variant], WAYS[job.way]
    audio = job.audio[0] == "kept"
    cuda = job.device == "cuda"
    inputs = synthetic_batch(config, job.clips, job.pixels, job.device, torch.float16 if cuda else torch.float32)
    torch.backends.cudnn.benchmark = cuda
    with trainee(job.way, config, inputs, getattr(torch, job.dtype)) as made:
        step = made.stepper(audio)
        step()
        kernels = record(step, job.device)
        if way.graph:
            kernels = lay_beside(kernels, record(lambda: made.step(audio), job.device))
    kinds = by_kind(kernels)
    longest: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for kernel in kernels:
        entry = longest[kernel.kind, kernel.name[:120]]
        entry[0] += 1
        entry[1] += kernel.length_us / 1e3
    ranked = sorted(longest.items(), key=lambda item: -item[1][1])[:25]
    span = max((k.begin_us + k.length_us for k in kernels), default=0.0) - min(
        (k.begin_us for k in kernels), default=0.0
    )
    row = {
        "benchmark": "step profile",
        "variant": job.variant,
        "clips": job.clips,
        "way": job.way,
        "pixels": job.pixels,
        "dtype": job.dtype,
        "device": job.device,
        "audio": job.audio[0],
        "span_ms": round(span / 1e3, 3),
        "kinds": kinds,
        "longest": [
            {"kind": kind, "kernel": name, "launches": int(count), "ms": round(ms, 3)}
            for (kind, name), (count, ms) in ranked
        ],
    }
    return row | {"text": profile_text(row)}


def profile_text(row: dict[str, Any]) -> str:
    """A row of `profile_job` for a terminal."""
    title = f"{row['variant']} N={row['clips']} {row['way']}, audio {row['audio']}: {row['span_ms']:.2f} ms"
    lines = [title, f"{'kind':26} {'launches':>8} {'ms':>9}"]
    for kind, found in row["kinds"].items():
        lines.append(f"{kind:26} {found['launches']:8d} {found['ms']:9.3f}")
    lines.append("longest:")
    for found in row["longest"][:10]:
        lines.append(f"  {found['ms']:8.3f} ms {found['launches']:5d} x {found['kind']}: {found['kernel'][:80]}")
    return "\n".join(lines)
