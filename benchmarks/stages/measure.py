"""Times of the stages of a clip's way, each measured alone with its neighbours stubbed, for `benchmarks.bottleneck`.

A stage's time is its wall time less what the kernel says the thread waited for a core, so that other work on the
machine counts little; where threads share the work it is the wall time. CPU time is that of the process.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.stages.model import Stage
from benchmarks.stages.nvdec import NVDEC, cuts_of, nvdec_rounds, share_of
from experiments.config import Config
from experiments.engine.data import random_batch
from experiments.engine.learner import Learner
from experiments.engine.run_data import RunData
from experiments.runtime import Runtime
from pipeline.clip import ClipPlan
from pipeline.collate import collate
from pipeline.graph import GraphSpec, build_graph, end_graph, graph_outputs, host_inputs, stream_argument
from pipeline.loader import TrainLoader
from pipeline.media.cut_decoder import CutDecoder
from pipeline.nvdec.hardware import NUM_THREADS
from pipeline.source import FreshMemory, HostClip, Unreadable, Wanted, planes_of, read_clip, read_sound
from pipeline.workers.machine import choose_num_workers, usable_cpus

READERS, GRAPH, FRAMES, THREAD = "readers", "graph", "frame threads", "training thread"
GPU, COPY, NETWORK = "GPU", "copies to it", "network"
STORAGE, DECODE, AUDIO, LOG_MEL, RESIZE = "storage read", "video decode", "audio read", "log-mel", "resize + normalise"
TO_DEVICE, FEED, LAUNCH, MODEL, REDUCE = "host to device", "feed", "host launches", "forward + backward", "all-reduce"
SLEEP_CYCLES_PER_S = 2e9  # at most what a GPU counts in a second
WARM_UP_STEPS = 3
MOST_WARM_UP_STEPS = 60  # CUDA graphs: 11 steps of each kind


@dataclass
class Measured:
    """Stages as they were measured.

    Args:
        stages: in the order of a clip's way.
        servers: of each site.
        cores: that this process may use.
        spread: half the 95 % interval of a stage's time as a share of it, by name.
        notes: what was not measured, and why.
        clips: of one rank in a pass.
        gop: frames from one key frame to the next, as the cuts show it; 0 = unknown.
        window: frames from the first to the last of a clip.
        half_batch_ms: of the model and the launches at half the batch, by stage name, a clip; empty = not measured.
        nvdec_share: share of the clips that NVDEC decodes, whose planes need no copy to the device.
        short_side_px: mean of the stored pictures of the timed clips; 0 = no pictures.
    """

    stages: list[Stage] = field(default_factory=list)
    servers: dict[str, int] = field(default_factory=dict)
    cores: int = 1
    spread: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clips: int = 1
    gop: float = 0.0
    window: int = 0
    half_batch_ms: dict[str, float] = field(default_factory=dict)
    nvdec_share: float = 0.0
    short_side_px: float = 0.0

    def add(self, name: str, site: str, times: "Times", servers: int = 1) -> None:
        """Add a stage."""
        self.stages.append(Stage(name, site, times.ms, times.cpu_ms))
        self.servers.setdefault(site, servers)
        self.spread[name] = times.spread


@dataclass(frozen=True)
class Times:
    """Milliseconds of one clip: of the server, and of CPU; half the 95 % interval as a share."""

    ms: float
    cpu_ms: float
    spread: float = 0.0

    def times(self, share: float) -> "Times":
        """Return the times of a mean clip where a share of the clips takes them."""
        return replace(self, ms=share * self.ms, cpu_ms=share * self.cpu_ms)


def waited_s() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def timed(call: Callable[[int], object], *, first: int, count: int, clips: int = 1) -> Times:
    """Time calls, after as many numbers that only warm up.

    Args:
        call: takes a number, from 0 on.
        first: calls that are not timed.
        count: calls that are.
        clips: of one call.
    """
    for number in range(first):
        call(number)
    walls: list[float] = []
    cpu = time.process_time()
    for number in range(first, first + count):
        began, waited = time.perf_counter(), waited_s()
        call(number)
        walls.append(max(0.0, time.perf_counter() - began - (waited_s() - waited)) * 1e3 / clips)
    cpu_ms = (time.process_time() - cpu) * 1e3 / (count * clips)
    return times_of(walls, cpu_ms)


def times_of(walls_ms: list[float], cpu_ms: float) -> Times:
    """Mean of single times with its interval."""
    mean = statistics.fmean(walls_ms)
    error = statistics.stdev(walls_ms) / math.sqrt(len(walls_ms)) if len(walls_ms) > 1 else 0.0
    return Times(mean, cpu_ms, 2 * error / mean if mean > 0 else 0.0)


def measure_stages(
    config: Config, runtime: Runtime, data: RunData, learner: Learner, *, clips: int, steps: int
) -> Measured:
    """Measure every stage alone.

    Args:
        config: of the training.
        runtime: of this process.
        data: of the run.
        learner: prepared.
        clips: timed for each stage of the readers.
        steps: timed of graph and model.
    """
    found = measure_data(data.loader, clips=clips, steps=steps)
    if data.passes > 1:
        found.notes.append(f"a step has {data.passes} passes: each is measured as a step of its own")
    _model(found, config, runtime, learner, steps)
    if runtime.world_size > 1:
        _all_reduce(found, runtime, learner, steps)
    return found


def measure_data(loader: TrainLoader, *, clips: int, steps: int) -> Measured:
    """Measure the stages of the data alone: readers, graph, and the way to the device.

    Args:
        loader: of the training.
        clips: timed for each stage of the readers.
        steps: timed of the graph.
    """
    found = Measured(cores=usable_cpus(), clips=loader.options.clips_per_batch)
    whole = _readers(found, loader, clips)
    batch = [whole[number % len(whole)] for number in range(found.clips)]
    if batch:
        _graph(found, loader, batch, steps)
    return found


def _servers(loader: TrainLoader) -> int:
    """Threads or processes that read."""
    config, on_gpu = loader.config, loader.options.device_id is not None
    workers = choose_num_workers(config.num_workers, on_gpu=on_gpu, is_confined=not loader.dataset.video_codec)
    return config.num_threads if workers == 0 or loader.decoder == "dali" else workers


def _readers(found: Measured, loader: TrainLoader, clips: int) -> list[HostClip]:
    """Measure reading, decoding and sound; returns whole clips for the graph."""
    dataset, options, servers = loader.dataset, loader.options, _servers(loader)
    warm = max(1, clips // 4)
    plans = [loader.plan.at(position, 0) for position in range(warm + clips)]
    wanted = Wanted(
        loader.spec.num_audio_samples,
        "dali" if loader.decoder == "dali" else "cpu",
        options.want_video,
        options.want_audio,
    )
    if options.want_video:
        _video(found, loader, plans, warm, clips, servers)
    if options.want_audio:
        sounds = timed(
            lambda n: read_sound(dataset, plans[n].media, plans[n].audio_start, wanted), first=warm, count=clips
        )
        found.add(AUDIO, READERS, sounds, servers)
    whole = [read_clip(dataset, plan, wanted, FreshMemory()) for plan in plans[: min(found.clips, 8)]]
    unreadable = [clip.reason for clip in whole if isinstance(clip, Unreadable)]
    if unreadable:
        found.notes.append(f"clips that cannot be read were left out: {unreadable[0]}")
    return [clip for clip in whole if isinstance(clip, HostClip)]


def gop_of(loader: TrainLoader, clips: int) -> float:
    """Frames from one key frame to the next, from how far before their windows the cuts of some clips begin."""
    plans = [loader.plan.at(position, 0) for position in range(clips)]
    cuts = [loader.dataset.read_video(plan.media, plan.frames[0], plan.frames[-1]) for plan in plans]
    return 1 + 2 * statistics.fmean(plan.frames[0] - cut.first_frame for plan, cut in zip(plans, cuts, strict=True))


def _video(found: Measured, loader: TrainLoader, plans: list[ClipPlan], warm: int, clips: int, servers: int) -> None:
    dataset = loader.dataset
    found.window = int(plans[0].frames[-1]) - int(plans[0].frames[0]) + 1
    stored = dataset.media
    found.short_side_px = statistics.fmean(min(stored.height[p.media], stored.width[p.media]) for p in plans)
    if "dali" not in dataset.decoders:  # plain files, pictures: the decoder reads by itself
        found.notes.append("reading is inside the decoder here: storage read and video decode are one stage")
        whole = timed(
            lambda n: dataset.read_frames(plans[n].media, np.asarray(plans[n].frames)), first=warm, count=clips
        )
        found.add(DECODE, READERS, whole, servers)
        return

    def read(number: int) -> Any:
        """Read and check one cut."""
        plan = plans[number]
        return dataset.read_video(plan.media, plan.frames[0], plan.frames[-1])

    found.add(STORAGE, READERS, timed(read, first=warm, count=clips), servers)
    cuts = [read(number) for number in range(len(plans))]
    leads = [plan.frames[0] - cut.first_frame for plan, cut in zip(plans, cuts, strict=True)]
    found.gop = 1 + 2 * statistics.fmean(leads)
    if loader.decoder == "dali":
        found.notes.append("DALI decodes inside the graph: its time is in resize + normalise")
        return
    decoder, table = CutDecoder(), dataset.media
    memory: dict[tuple[int, ...], Any] = {}

    def decode(number: int) -> None:
        """Decode one cut that is in memory into planes that are there."""
        plan, cut = plans[number], cuts[number]
        height, width = int(table.height[plan.media]), int(table.width[plan.media])
        size = len(plan.frames), height, width
        if size not in memory:
            memory[size] = planes_of(np.empty(len(plan.frames) * height * width * 3 // 2, np.uint8), *size)
        numbers, inverse = np.unique(np.asarray(plan.frames) - cut.first_frame, return_inverse=True)
        decoder.decode(cut.data, numbers, width, height, memory[size] if len(numbers) == len(inverse) else None)

    on_cpu = timed(decode, first=warm, count=clips)
    for_nvdec = cuts_of(dataset, plans[warm:], cuts[warm:]) if loader.decoder in ("nvdec", "both") else []
    if not for_nvdec:
        found.add(DECODE, READERS, on_cpu, servers)
        return
    threads = NUM_THREADS
    walls, cpu_ms = nvdec_rounds(for_nvdec, threads, loader.options.device_id)
    by_nvdec = times_of(walls, cpu_ms)
    found.nvdec_share = share_of(loader.decoder, by_nvdec.ms, threads, on_cpu.ms, servers)
    if found.nvdec_share < 1:
        found.add(DECODE, READERS, on_cpu.times(1 - found.nvdec_share), servers)
    found.add(NVDEC, NVDEC, by_nvdec.times(found.nvdec_share), threads)
    found.notes.append(
        f"NVDEC has {100 * found.nvdec_share:.0f} % of the clips: its stage and the CPU's are those of a mean clip"
    )


def _graph(found: Measured, loader: TrainLoader, batch: list[HostClip], steps: int) -> None:
    """Measure each half of the graph alone, and handing a batch over to the device."""
    spec = replace(loader._graph_spec(1, want_negative=False), max_clips=len(batch))
    halves = (
        (LOG_MEL, spec.want_audio, replace(spec, want_video=False)),
        (RESIZE, spec.want_video, replace(spec, want_audio=False, want_negative=False)),
    )
    site = GRAPH if spec.device_id is None else GPU
    for name, wanted, half in halves:
        if wanted:
            found.add(name, site, _graph_times(half, batch, steps))
    maker, made = loader._frame_maker(), {}
    if maker is not None:  # beside the graph

        def make(_: int) -> None:
            """Make the frames of the batch, to the end."""
            maker.begin(batch).result()
            if spec.device_id is not None:
                torch.cuda.synchronize(spec.device_id)

        site = FRAMES if spec.device_id is None else GPU
        found.add(RESIZE, site, timed(make, first=2, count=steps, clips=len(batch)))
        made["frames"] = maker.begin(batch).result()
        maker.close()
    outputs = graph_outputs(spec, lambda: host_inputs(spec, batch))
    described = loader._batch_spec()
    given = next(outputs) | made
    handed = timed(lambda _: collate(batch, given, described), first=2, count=steps, clips=len(batch))
    outputs.close()
    if spec.device_id is None:
        found.add(TO_DEVICE, THREAD, handed)
        return
    found.add(FEED, THREAD, handed)
    planes = sum(array.nbytes for clip in batch for array in (clip.luma, clip.chroma) if array is not None)
    sound = sum(clip.audio.nbytes for clip in batch if clip.audio is not None)
    size = round((1 - found.nvdec_share) * planes) + sound
    found.add(TO_DEVICE, COPY, _copy_times(size, len(batch), torch.device(loader.options.device), steps))


def _graph_times(spec: GraphSpec, batch: list[HostClip], steps: int) -> Times:
    inputs = host_inputs(spec, batch)
    pipe = build_graph(spec, lambda: inputs)

    def run(_: int) -> None:
        """Take one batch out."""
        pipe.run(*stream_argument(spec))
        if spec.device_id is not None:
            torch.cuda.synchronize(spec.device_id)

    try:
        walls = []
        for number in range(3):
            run(number)
        cpu = time.process_time()
        for number in range(steps):
            began = time.perf_counter()
            run(number)
            walls.append((time.perf_counter() - began) * 1e3 / len(batch))
        return times_of(walls, (time.process_time() - cpu) * 1e3 / (steps * len(batch)))
    finally:
        end_graph(pipe)


def _copy_times(size: int, clips: int, device: torch.device, steps: int) -> Times:
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def copy(_: int) -> None:
        """Copy as many bytes as a batch has."""
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return timed(copy, first=2, count=steps, clips=clips)


def _model(found: Measured, config: Config, runtime: Runtime, learner: Learner, steps: int) -> None:
    """Measure the step on a batch that is there: the host's part and the device's."""
    launch, model = step_times(config, runtime, learner, found.clips, steps)
    found.add(LAUNCH, THREAD, launch)
    found.add(MODEL, THREAD if runtime.device.type == "cpu" else GPU, model)
    half, group = found.clips // 2, config.model.clips_per_bn_group
    if found.clips % 2 == 0 and (half <= group or half % group == 0):
        smaller = step_times(config, runtime, learner, half, max(3, steps // 2))
        found.half_batch_ms = {LAUNCH: smaller[0].ms, MODEL: smaller[1].ms}


def step_times(config: Config, runtime: Runtime, learner: Learner, clips: int, steps: int) -> tuple[Times, Times]:
    """Times a clip of the host's launches and of forward + backward + optimizer.

    On a CPU both are the host's: what a step does around its arithmetic, and the arithmetic. On CUDA the host's part is
    timed with the device idle, the device's while launches queue up behind a pause: neither waits for the other.
    """
    batch, on_gpu = random_batch(config, runtime, clips), runtime.device.type == "cuda"
    number = itertools.count()

    def step() -> tuple[float, float]:
        """Take a step; seconds around the arithmetic, and in it."""
        began = time.perf_counter()
        drop = learner.begin_step(next(number) % learner._total_steps)
        inputs = learner.inputs(batch)
        middle = time.perf_counter()
        learner.take_step(inputs, drop_audio=drop)
        end = time.perf_counter()
        learner.statistics.synchronize()
        return middle - began + time.perf_counter() - end, end - middle

    for done in range(MOST_WARM_UP_STEPS):
        step()
        if done >= WARM_UP_STEPS and not learner.take_step.warming_up:
            break
    if on_gpu:
        return _cuda_step_times(step, clips, steps)
    around, inside, waits, cpu = [], [], waited_s(), time.process_time()
    for _ in range(steps):
        first, second = step()
        around.append(first * 1e3 / clips)
        inside.append(second * 1e3 / clips)
    cpu_ms = (time.process_time() - cpu) * 1e3 / (steps * clips)
    waited_ms = (waited_s() - waits) * 1e3 / (steps * clips)
    launch, model = times_of(around, 0.0), times_of(inside, 0.0)
    # At least the time of its CPU work: what was waited is this thread's, while threads that share the work wait, too.
    model = replace(model, ms=min(model.ms, max(model.ms - waited_ms, cpu_ms / torch.get_num_threads())))
    share = launch.ms / max(launch.ms + model.ms, 1e-9)
    return replace(launch, cpu_ms=min(launch.ms, share * cpu_ms)), replace(model, cpu_ms=(1 - share) * cpu_ms)


def _cuda_step_times(step: Callable[[], tuple[float, float]], clips: int, steps: int) -> tuple[Times, Times]:
    host, device = [], []
    for _ in range(steps):
        torch.cuda.synchronize()
        seconds = sum(step())
        host.append(seconds * 1e3 / clips)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(2 * seconds * SLEEP_CYCLES_PER_S))
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        step()
        last.record()
        last.synchronize()
        device.append(first.elapsed_time(last) / clips)
    launch = times_of(host, 0.0)
    return replace(launch, cpu_ms=launch.ms), times_of(device, 0.0)


def _all_reduce(found: Measured, runtime: Runtime, learner: Learner, steps: int) -> None:
    size = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    gradients = torch.zeros(size, device=runtime.device)

    def exchange(_: int) -> None:
        """Sum as many numbers as the model has gradients."""
        dist.all_reduce(gradients)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    found.add(REDUCE, NETWORK, timed(exchange, first=2, count=steps, clips=found.clips))
