"""What `benchmarks.scaling` prints and draws: the plan of a recipe, the table of sizes, the checks, the picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cluster.inputs import MODEL, PUBLISHED, PUBLISHED_ERROR, PUBLISHED_SOURCE, Inputs
from benchmarks.cluster.model import (
    DAY_S,
    DECODING,
    LONE_CLIPS,
    NODE_STORAGE,
    SHARED_STORAGE,
    STEP,
    Cluster,
    Estimate,
    Load,
    Purchase,
    data_limits,
    estimate,
    lone_rate,
    predicted_eight,
    purchases,
)
from experiments.config import Config
from experiments.engine.data import clips_per_rank
from model.config import STAGE_BLOCKS, ModelConfig
from model.flops import Cost, count
from model.variants import VARIANTS

MANY_LOST = 0.03  # share of the time from which checkpoints are worth a line
HEADROOM = 1.6  # of the picture above the rate of a lone GPU
WORTH = 1.05  # gain from which a purchase is named
LABEL_CLIPS = {"kinetics400": 240_258, "kinetics600": 392_622, "kinetics_sounds": 19_000}  # training clips, by folder
SIZES = tuple(2**n for n in range(3, 11))  # GPUs
WINDOW_FRAMES = 64  # that the measured clips span
OTHER_VARIANT_ERROR = 0.3  # of a step that is scaled by multiply-adds


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Args:
        name: of the recipe.
        cluster: machines.
        load: of a GPU.
        found: what is expected.
        clips: of the whole training.
        days: of it.
        kwh: at most what the machines take.
        buy: what twice of each resource brings.
        scaled: whether the step was not measured but scaled from the measured model's.
        is_frozen: whether only the classifier learns.
    """

    name: str
    cluster: Cluster
    load: Load
    found: Estimate
    clips: float
    days: float
    kwh: float
    buy: tuple[Purchase, ...]
    scaled: bool
    is_frozen: bool = False


def load_of(config: Config, clips_per_gpu: int) -> Load:
    """Return what a step of a recipe's model asks for."""
    size = config.data.crop_size_px
    keys = {field.name: getattr(config.model, field.name) for field in fields(ModelConfig)}
    own = ModelConfig(**keys | {"num_classes": config.model.num_classes or 400})  # 0: of the data, not looked at
    base, cost = _cost(VARIANTS[MODEL], 224), _cost(own, size)
    return Load(
        clips_per_gpu=clips_per_gpu,
        parameters=1e6 * cost.params_m,
        step_factor=cost.gmacs / base.gmacs,
        depth_factor=_blocks(own) / _blocks(VARIANTS[MODEL]),
        checkpoint_steps=config.checkpoint.interval_steps,
        hang_s=config.runtime.collective_timeout_s,
        window_factor=own.num_frames * own.frame_stride / WINDOW_FRAMES if own.has_visual else 0.0,
    )


@cache
def _cost(config: ModelConfig, size_px: int) -> Cost:
    return count(config, size_px, size_px)


def _blocks(config: ModelConfig) -> float:
    """Residual blocks of all pathways: what the number of launches follows."""
    return float(sum(STAGE_BLOCKS[config.depth]) * len(config.pathways))


def make_plan(config: Config, cluster: Cluster, inputs: Inputs, samples: int) -> Plan:
    """Return the plan of a recipe.

    Args:
        config: of the recipe.
        cluster: machines.
        inputs: figures.
        samples: training clips of the data; 0 = those of a known data set.

    Raises:
        ValueError: clips a step that the GPUs cannot share, data of unknown size.
    """
    load = load_of(config, clips_per_rank(config, cluster.gpus))
    found = estimate(inputs, cluster, load)
    samples = samples or LABEL_CLIPS.get(Path(config.data.path).name, 0)
    if not samples and not config.train.steps:
        raise ValueError(
            f"data.path ({config.data.path}) must end in the name of a known data set ({', '.join(LABEL_CLIPS)}), or "
            "--samples N give the number of training clips"
        )
    steps = config.train.total_steps(samples)
    clips = float(steps) * config.train.clips_per_step
    seconds = clips / found.clips_per_s
    buy = tuple(purchases(inputs, cluster, load, fixed_total=True))
    kilowatts = inputs.node_kw.value * cluster.nodes * cluster.gpus_per_node / 8
    scaled = (load.step_factor, load.depth_factor) != (1.0, 1.0)
    return Plan(
        config.name,
        cluster,
        load,
        found,
        clips,
        seconds / DAY_S,
        kilowatts * seconds / 3600,
        buy,
        scaled,
        is_frozen=config.model.freeze != "none",
    )


def _time(days: float) -> str:
    """Return a time in days, hours or minutes: the largest of which there are two."""
    for unit, size in (("days", 1.0), ("hours", 24.0)):
        if days * size >= 2:
            return f"{days * size:.1f} {unit}"
    return f"{days * 24 * 60:.0f} minutes"


def plan_text(plan: Plan) -> str:
    """Return a plan for a terminal; its last lines are for people in a hurry."""
    found, load, cluster = plan.found, plan.load, plan.cluster
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in found.parts_ms.items())
    lines = [
        f"{plan.name}: {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs, {load.clips_per_gpu} clips a GPU and step",
        f"step {found.step_ms:.1f} ms: {parts}",
        "allowed, clips/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in found.limits.items()),
        f"lost to checkpoints and {found.failures_per_day:.2g} failures a day: {100 * found.lost_share:.1f} %",
        f"efficiency against lone GPUs with {LONE_CLIPS} clips a step: {100 * found.efficiency:.0f} %",
    ]
    if plan.scaled:
        lines.append(
            f"note: the step is that of {MODEL} by multiply-adds and depth (+-{100 * OTHER_VARIANT_ERROR:.0f} %)"
        )
    if plan.is_frozen:
        lines.append("note: model.freeze leaves most of the backward pass and of the all-reduce out, which are counted")
    if load.window_factor == 0:
        lines.append("note: what reading sound alone costs was not measured: the data limit nothing here")
    elif load.window_factor != 1:
        lines.append(
            f"note: decoding and bytes of a clip are {load.window_factor:.3g} times those measured, as its frames"
        )
    if load.clips_per_gpu < 8:
        lines.append(
            "note: steps of fewer than 8 clips a GPU were not measured; the line through 8 and 32 is continued"
        )
    if found.lost_share > MANY_LOST and load.checkpoint_steps:
        lines.append(
            f"note: a checkpoint every {load.checkpoint_steps} steps is one every {found.interval_s:.0f} s: "
            f"checkpoint.interval_steps={10 * load.checkpoint_steps} takes less"
        )
    lines += [f"{one.what:34} {one.clips_per_s:12,.0f} clips/s {one.gain:5.2f}x" for one in plan.buy]
    return "\n".join([*lines, "", summary(plan)])


def summary(plan: Plan) -> str:
    """Return rate, days, energy, what binds and what to buy, in three lines."""
    found, best = plan.found, plan.buy[0]
    waits = f"; GPUs wait {100 * found.waiting_share:.0f} % of the time" if found.waiting_share > 0.005 else ""
    cheap = [one for one in plan.buy if one.what != "twice the nodes" and one.gain >= WORTH]
    buy = cheap[0] if cheap else best
    advice = (
        f"Buy next: {buy.what}, {buy.gain:.2f}x."
        if buy.gain >= WORTH
        else f"Nothing to buy brings {100 * (WORTH - 1):.0f} %: more clips a step would use these GPUs better."
    )
    return (
        f"{found.clips_per_s:,.0f} clips/s: {_time(plan.days)}, "
        f"{plan.kwh:,.{1 if plan.kwh < 10 else 0}f} kWh at most; "
        "evaluation is not in it.\n"
        f"BOUND BY {found.binding}{waits}.\n{advice}"
    )


def size_table(inputs: Inputs, load: Load, total: int, cluster: Cluster) -> str:
    """Return rates from 8 to 1 024 GPUs: with the same clips a GPU, and with the same clips a step."""
    head = f"{'GPUs':>5} {'clips/s, ' + str(load.clips_per_gpu) + ' a GPU':>20} {'eff.':>5}  {'bound by':22}"
    lines = [f"{head} {'clips/s, ' + str(total) + ' a step':>21} {'eff.':>5}  bound by"]
    for gpus in SIZES:
        here = _of_size(cluster, gpus)
        weak = estimate(inputs, here, load)
        strong = estimate(inputs, here, replace(load, clips_per_gpu=max(1, total // gpus)))
        lines.append(
            f"{gpus:5d} {weak.clips_per_s:20,.0f} {100 * weak.efficiency:4.0f}%  {weak.binding:22} "
            f"{strong.clips_per_s:21,.0f} {100 * strong.efficiency:4.0f}%  {strong.binding}"
        )
    return "\n".join(lines)


def _of_size(cluster: Cluster, gpus: int) -> Cluster:
    """Nodes like those of a cluster with so many GPUs in all; a part of a node where it has more."""
    share = min(1.0, gpus / cluster.gpus_per_node)
    return replace(
        cluster,
        nodes=max(1, gpus // cluster.gpus_per_node),
        gpus_per_node=min(gpus, cluster.gpus_per_node),
        cores_per_node=share * cluster.cores_per_node,
    )


def published_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """Return the published figures on eight GPUs beside the model's."""
    return [
        {"name": one.name, "published": one.eight, "predicted": round(predicted_eight(one, inputs), 1),
         "error": round(predicted_eight(one, inputs) / one.eight - 1, 4)}
        for one in PUBLISHED
    ]  # fmt: skip


def published_text(inputs: Inputs) -> str:
    """Return the same for a terminal."""
    lines = [f"{'eight GPUs, images/s':26} {'published':>10} {'model':>10} {'error':>7}"]
    for row in published_rows(inputs):
        lines.append(
            f"{row['name']:26} {row['published']:10,.0f} {row['predicted']:10,.0f} {100 * row['error']:+6.1f}%"
        )
    lines.append(f"stated: up to +{100 * PUBLISHED_ERROR:.0f} %. {PUBLISHED_SOURCE}")
    return "\n".join(lines)


def runs_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return runs over gloo for a terminal."""
    head = f"{'processes':>9} {'clips each':>10} {'clips/s':>8} {'step ms':>9} {'model ms':>9} {'error':>7}"
    lines = [f"{head} {'CPU ms':>8} {'model':>8} {'error':>7} {'others, cores':>13} weights"]
    for row in rows:
        apart = row.get("weights_difference")
        text = "" if apart is None else f"{apart:.1e} from one process"
        if row.get("ranks_equal") is False:
            text += ", RANKS DIFFER"
        lines.append(
            f"{row['ranks']:9d} {row['clips']:10d} {row['clips_per_s']:8.1f} {row['mean_ms']:9.1f} "
            f"{row['predicted_ms']:9.1f} {100 * row['error']:+6.1f}% "
            f"{row['cpu_ms']:8.1f} {row['predicted_cpu_ms']:8.1f} {100 * row['cpu_error']:+6.1f}% "
            f"{row['foreign_cores']:13.2f} {text}"
        )
    return "\n".join(lines)


def draw(inputs: Inputs, load: Load, total: int, cluster: Cluster, path: Path) -> None:
    """Draw what each resource allows from 8 to 1 024 GPUs, and where it binds.

    Args:
        inputs: figures.
        load: the same clips a GPU (left).
        total: the same clips a step (right).
        cluster: a node of it, and the storage that all share.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    clusters = [_of_size(cluster, gpus) for gpus in SIZES]
    top = HEADROOM * lone_rate(inputs, load)
    colours = {STEP: "tab:blue", DECODING: "tab:green", NODE_STORAGE: "tab:purple", SHARED_STORAGE: "tab:red"}
    for axes, title, loads in (
        (left, f"{load.clips_per_gpu} clips a GPU and step", [load] * len(SIZES)),
        (right, f"{total} clips a step", [replace(load, clips_per_gpu=max(1, total // gpus)) for gpus in SIZES]),
    ):
        found = [estimate(inputs, here, one) for here, one in zip(clusters, loads, strict=True)]
        for name, colour in colours.items():
            rates = [one.limits.get(name, math.nan) / gpus for one, gpus in zip(found, SIZES, strict=True)]
            if not all(math.isnan(rate) for rate in rates):
                beyond = " (above the picture)" if min(rates) > top else ""
                axes.plot(SIZES, rates, color=colour, marker=".", label=f"{name} allows{beyond}")
        axes.axhline(lone_rate(inputs, load), color="gray", linestyle="--", label=f"lone GPU, {LONE_CLIPS} clips")
        expected = [one.clips_per_s / gpus for one, gpus in zip(found, SIZES, strict=True)]
        axes.plot(SIZES, expected, color="black", linewidth=2.5, label="expected")
        axes.set(xscale="log", ylim=(0, top), xlabel="GPUs", title=f"{title}: what binds")
        for number, (gpus, one) in enumerate(zip(SIZES, found, strict=True)):
            if number == 0 or one.binding != found[number - 1].binding:
                _label(axes, f"from {gpus} GPUs:\n{one.binding}", gpus, expected[number], number)
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_ylabel("clips/s of each GPU")
    left.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def _label(axes: Any, text: str, x: float, y: float, number: int) -> None:
    """Write below a point, every other one lower; above it where there is no room."""
    low = y < axes.get_ylim()[1] / 3
    axes.annotate(
        text, (x, y), xytext=(10, 40) if low else (4, -64 - 34 * (number % 2)), textcoords="offset points", fontsize=8,
        ha="left" if low or x <= SIZES[4] else "right", arrowprops={"arrowstyle": "-", "color": "black"},
    )  # fmt: skip


__all__ = [
    "Plan", "data_limits", "draw", "load_of", "make_plan", "plan_text", "published_rows", "published_text",
    "runs_text", "size_table", "summary",
]  # fmt: skip
