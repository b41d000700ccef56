"""What `benchmarks.bottleneck` says of what it measured: what-ifs, fixes, a table, ten seconds of text, a picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.stages.measure import (
    AUDIO,
    COPY,
    DECODE,
    GPU,
    LAUNCH,
    LOG_MEL,
    MODEL,
    NETWORK,
    READERS,
    RESIZE,
    STORAGE,
    Measured,
)
from benchmarks.stages.model import (
    CORES,
    TIE,
    Change,
    Pipeline,
    Prediction,
    Verdict,
    ceiling,
    crowded,
    frames_decoded,
    limits,
    predictions,
    verdict,
)
from benchmarks.stages.nvdec import NVDEC
from experiments.config import Config

NOT_ON_HOST = (GPU, COPY, NETWORK, NVDEC)
VERIFIABLE = ("workers", "gop", "data", "audio", "batch", "cuda_graph")
OF_DATA = (STORAGE, DECODE, NVDEC, AUDIO, LOG_MEL, RESIZE)  # stages that another store changes
DISTURBED = 0.1  # share of time in which the training thread waits for a core, from which a warning is given
WAITS = 0.5  # share of CPU time in a stage of the host from which it computes rather than waits
WAITING = 0.05  # share of data wait up to which the input is said to keep up


def what_ifs(config: Config, measured: Measured, *, on_gpu: bool, graph_is_off: bool) -> list[Change]:
    """Return the changes that are predicted.

    Args:
        config: of the training.
        measured: its stages.
        on_gpu: whether the model computes on a GPU.
        graph_is_off: whether `runtime.cuda_graph: off` alone keeps the step from being a CUDA graph.
    """
    readers = measured.servers.get(READERS, 1)
    key = "data.num_workers" if config.data.num_workers != 0 else "data.num_threads"
    more = max(1, readers // 2)
    found = [Change("workers", {}, {READERS: more}, f"{key}={readers + more}")]
    if measured.gop >= 2:
        found.append(gop_change(measured, max(1, round(measured.gop / 2))))
    smaller = size_change(config, measured)
    found += [smaller] if smaller else []
    found.append(Change("audio", {AUDIO: 0.0, LOG_MEL: 0.0}, {}, "a variant without audio (python -m model)"))
    found.append(
        Change(
            "cached", {STORAGE: 0.5, DECODE: 0.5, NVDEC: 0.5}, {}, "half of the decoded clips in memory: no setting yet"
        )
    )
    batch = batch_factors(measured)
    if batch:
        found.append(
            Change("batch", batch, {}, f"train.clips_per_step={2 * config.train.clips_per_step}, and optim.lr")
        )
    if on_gpu and graph_is_off:
        found.append(Change("cuda_graph", {LAUNCH: 0.05}, {}, "runtime.cuda_graph=auto"))
    return found


def gop_change(measured: Measured, gop: float) -> Change:
    """Return the what-if of other frames from key frame to key frame."""
    share = frames_decoded(measured.window, gop) / frames_decoded(measured.window, measured.gop)
    fix = f"prepare the data again with --gop {gop:.0f}"
    return Change("gop", {DECODE: share, NVDEC: share, STORAGE: share}, {}, fix)


def size_change(config: Config, measured: Measured) -> Change | None:
    """Return the what-if of stored pictures as small as the largest crop is scaled to; None where they are."""
    wanted = config.data.jitter_max_px
    if measured.short_side_px <= wanted:
        return None
    share = (wanted / measured.short_side_px) ** 2
    factors = {STORAGE: share, DECODE: share, NVDEC: share}
    return Change("size", factors, {}, f"prepare the data again with --short-side {wanted}")


def data_change(measured: Measured, other: Measured, path: str) -> Change:
    """Return the what-if of another store (codec, GOP, size), by its own stage times.

    Args:
        measured: stages with the data as they are.
        other: stages of the data alone with the other store.
        path: of that store.
    """
    theirs = {stage.name: stage.ms for stage in other.stages}
    factors = {  # what the other data do not have as a stage (reading, where a decoder reads by itself) is gone
        stage.name: theirs.get(stage.name, 0.0) / stage.ms
        for stage in measured.stages
        if stage.name in OF_DATA and stage.ms > 0 and theirs
    }
    return Change("data", factors, {}, f"data.path={path}")


def batch_factors(measured: Measured) -> dict[str, float]:
    """Factors of launches and model at twice the batch: a step costs a fixed part and a part for each clip."""
    factors = {}
    for name, half_ms in measured.half_batch_ms.items():
        now = next(stage.ms for stage in measured.stages if stage.name == name)
        # Half: f / (n/2) + v, whole: f / n + v. On a busy machine the difference may be more than the whole.
        fixed = min(max(0.0, half_ms - now), now) * measured.clips
        factors[name] = (now - fixed / (2 * measured.clips)) / now if now > 0 else 1.0
    return factors


def pipeline_of(measured: Measured) -> Pipeline:
    """Return the stages as the model of `stages.model` takes them."""
    return Pipeline(tuple(measured.stages), measured.servers, measured.cores)


def document(
    name: str, measured: Measured, whole: dict[str, Any], changes: Sequence[Change], decoder: str
) -> dict[str, Any]:
    """Return everything that was found, ready for JSON.

    Args:
        name: of the configuration.
        measured: stages.
        whole: of the training as it runs, see `bottleneck.end_to_end`.
        changes: to predict.
        decoder: who decodes.
    """
    pipeline = pipeline_of(measured)
    said, found = verdict(pipeline), predictions(pipeline, changes)
    return {
        "name": name,
        "decoder": decoder,
        "clips_per_step": measured.clips,
        "stages": [
            {
                **asdict(stage),
                "clips_per_second": _finite(ceiling(pipeline, stage.name)),
                "interval": round(measured.spread[stage.name], 4),
                "at_once": measured.servers[stage.site],
            }
            for stage in measured.stages
        ],
        "limits": limits(pipeline),
        "cores": measured.cores,
        "end_to_end": whole,
        "verdict": asdict(said),
        "explained": whole["clips_per_second"] / said.rate,
        "crowded": crowded(pipeline),
        "what_if": [_row(prediction, whole["clips_per_second"]) for prediction in found],
        "gop": round(measured.gop, 1),
        "notes": measured.notes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(prediction: Prediction, now: float) -> dict[str, Any]:
    return {
        "name": prediction.change.name,
        "predicted_clips_per_second": now * prediction.gain,
        "gain": prediction.gain,
        "fix": prediction.change.fix,
    }


def summary(found: dict[str, Any]) -> str:
    """Return what a person in a hurry needs: how fast, what binds, what to do; three or four lines."""
    whole, said = found["end_to_end"], Verdict(**found["verdict"])
    rates = {stage["name"]: stage["clips_per_second"] for stage in found["stages"]}
    wait = whole["data_wait_share"]
    keeps_up = "the data keep up" if wait <= WAITING else f"{100 * wait:.0f} % of the time it waits for data"
    place = "CPU cores are full" if said.resource == CORES else f"{said.resource} full"
    lines = [f"{found['name']}: {whole['clips_per_second']:.1f} clips/s; {keeps_up}."]
    if said.tie:
        lines.append(
            f"BOUND BY {said.binding} AND {said.next} (a tie: within {100 * (TIE - 1):.0f} %, both must be faster)."
        )
    else:
        lines.append(f"BOUND BY {said.binding} (alone {rates[said.binding]:.1f} clips/s; {place}).")
        lines += _waits(next(stage for stage in found["stages"] if stage["name"] == said.binding))
        if said.next:
            gain = said.rate_without / said.rate
            lines.append(f"Without it: {gain:.2f}x of the least limit, then bound by {said.next}.")
    best = [row for row in found["what_if"] if row["gain"] >= TIE]
    if best:
        lines.append(f"Do: {best[0]['fix']}: {best[0]['gain']:.2f}x predicted.")
    else:
        lines.append(f"No setting that was tried brings 5 %: make {said.binding} itself faster.")
    if whole["core_wait_share"] > DISTURBED:
        waited = f"{100 * whole['core_wait_share']:.0f} % of the time"
        lines.append(f"The training thread waited for a core {waited}: measure again on an idle machine.")
    if found["crowded"]:
        lines.append("Servers wait for cores here: predictions may be up to a fifth too high.")
    return "\n".join(lines)


def _waits(stage: dict[str, Any]) -> list[str]:
    """Say of a stage of the host that it hardly computes: then something holds it, and a faster CPU is no help."""
    if stage["ms"] <= 0.0 or stage["cpu_ms"] > WAITS * stage["ms"] or stage["site"] in NOT_ON_HOST:
        return []
    parts = f"{stage['ms']:.1f} ms a clip, of which {stage['cpu_ms']:.1f} ms are CPU time"
    return [f"It waits, it does not compute: {parts}. Look for what holds it."]


def table(found: dict[str, Any]) -> str:
    """Return stages and what-ifs for a terminal."""
    lines = [f"{'stage':20} {'where':16} {'at once':>7} {'ms a clip':>10} {'CPU ms':>8} {'clips/s alone':>14}   +-"]
    for stage in found["stages"]:
        rate = "" if stage["clips_per_second"] is None else f"{stage['clips_per_second']:.1f}"
        lines.append(
            f"{stage['name']:20} {stage['site']:16} {stage['at_once']:7d} {stage['ms']:10.3f} {stage['cpu_ms']:8.3f} "
            f"{rate:>14} {100 * stage['interval']:4.0f} %"
        )
    lines.append("full at, clips/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in found["limits"].items()))
    whole = found["end_to_end"]
    lines.append(
        f"end to end {whole['clips_per_second']:.1f} clips/s, {100 * found['explained']:.0f} % of the least of them; "
        f"this training kept {whole['cpu_cores_busy']:.1f} of {found['cores']} cores busy"
    )
    lines += [f"  machine, with everything on it: {name} {value:.1f}" for name, value in whole["counters"].items()]
    lines.append(f"{'what if':12} {'clips/s':>9} {'gain':>6}  how")
    for row in found["what_if"]:
        lines.append(f"{row['name']:12} {row['predicted_clips_per_second']:9.1f} {row['gain']:5.2f}x  {row['fix']}")
    lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join(lines)


def figures(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures for a tracked run, by metric name."""
    values = {
        f"bottleneck/{stage['name'].replace(' + ', '_').replace(' ', '_')}_clips_per_second": stage["clips_per_second"]
        for stage in found["stages"]
        if stage["clips_per_second"] is not None
    }
    whole = found["end_to_end"]
    values |= {f"bottleneck/{name}": whole[name] for name in ("clips_per_second", "data_wait_share")}
    return values | {"bottleneck/predicted_clips_per_second": found["verdict"]["rate"]}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the ceilings of the stages and the rate of the whole; what binds is red, what binds next is orange."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    stages = [stage for stage in found["stages"] if stage["clips_per_second"] is not None][::-1]
    colours = {found["verdict"]["next"]: "tab:orange", found["verdict"]["binding"]: "tab:red"}
    figure = Figure(figsize=(8.0, 0.5 * len(stages) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = [stage["clips_per_second"] for stage in stages]
    bars = axes.barh(
        [f"{stage['name']} ({stage['site']})" for stage in stages],
        rates,
        xerr=[rate * stage["interval"] for rate, stage in zip(rates, stages, strict=True)],
        color=[colours.get(stage["name"], "tab:gray") for stage in stages],
    )
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.axvline(found["end_to_end"]["clips_per_second"], color="black", linestyle="--", label="end to end")
    axes.axvline(found["verdict"]["rate"], color="tab:blue", linestyle=":", label="predicted from the stages")
    axes.set_xscale("log")
    axes.set_xlabel("clips/s of each stage alone")
    axes.set_title(f"{found['name']}: bound by {found['verdict']['binding']}")
    keys = [Patch(color="tab:red", label="binds"), Patch(color="tab:orange", label="binds next")]
    axes.legend(handles=[*axes.get_lines()[-2:], *keys], fontsize=8)
    axes.margins(x=0.12)  # room for the figures behind the bars
    figure.savefig(path)


__all__ = ["COPY", "GPU", "MODEL", "VERIFIABLE", "document", "draw", "figures", "summary", "table", "what_ifs"]
