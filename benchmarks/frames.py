"""Frames without decoding: `python -m benchmarks.frames [--device cuda:0] [--out FILE]`; a minute at most.

What makes frames of decoded planes alone, from pictures in memory: on a CPU the fused operation (by instruction set)
and DALI's operators; on a GPU the fused kernel and the graph, each with the copy of the planes to it, and "there": of
planes that lie there, as the loader has them. Two tasks: training (one jittered crop of 224 px a clip) and evaluation
(three crops of 256 px). With --store, views per CPU second of 30-view evaluation from a store, decoding included; of
ten videos at least, because the memory of the first batches is fresh. CPU time is that of all threads of the process;
DALI works on no batch ahead on a CPU, which would be time of whatever is measured next.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.kernel_timing import check_out
from benchmarks.result_rows import given_arguments, provenance, tell_rows
from pipeline.clip import ClipPlan, ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.frames.device import DeviceFrameMaker
from pipeline.frames.maker import FrameMaker, choose_frames
from pipeline.frames.native import LEVELS, best_level, library_text, make_frames
from pipeline.frames.table import crop_corners
from pipeline.graph import GraphSpec, build_graph, end_graph, host_inputs, stream_argument
from pipeline.loader import EvalLoader, LoaderOptions
from pipeline.source import HostClip
from pipeline.store.reader import Store

HEIGHT, WIDTH = 256, 340
LONGEST_S = 50.0
Way = Callable[[], object]


def clips_in_memory(count: int, frames: int, task: str) -> list[HostClip]:
    """Clips of white noise: "training" (jitter 256 to 320, crop 224, half of them mirrored), "evaluation" (3 x 256)."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        luma = rng.integers(0, 256, (frames, HEIGHT, WIDTH, 1), dtype=np.uint8)
        chroma = rng.integers(0, 256, (frames, HEIGHT // 2, WIDTH // 2, 2), dtype=np.uint8)
        side = 224 * HEIGHT / rng.uniform(256, 320)
        crops: tuple[CropWindow, ...] = (
            CropWindow(rng.uniform(0, WIDTH - side), rng.uniform(0, HEIGHT - side), side, side),
        )
        if task == "evaluation":
            crops = tuple(CropWindow(at, 0.0, HEIGHT, HEIGHT) for at in (0.0, 42.0, 84.0))
        size = (224, 224) if task == "training" else (256, 256)
        flip = task == "training" and number % 2 == 1
        plan = ClipPlan(number, 0, 0, "", 0, 0.0, 0.0, tuple(range(frames)), 0, crops, size, flip)
        silence = np.zeros(0, np.int16)
        found.append(HostClip(plan, None, np.arange(frames, dtype=np.int32), luma, chroma, silence, False, None))
    return found


def make_ways(clips: Sequence[HostClip], device: str, threads: int) -> tuple[dict[str, Way], list[Callable[[], None]]]:
    """What makes the frames of these clips, by name, each a batch a call; and what ends them."""
    plan, half = clips[0].plan, device != "cpu"
    spec = GraphSpec(
        ClipSpec(len(plan.frames), 1), len(clips), num_crops=len(plan.crops), decoder="cpu", want_audio=False,
        device_id=None if device == "cpu" else torch.device(device).index or 0, half=half, pad_channels=half,
        num_threads=threads, prefetch=1 if device == "cpu" else 2,
    )  # fmt: skip
    ways, ends = _by_graph("graph", spec, clips)
    if spec.device_id is not None:
        more, more_ends = _on_device(spec, clips)
        return ways | more, [*ends, *more_ends]
    if library_text():
        return ways, ends
    maker = FrameMaker(half=False, channels=3, num_threads=threads)
    ways["fused"] = lambda: maker.begin(clips).result()
    out = np.empty((len(plan.crops), len(plan.frames), *plan.size_px, 3), np.float32)
    for level in range(best_level() + 1):
        ways[f"one thread, {LEVELS[level]}"] = functools.partial(_one_thread, clips, level, out)
    return ways, [*ends, maker.close]


def _by_graph(name: str, spec: GraphSpec, clips: Sequence[HostClip]) -> tuple[dict[str, Way], list[Callable[[], None]]]:
    """DALI's operators on these clips."""
    pipe = build_graph(spec, lambda: host_inputs(spec, clips))
    return {name: lambda: pipe.run(*stream_argument(spec))}, [lambda: end_graph(pipe)]


def _on_device(spec: GraphSpec, clips: Sequence[HostClip]) -> tuple[dict[str, Way], list[Callable[[], None]]]:
    """Beside the graph on a GPU: the fused kernel, and both of planes that lie there, in the order of one stream.

    Raises:
        ValueError: Triton cannot build the kernel here.
    """
    choose_frames("fused", "cpu", "cuda")
    device = torch.device("cuda", spec.device_id)
    stream = torch.cuda.Stream(device)

    def upload(plane: Any) -> Any:
        return torch.from_numpy(plane).to(device)

    there = [replace(clip, luma=upload(clip.luma), chroma=upload(clip.chroma)) for clip in clips]
    torch.cuda.synchronize(device)
    maker = DeviceFrameMaker(half=spec.half, channels=4, device=device, stream=stream)
    ways, ends = _by_graph("graph, there", replace(spec, planes_stream=stream.cuda_stream), there)
    ways = {"fused": lambda: maker.begin(clips).result(), "fused, there": lambda: maker.begin(there).result()} | ways
    return ways, [*ends, maker.close]


def _one_thread(clips: Sequence[HostClip], level: int, out: NDArray[np.float32]) -> None:
    for clip in clips:
        assert clip.luma is not None
        assert clip.chroma is not None
        make_frames(clip.luma, clip.chroma, crop_corners(clip.plan), clip.plan.flip, out, level=level)


def measure(task: str, device: str, *, clips: int, frames: int, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each way: medians of calls in turns, after two of each.

    Args:
        task: "training" or "evaluation".
        device: "cpu" or "cuda:0".
        clips: a batch. frames: a clip. threads: of the graph and of the fused operation. repeats: timed calls.
    """
    ways, ends = make_ways(clips_in_memory(clips, frames, task), device, threads)
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for repeat in range(repeats + 2):
        if repeat > 4 and time.perf_counter() - began > LONGEST_S / 2:
            break
        for name, call in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if repeat > 1:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    for end in ends:
        end()
    views = clips * (3 if task == "evaluation" else 1)
    for name in ways:
        wall_s, cpu_s = statistics.median(walls[name]), statistics.median(cpus[name])
        yield {
            "task": task, "way": name, "device": device, "clips": clips, "frames": frames, "threads": threads,
            "repeats": len(walls[name]), "clips_per_second": round(clips / wall_s, 1),
            "cpu_ms_a_clip": round(cpu_s / clips * 1e3, 4), "views_per_cpu_second": round(views / cpu_s, 1),
        }  # fmt: skip


def evaluation_from(store: Path, split: str, *, clips: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield views per CPU second of the 10 x 3 views of a whole split, without sound, in threads, ways in turns."""
    dataset, spec = Store.open(store).split(split), ClipSpec(num_frames=32, frame_stride=2)
    rates: dict[str, list[float]] = {"fused": [], "graph": []}
    for repeat in range(repeats + 1):
        for way, found in rates.items():
            config = DataConfig(num_threads=2, num_workers=0, decoder="cpu", frames=way)  # type: ignore[arg-type]
            loader = EvalLoader(dataset, spec, config, LoaderOptions(clips, want_audio=False), views=ViewConfig())
            began = time.process_time()
            views = sum(len(batch) for batch in loader)
            if repeat:  # the first one warms up
                found.append(views / (time.process_time() - began))
    for way, found in rates.items():
        row = {"task": "30 views, decoded", "way": way, "device": "cpu", "clips": clips, "store": store.name}
        yield row | {"repeats": repeats, "views_per_cpu_second": round(statistics.median(found), 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frames", description=__doc__)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=8, help="a batch")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--store", type=Path, help="also evaluate this store, on the CPU")
    parser.add_argument("--split", default="val", help="of the store, evaluated as a whole: take a small one")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    args = parser.parse_args(arguments)
    try:
        check_out(args.out)
        for name in ("clips", "frames", "threads", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} ({getattr(args, name)}) must be at least 1")
    except ValueError as problem:
        parser.error(str(problem))
    source = provenance("benchmarks.frames", args.device.partition(":")[0], given_arguments(arguments))
    sizes = {"clips": args.clips, "frames": args.frames, "threads": args.threads, "repeats": args.repeats}
    rows = [measure(task, args.device, **sizes) for task in ("training", "evaluation")]
    if args.store is not None:
        rows.append(evaluation_from(args.store, args.split, clips=4, repeats=min(3, args.repeats)))
    tell_rows(itertools.chain(*rows), args.out, {"benchmark": "frames"}, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
