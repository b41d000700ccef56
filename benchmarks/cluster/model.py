"""How fast a training is on a cluster, what binds it, and what it costs: pure functions of `Inputs`.

A GPU's step is a fixed part and a part for each clip (both measured; the host's launches where they are longer), then
one all-reduce of the gradients in the open, as training with CUDA graphs does it. Data come side by side with it: from
CPU cores and NVDEC together, through the node's link to storage and what the storage gives to all. The rate is the
least of these; checkpoints, failures and restarts take their share of it.
"""

import math
from dataclasses import dataclass, replace

from benchmarks.cluster.inputs import RESNET50_BYTES, Inputs, Published

DAY_S = 86400.0
STEP, REDUCE, DECODING = "GPU step", "all-reduce", "decoding"
ARITHMETIC, FIXED, LAUNCHES = "GPU arithmetic", "fixed part of a step", "host launches"
NODE_STORAGE, SHARED_STORAGE = "storage link of a node", "shared storage"
LONE_CLIPS = 32  # a step of a GPU that efficiency is compared with
RESERVED_CORES = 1.0  # of a GPU: its training thread


@dataclass(frozen=True)
class Cluster:
    """Machines.

    Args:
        nodes: at least 1.
        gpus_per_node: at least 1.
        cores_per_node: CPU cores of a node; 14 a GPU are those of a DGX H100.
        nics_per_node: InfiniBand of 400 Gb/s.
        storage_node_gb_per_s: what a node can read.
        storage_total_gb_per_s: what all nodes together can read.
        network_factor: speed of the NICs against 400 Gb/s.
    """

    nodes: int
    gpus_per_node: int = 8
    cores_per_node: float = 112
    nics_per_node: int = 8
    storage_node_gb_per_s: float = 40.0
    storage_total_gb_per_s: float = math.inf
    network_factor: float = 1.0

    def __post_init__(self) -> None:
        if min(self.nodes, self.gpus_per_node, self.nics_per_node) < 1:
            raise ValueError(
                f"nodes ({self.nodes}), GPUs ({self.gpus_per_node}) and NICs ({self.nics_per_node}) of a node must be "
                "at least 1"
            )
        if self.cores_per_node <= RESERVED_CORES * self.gpus_per_node:
            raise ValueError(
                f"cores of a node ({self.cores_per_node:g}) must be more than its GPUs ({self.gpus_per_node}): each "
                "has a training thread; give --cores-per-node"
            )
        if min(self.storage_node_gb_per_s, self.storage_total_gb_per_s, self.network_factor) <= 0:
            raise ValueError("bandwidths of storage and network must be more than 0")

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Load:
    """What a training asks for.

    Args:
        clips_per_gpu: of a step.
        parameters: of the model.
        step_factor: multiply-adds of a clip against the measured model's.
        depth_factor: blocks against the measured model's; the fixed part of a step follows them.
        checkpoint_steps: from one checkpoint to the next; 0 = none.
        hang_s: until a rank that hangs is found (`runtime.collective_timeout_s`).
        window_factor: frames that a clip spans against the measured 64; decoding and bytes follow them. 0 = the model
            takes no pictures: what reading sound alone costs is not known, and the data limit nothing.
    """

    clips_per_gpu: int
    parameters: float
    step_factor: float = 1.0
    depth_factor: float = 1.0
    checkpoint_steps: int = 1000
    hang_s: float = 180.0
    window_factor: float = 1.0

    @property
    def gradient_bytes(self) -> float:
        """Of one all-reduce: float32."""
        return 4 * self.parameters

    @property
    def checkpoint_bytes(self) -> float:
        """Weights and momentum."""
        return 8 * self.parameters


@dataclass(frozen=True)
class Estimate:
    """What is expected.

    Args:
        clips_per_s: with everything in it.
        binding: what must become faster.
        limits: clips/s that each resource allows, least first.
        step_ms: of a GPU with its all-reduce, were the data always there.
        parts_ms: of it, by name.
        waiting_share: of the time that GPUs wait for data.
        lost_share: of the time that goes to checkpoints, failures and restarts.
        failures_per_day: of the whole cluster.
        interval_s: from one checkpoint to the next.
        efficiency: clips_per_s against as many lone GPUs with `LONE_CLIPS` a step.
    """

    clips_per_s: float
    binding: str
    limits: dict[str, float]
    step_ms: float
    parts_ms: dict[str, float]
    waiting_share: float
    lost_share: float
    failures_per_day: float
    interval_s: float
    efficiency: float


def all_reduce_ms(inputs: Inputs, cluster: Cluster, size_bytes: float) -> float:
    """Milliseconds of a sum over all GPUs: latency of a tree, then bytes at the slower of NVLink and the NICs.

    Args:
        inputs: links.
        cluster: machines.
        size_bytes: of one GPU's part.
    """
    ranks = cluster.gpus
    if ranks == 1:
        return 0.0
    inside, between = cluster.gpus_per_node - 1, math.log2(cluster.nodes)
    hops = inside * inputs.nvlink_hop_us.value + between * inputs.net_hop_us.value
    bus = inputs.nvlink_gb_per_s.value if inside else math.inf
    if cluster.nodes > 1:
        bus = min(bus, cluster.nics_per_node * inputs.nic_gb_per_s.value * cluster.network_factor)
    return (inputs.base_us.value + 2 * hops) / 1e3 + 2 * (ranks - 1) / ranks * size_bytes / (bus * 1e6)


def step_parts(inputs: Inputs, load: Load) -> dict[str, float]:
    """Milliseconds of a lone GPU's step: its fixed part and its clips, or the host's launches where they are longer."""
    fixed = inputs.step_fixed_ms.value * load.depth_factor
    clips = inputs.step_clip_ms.value * load.step_factor * load.clips_per_gpu
    launches = inputs.launch_ms.value * load.depth_factor
    return {LAUNCHES: launches} if launches > fixed + clips else {ARITHMETIC: clips, FIXED: fixed}


def estimate(inputs: Inputs, cluster: Cluster, load: Load) -> Estimate:
    """Return what a training makes of a cluster."""
    parts = step_parts(inputs, load)
    parts = {**parts, REDUCE: all_reduce_ms(inputs, cluster, load.gradient_bytes)}
    step_ms, clips = sum(parts.values()), cluster.gpus * load.clips_per_gpu
    limits = {STEP: 1e3 * clips / step_ms, **data_limits(inputs, cluster, load)}
    limits = dict(sorted(limits.items(), key=lambda item: item[1]))
    rate, least = min(limits.values()), next(iter(limits))
    failures = inputs.failures_per_gpu_day.value * cluster.gpus
    lost = lost_share(inputs, load, clips / rate, failures)
    return Estimate(
        clips_per_s=rate * (1 - lost),
        binding=max(parts, key=lambda name: parts[name]) if least == STEP else least,
        limits=limits,
        step_ms=step_ms,
        parts_ms=parts,
        waiting_share=max(0.0, 1 - rate / limits[STEP]),
        lost_share=lost,
        failures_per_day=failures,
        interval_s=load.checkpoint_steps * clips / rate,
        efficiency=rate * (1 - lost) / (cluster.gpus * lone_rate(inputs, load)),
    )


def lone_rate(inputs: Inputs, load: Load) -> float:
    """Clips per second of one GPU with `LONE_CLIPS` a step, alone and with its data there."""
    return 1e3 * LONE_CLIPS / sum(step_parts(inputs, replace(load, clips_per_gpu=LONE_CLIPS)).values())


def data_limits(inputs: Inputs, cluster: Cluster, load: Load) -> dict[str, float]:
    """Clips per second that the ways of the data allow on all nodes together; empty for a model without pictures."""
    if load.window_factor == 0:
        return {}
    cores = cluster.cores_per_node - RESERVED_CORES * cluster.gpus_per_node
    node = 1e3 * cores / inputs.decode_cpu_ms.value + cluster.gpus_per_node * inputs.nvdec_clips_per_s.value
    node /= load.window_factor
    clip_gb = load.window_factor * inputs.clip_kib.value * 1024 / 1e9
    found = {
        DECODING: cluster.nodes * node,
        NODE_STORAGE: cluster.nodes * cluster.storage_node_gb_per_s / clip_gb,
        SHARED_STORAGE: cluster.storage_total_gb_per_s / clip_gb,
    }
    return {name: rate for name, rate in found.items() if math.isfinite(rate)}


def lost_share(inputs: Inputs, load: Load, step_s: float, failures_per_day: float) -> float:
    """Share of the time without training: checkpoints; for a failure to find it, to start, to redo half an interval.

    Raises:
        ValueError: nothing would be left.
    """
    saving_s = load.checkpoint_bytes / 1e9 / inputs.checkpoint_gb_per_s.value if load.checkpoint_steps else 0.0
    interval_s = load.checkpoint_steps * step_s + saving_s
    saving = saving_s / interval_s if interval_s else 0.0
    each_s = load.hang_s + inputs.restart_s.value + inputs.graph_s.value + interval_s / 2
    failing = failures_per_day * each_s / DAY_S
    if saving + failing >= 1:
        raise ValueError(f"{failures_per_day:.1f} failures a day of {each_s:.0f} s each leave no time to train")
    return saving + failing


def predicted_eight(one: Published, inputs: Inputs) -> float:
    """Images per second that the model expects of eight GPUs of a published training, from the one-GPU figure."""
    links = replace(inputs, nvlink_gb_per_s=replace(inputs.nvlink_gb_per_s, value=one.bus_gb_per_s))
    reduce_ms = all_reduce_ms(links, Cluster(1, 8), RESNET50_BYTES)
    return 8e3 * one.batch / (1e3 * one.batch / one.one + reduce_ms)


@dataclass(frozen=True)
class Purchase:
    """Something to buy: what, the rate with it, and its ratio to now."""

    what: str
    clips_per_s: float
    gain: float


def purchases(inputs: Inputs, cluster: Cluster, load: Load, *, fixed_total: bool) -> list[Purchase]:
    """Return what twice of each resource brings, the largest gain first.

    Args:
        inputs: figures.
        cluster: as it is.
        load: of the training.
        fixed_total: whether clips a step are those of all GPUs: twice the nodes then halve those of a GPU.
    """
    now = estimate(inputs, cluster, load).clips_per_s
    more = replace(cluster, nodes=2 * cluster.nodes)
    halved = replace(load, clips_per_gpu=max(1, load.clips_per_gpu // 2)) if fixed_total else load
    options = {
        "twice the CPU cores in each node": (replace(cluster, cores_per_node=2 * cluster.cores_per_node), load),
        "twice the network between nodes": (replace(cluster, network_factor=2 * cluster.network_factor), load),
        "twice the storage": (
            replace(
                cluster,
                storage_node_gb_per_s=2 * cluster.storage_node_gb_per_s,
                storage_total_gb_per_s=2 * cluster.storage_total_gb_per_s,
            ),
            load,
        ),
    }
    if not (fixed_total and load.clips_per_gpu < 2):
        options["twice the nodes"] = (more, halved)
    found = [(what, estimate(inputs, *given).clips_per_s) for what, given in options.items()]
    made = [Purchase(what, rate, rate / now) for what, rate in found]
    return sorted(made, key=lambda one: -one.gain)


@dataclass(frozen=True)
class RankCost:
    """A step of one process on a CPU, and an exchange between two: wall or CPU time.

    Args:
        fixed_ms: milliseconds of a step whatever its clips.
        clip_ms: of each clip.
        exchange_fixed_ms: milliseconds of a rank in the exchanges of a step of two ranks, for no bytes.
        exchange_byte_ms: more for each byte.
        size_bytes: of the gradients.
    """

    fixed_ms: float
    clip_ms: float
    exchange_fixed_ms: float
    exchange_byte_ms: float
    size_bytes: float


def rank_step_ms(cost: RankCost, ranks: int, clips: int, cores: float) -> float:
    """Milliseconds of a step of several one-thread processes that share cores, as gloo runs them on one machine.

    Args:
        cost: measured with one process, and with two for the exchange.
        ranks: processes.
        clips: of each in a step.
        cores: free for them.
    """
    compute = cost.fixed_ms + cost.clip_ms * clips
    exchange = 0.0
    if ranks > 1:  # a ring: 2 (R - 1) messages of a part of the bytes; measured at R = 2
        exchange = (
            cost.exchange_fixed_ms * (ranks - 1) + cost.exchange_byte_ms * cost.size_bytes * 2 * (ranks - 1) / ranks
        )
    return (compute + exchange) * max(1.0, ranks / cores)
