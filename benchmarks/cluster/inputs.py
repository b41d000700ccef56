"""What the model of `benchmarks.scaling` knows: each figure measured by this repository or cited, with its error.

Measured figures come from rows of `benchmarks/results`, the newest of each kind. Cited ones name their source; their
error is the distance to a second source, or to what the model makes of a published measurement (`PUBLISHED`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.report import OURS

MODEL = "avslowfast_r50_4x16"
SIZES = (8, 32)  # clips a GPU between which a step is taken as linear
STORE_SETTING = "H.264, CRF 23, GOP 12"  # what `experiments.prepare` makes
START_S = 19.4  # experiments/LOG.md, 50 seeded faults: fault to first new step, median
Row = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """One figure.

    Args:
        value: of it.
        unit: of the value.
        source: rows of this repository, or who published it.
        error: share by which it may be off; a statement, not a bound.
        measured: whether this repository measured it.
    """

    value: float
    unit: str
    source: str
    error: float
    measured: bool = False


@dataclass(frozen=True)
class Inputs:
    """Everything that the model takes; see `gather` for what each is."""

    step_fixed_ms: Input
    step_clip_ms: Input
    launch_ms: Input
    graph_s: Input
    restart_s: Input
    decode_cpu_ms: Input
    clip_kib: Input
    nvdec_clips_per_s: Input
    checkpoint_gb_per_s: Input
    nvlink_gb_per_s: Input
    nvlink_hop_us: Input
    nic_gb_per_s: Input
    net_hop_us: Input
    base_us: Input
    failures_per_gpu_day: Input
    node_kw: Input

    def lines(self) -> list[str]:
        """A line for each figure: name, value, error, source."""
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [
            f"{name:22} {one.value:12.5g} {one.unit:12} +-{100 * one.error:3.0f} %  "
            f"{'measured' if one.measured else 'cited':8} {one.source}"
            for name, one in rows
        ]


def cited() -> dict[str, Input]:
    """Figures that others published."""
    nccl = "NCCL src/graph/topo.h and tuning.cc (its own model)"
    return {
        "nvlink_gb_per_s": Input(
            18 * 20.6, "GB/s", f"{nccl}: 18 links of an H100 or H200; 370 by its maintainer, and up to 480 with NVLink "
            "SHARP (nccl-tests issue 212)", 0.25,
        ),
        "nvlink_hop_us": Input(1.2, "us", f"{nccl}: tree, LL128", 0.5),
        "nic_gb_per_s": Input(
            47.0, "GB/s", "nccl-tests issue 290 (maintainer): 46 to 48 of each 400 Gb/s InfiniBand NIC", 0.05
        ),
        "net_hop_us": Input(8.5, "us", f"{nccl}: tree, LL128; two nodes took 46 us (nccl issue 1244)", 0.3),
        "base_us": Input(4.4, "us", nccl, 0.5),
        "failures_per_gpu_day": Input(
            419 / (54 * 16384), "1/GPU/day", "Llama 3 405B: 419 unexpected interruptions in 54 days on 16 384 H100", 0.5
        ),
        "node_kw": Input(10.2, "kW", "DGX H100/H200 user guide: at most, 8 GPUs; cooling not in it", 0.3),
    }  # fmt: skip


def gather(rows: Sequence[Row], drop_rate: float = 0.8) -> Inputs:
    """Return the inputs from rows of result files and what is cited.

    Args:
        rows: of `benchmarks.report.all_rows`, oldest first.
        drop_rate: share of steps without audio (DropPathway).

    Raises:
        ValueError: no rows of a step, of a store or of a checkpoint.
    """
    fixed, slope, launch, graph_s, source = step_times(rows, drop_rate)
    store = _newest(rows, "storage", material="real clips", setting=STORE_SETTING)
    saved = _newest(rows, "scaling checkpoint")
    found = {
        "step_fixed_ms": Input(fixed, "ms", source, 0.1, True),
        "step_clip_ms": Input(slope, "ms", source, 0.05, True),
        "launch_ms": Input(launch, "ms", source, 0.5, True),
        "graph_s": Input(graph_s, "s", f"{source}: tuning and capture", 0.2, True),
        "restart_s": Input(START_S, "s", "experiments/LOG.md 2026-11-26: fault to first new step, on a CPU", 1.0, True),
        "decode_cpu_ms": Input(store["cpu_ms_per_clip"], "ms", _named(store, "real clips"), 0.3, True),
        "clip_kib": Input(store["kib_per_clip"], "KiB", _named(store, "real clips"), 0.5, True),
        "nvdec_clips_per_s": nvdec_beside_cpu(rows),
        "checkpoint_gb_per_s": Input(saved["gb_per_s"], "GB/s", _named(saved), 0.5, True),
    }
    return Inputs(**found, **cited())


def nvdec_beside_cpu(rows: Sequence[Row]) -> Input:
    """Clips per second that a GPU's NVDEC adds where the CPU's cores are full: the loader with both less without it."""
    found = {
        row["decoder"]: row
        for row in rows
        if row["benchmark"] == "loader" and row.get("what") == "all" and row["machine"].get("gpu")
    }
    if not {"auto", "cpu"} <= found.keys() or found["auto"]["commit"] != found["cpu"]["commit"]:
        return Input(0.0, "clips/s", "unmeasured: no rows of the loader with and without it, so it counts as none", 0.0)
    both, alone = found["auto"], found["cpu"]
    more = max(0.0, both["clips_per_second"] - alone["clips_per_second"])
    source = f"{_named(both)}: {both['clips_per_second']:.0f} with both, {alone['clips_per_second']:.0f} without NVDEC"
    return Input(more, "clips/s", source, 1.0, True)


def step_times(rows: Sequence[Row], drop_rate: float) -> tuple[float, float, float, float, str]:
    """Fixed ms, ms a clip, host's ms, seconds until the graph is there, and where they come from.

    Raises:
        ValueError: a size without a measured step.
    """
    mean: dict[int, float] = {}
    launch = setup = 0.0
    names: list[str] = []
    for clips in SIZES:
        kept, dropped = (_step(rows, clips, audio) for audio in ("kept", "dropped"))
        mean[clips] = (1 - drop_rate) * kept["ms"] + drop_rate * dropped["ms"]
        launch, setup = max(launch, kept["host_ms"]), max(setup, kept["setup_s"])
        names.append(f"N={clips} at {kept['commit']}")
    low, high = SIZES
    slope = (mean[high] - mean[low]) / (high - low)
    source = f"{kept['file']}, {kept['machine']['gpu']}, {', '.join(names)}"
    return max(0.0, mean[low] - low * slope), slope, launch, setup, source


def _step(rows: Iterable[Row], clips: int, audio: str) -> Row:
    found = [
        row
        for row in rows
        if row["benchmark"] == "step" and "ms" in row and row["device"] == "cuda"
        and (row["variant"], row["way"], row["clips"], row["audio"], row["pixels"]) == (MODEL, OURS, clips, audio, 224)
    ]  # fmt: skip
    if not found:
        raise ValueError(f"benchmarks/results must hold a step of {MODEL}, {clips} clips, audio {audio}, on a GPU")
    return found[-1]


def _newest(rows: Iterable[Row], benchmark: str, **wanted: str) -> Row:
    found = [row for row in rows if row["benchmark"] == benchmark and wanted.items() <= row.items()]
    if not found:
        raise ValueError(f"benchmarks/results must hold a row of {benchmark!r} {wanted or ''}; run its benchmark")
    return found[-1]


def _named(row: Row, what: str = "") -> str:
    return ", ".join(part for part in (row["file"], what, f"commit {row['commit']}") if part)


@dataclass(frozen=True)
class Published:
    """A training that others measured on one GPU and on eight.

    Args:
        name: machine and precision.
        one: images per second on one GPU.
        eight: on eight.
        batch: images a GPU in a step.
        bus_gb_per_s: of the GPUs' links together, as all-reduce sees them.
    """

    name: str
    one: float
    eight: float
    batch: int
    bus_gb_per_s: float


PUBLISHED_ERROR = 0.20  # the model knows nothing of input that eight GPUs share, nor of the slowest of eight
PUBLISHED_SOURCE = (
    "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5 (commit 291f0d02), training performance, container 21.03"
)
RESNET50_BYTES = 4 * 25.557e6
_A100, _V100 = 12 * 20.0, 6 * 20.0  # links of topo.h; NCCL's tuning caps an A100 at 235
PUBLISHED = (
    Published("DGX A100 80GB, TF32", 938, 7248, 256, min(235.0, _A100)),
    Published("DGX A100 80GB, mixed", 2470, 16621, 256, min(235.0, _A100)),
    Published("DGX-1 V100 16GB, FP32", 367, 2855, 128, _V100),
    Published("DGX-1 V100 16GB, mixed", 1200, 8322, 256, _V100),
    Published("DGX-1 V100 32GB, FP32", 356, 2766, 128, _V100),
    Published("DGX-1 V100 32GB, mixed", 1156, 8056, 256, _V100),
)
