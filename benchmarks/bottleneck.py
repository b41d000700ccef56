"""What binds a training, what binds next, and what would help: `python -m benchmarks.bottleneck CONFIG [key=value]`.

Every stage of a clip's way is measured alone with the workers, threads and batch of the configuration, then the
training as it runs. From the stages a model says what binds, and what more workers, a shorter GOP, no audio, cached
clips, another batch or a CUDA graph would bring. The last lines are for people in a hurry. docs/profiling.md

    python -m benchmarks.bottleneck CONFIG --verify workers    measures one what-if: workers, audio, batch, cuda_graph
    python -m benchmarks.bottleneck CONFIG --other-data STORE  what-if "data": the same videos prepared in another way
    python -m benchmarks.bottleneck CONFIG --verify data --other-data STORE    and measures it (or --verify gop)
    python -m benchmarks.bottleneck CONFIG --out FILE.json --plot FILE.png --run runs/NAME
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.kernel_timing import check_out
from benchmarks.result_rows import append_rows, given_arguments, provenance
from benchmarks.stages.measure import Measured, gop_of, measure_data, measure_stages, waited_s
from benchmarks.stages.model import Change, predictions
from benchmarks.stages.report import (
    VERIFIABLE,
    data_change,
    document,
    draw,
    figures,
    gop_change,
    pipeline_of,
    summary,
    table,
    what_ifs,
)
from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser
from experiments.config import Config, load_config
from experiments.engine.graph_rules import graph_obstacle
from experiments.engine.learner import Learner
from experiments.engine.run_data import RunData
from experiments.records.system_metrics import SystemSampler
from experiments.records.tracking import make_tracker
from experiments.runtime import Runtime, init_runtime, set_up_logging, shut_down
from experiments.tasks.consistency import check_consistency
from pipeline.batch import Batch
from pipeline.loader import TrainLoader

AHEAD_BATCHES = 4  # beside data.prefetch_batches: what was read before the first step must not count as speed
log = logging.getLogger(__name__)
LEAST_STEPS = 3


def end_to_end(
    data: RunData, learner: Learner, runtime: Runtime, seconds: float, *, audio: bool = True
) -> dict[str, Any]:
    """Train for a while and measure.

    Args:
        data: of the run.
        learner: prepared.
        runtime: of this process.
        seconds: how long, after a warm-up; at least three steps.
        audio: False reads no sound and gives the model silence.

    Returns:
        clips_per_second (of all ranks), data_wait_share, cpu_cores_busy (this process and its workers), core_wait_share
        (of the training thread, for a core), steps, counters of the machine.
    """
    loader = data.loader
    if not audio:
        loader.options = dataclasses.replace(loader.options, want_audio=False)
    batches = loader.batches()
    sampler = SystemSampler(lambda _: None, 1.0)
    waits = whole = 0.0
    steps, began, cpu, queued = -(loader.config.prefetch_batches + AHEAD_BATCHES), time.perf_counter(), 0.0, 0.0
    try:
        while steps < LEAST_STEPS or time.perf_counter() - began < seconds or learner.take_step.warming_up:
            if steps <= 0 or learner.take_step.warming_up:
                steps, waits, began, cpu, queued = min(steps, 0), 0.0, time.perf_counter(), _cpu_s(), waited_s()
                sampler.sample()
            start = time.perf_counter()
            batch = next(batches)
            waits += time.perf_counter() - start
            drop = learner.begin_step(max(0, steps) % data.total_steps)
            inputs = learner.inputs(
                batch if audio else _silenced(batch, loader.spec.num_mel_frames, loader.spec.num_mel_bins)
            )
            learner.take_step(inputs, drop_audio=drop)
            learner.statistics.synchronize()
            steps += 1
            if steps == 0 and runtime.device.type == "cuda":
                torch.cuda.synchronize(runtime.device)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        whole, busy, counters = time.perf_counter() - began, _cpu_s() - cpu, sampler.sample()
        queued = waited_s() - queued
    finally:
        batches.close()
    clips = steps * loader.options.clips_per_batch * runtime.world_size
    return {
        "clips_per_second": clips / whole,
        "data_wait_share": waits / whole,
        "cpu_cores_busy": busy / whole,
        "core_wait_share": queued / whole,
        "steps": steps,
        "counters": {name.removeprefix("system/"): value for name, value in counters.items()},
    }


def _silenced(batch: Batch, frames: int, bins: int) -> Batch:
    size = len(batch.ids)
    return dataclasses.replace(batch, log_mel=torch.zeros(size, 1, frames, bins, device=batch.labels.device))


def _cpu_s() -> float:
    """CPU seconds of this process and its children."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def changed(config: Config, change: Change, other_data: str = "") -> Config:
    """Return the configuration of a what-if that can be measured (audio has none of its own)."""
    if change.name in ("gop", "data"):
        return _with_data(config, other_data)
    if change.name in ("workers", "cuda_graph"):
        section, _, rest = change.fix.partition(".")
        key, _, value = rest.partition("=")
        part = dataclasses.replace(getattr(config, section), **{key: value if value == "auto" else int(value)})
        return dataclasses.replace(config, **{section: part})
    if change.name == "batch":
        train = dataclasses.replace(config.train, clips_per_step=2 * config.train.clips_per_step)
        return dataclasses.replace(config, train=train)
    return config


def analyse(
    config: Config, runtime: Runtime, *, clips: int, steps: int, seconds: float, verify: str = "", other_data: str = ""
) -> dict[str, Any]:
    """Measure stages and training, and say what binds; see `stages.report.document`.

    Args:
        config: of the training.
        runtime: of this process.
        clips: timed for each stage of the readers.
        steps: timed of graph and model.
        seconds: of the training as it runs.
        verify: what-if to measure, or "".
        other_data: store of the same videos, prepared in another way, for "data" and "gop"; or "".

    Raises:
        ValueError: no such what-if here.
    """
    data, learner = _opened(config, runtime)
    other = _other_loader(data, other_data, runtime) if other_data else None
    config = data.config
    if verify == "cuda_graph" and not _graph_is_off(config, runtime):
        raise ValueError(
            "--verify cuda_graph needs a GPU and runtime.cuda_graph=off, with nothing else in a graph's way"
        )
    log.info("timing each stage alone: %d clips of the readers, %d steps of graph and model", clips, steps)
    measured = measure_stages(config, runtime, data, learner, clips=clips, steps=steps)
    log.info("training as it is for %.0f s and at least %d steps", seconds, LEAST_STEPS)
    whole = end_to_end(data, learner, runtime, seconds)
    on_gpu = runtime.device.type == "cuda"
    changes = what_ifs(config, measured, on_gpu=on_gpu, graph_is_off=_graph_is_off(config, runtime))
    if other is not None and verify != "gop":
        changes.append(data_change(measured, measure_data(other, clips=clips, steps=steps), other_data))
    found = document(config.name, measured, whole, changes, data.loader.decoder)
    if verify:
        change = next((change for change in changes if change.name == verify), None)
        if change is None:
            possible = ", ".join(c.name for c in changes if c.name in VERIFIABLE)
            raise ValueError(f"--verify ({verify}) must be one of {possible} for this configuration")
        log.info("training with the change, and once more without it")
        learner.close()
        data, learner = _opened(changed(config, change, other_data), runtime)
        then = end_to_end(data, learner, runtime, seconds, audio=verify != "audio")
        row = next(row for row in found["what_if"] if row["name"] == verify)
        if verify == "gop":  # that of the other store, whatever it is
            change = gop_change(measured, gop_of(data.loader, clips))
            row |= {"gain": predictions(pipeline_of(measured), [change])[0].gain, "fix": change.fix}
        learner.close()
        data, learner = _opened(config, runtime)  # as it was once more: a machine's speed drifts
        again = end_to_end(data, learner, runtime, seconds)["clips_per_second"]
        row["clips_per_second_before_and_after"] = [found["end_to_end"]["clips_per_second"], again]
        row["predicted_clips_per_second"] = row["gain"] * sum(row["clips_per_second_before_and_after"]) / 2
        row["measured_clips_per_second"] = then["clips_per_second"]
        row["error"] = row["predicted_clips_per_second"] / then["clips_per_second"] - 1
    learner.close()
    return found


def _with_data(config: Config, path: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))


def _other_loader(data: RunData, path: str, runtime: Runtime) -> TrainLoader:
    """Open another store of the same videos; ValueError where it is none, or has other samples."""
    try:
        other = RunData(_with_data(data.config, path), runtime)
    except (ValueError, OSError) as error:
        raise ValueError(f"--other-data ({path}) must be the same videos prepared in another way: {error}") from error
    own, theirs = data.train_set, other.train_set
    if dict(own.classes) != dict(theirs.classes) or sorted(own.samples.ids) != sorted(theirs.samples.ids):
        raise ValueError(
            f"--other-data ({path}) must hold the same training samples as data.path ({data.config.data.path}): it has "
            f"{len(theirs.samples)}, of which {len(set(theirs.samples.ids) & set(own.samples.ids))} are among the "
            f"{len(own.samples)} there; prepare the same videos in another way"
        )
    return other.loader


def _opened(config: Config, runtime: Runtime) -> tuple[RunData, Learner]:
    data = RunData(config, runtime)
    learner = Learner(data.config, runtime, data.task, data.total_steps, fresh=False)
    learner.prepare()
    return data, learner


def _graph_is_off(config: Config, runtime: Runtime) -> bool:
    free = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, cuda_graph="auto"))
    return config.runtime.cuda_graph == "off" and not graph_obstacle(free, runtime)


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.bottleneck", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file of a training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("--clips", type=int, default=64, help="timed for each stage of the readers")
    parser.add_argument("--steps", type=int, default=20, help="timed of graph and model")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the training as it runs")
    parser.add_argument("--verify", choices=VERIFIABLE, default="", help="measure one what-if")
    parser.add_argument("--other-data", default="", help="store of the same videos, prepared in another way")
    parser.add_argument("--out", type=Path, help="JSON file to append to")
    parser.add_argument("--plot", type=Path, help="picture of the ceilings")
    parser.add_argument("--run", type=Path, help="run folder to record the figures in, as tracked metrics at step 0")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(list(arguments))
    check_out(options.out)
    if min(options.clips, options.steps) < 2 or options.seconds <= 0:
        raise ValueError("--clips and --steps must be at least 2, --seconds more than 0")
    if options.verify in ("gop", "data") and not options.other_data:
        raise ValueError(
            f"--verify {options.verify} needs --other-data STORE: the same videos, prepared in another way"
        )
    if options.other_data and options.verify not in ("", "gop", "data"):
        raise ValueError(f"--other-data ({options.other_data}) must come with --verify gop or data, or without it")
    if options.plot and not options.plot.absolute().parent.is_dir():
        raise ValueError(f"--plot ({options.plot}) must be a file in a folder that is there; make the folder first")
    if options.run and not options.run.is_dir():
        raise ValueError(f"--run ({options.run}) must be a run folder")
    config = load_config(options.config, options.overrides)
    check_consistency(config)
    runtime = init_runtime(config.runtime)
    set_up_logging(runtime)
    sizes = {"clips": options.clips, "steps": options.steps, "seconds": options.seconds}
    found = analyse(config, runtime, **sizes, verify=options.verify, other_data=options.other_data)
    if runtime.is_main:
        for line in _told(found, config, options, given_arguments(arguments), runtime):
            sys.stdout.write(line + "\n")
    shut_down(runtime)
    return 0


def _told(found: dict[str, Any], config: Config, options: Any, given: list[str], runtime: Runtime) -> Iterator[str]:
    """Write what was asked for; yields what is printed."""
    yield table(found)
    if options.out:
        append_rows(options.out, [found | provenance("benchmarks.bottleneck", runtime.device.type, given)])
    if options.plot:
        draw(found, options.plot)
    if options.run:
        tracker = make_tracker(config.tracking, options.run, options.run.name, is_main=True)
        tracker.metrics(0, figures(found))
        tracker.flush()
    for row in found["what_if"]:
        if "error" in row:
            yield (
                f"verified {row['name']}: {row['measured_clips_per_second']:.1f} clips/s, "
                f"predicted {row['predicted_clips_per_second']:.1f} ({100 * row['error']:+.0f} %)"
            )
    yield ""
    yield summary(found)


__all__ = ["Measured", "analyse", "changed", "end_to_end", "main"]

if __name__ == "__main__":
    sys.exit(run_command(main))
