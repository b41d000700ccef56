"""Where the CPU time of a clip goes, and what more workers bring: `python -m benchmarks.loader_scaling [STORE]`.

Three tables, rows printed as they come. Stages: CPU ms of a clip for each thing a worker does, measured alone in this
process. Workers: clips per second, CPU ms of the workers and of the parent a clip, for each number of workers, reading
only (no graph). Loader: the same of the whole loader, graph included. Without a store it makes one (256 px, 10 s).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_timing import check_out
from benchmarks.loader import KINETICS, kinetics_like
from benchmarks.result_rows import given_arguments, provenance, tell_rows
from pipeline.config import DataConfig
from pipeline.graph import GraphSpec, host_inputs
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.media.cut_decoder import CutDecoder
from pipeline.plan import NegativeSchedule, TrainPlan
from pipeline.source import FreshMemory, HostClip, Wanted, planes_of, read_clip, read_sound
from pipeline.store.reader import Store, StoreSplit
from pipeline.workers.pool import PoolOptions, WorkerSource
from pipeline.workers.slots import Slot, SlotSpec, picture_bytes, reply_of

CONFIG = DataConfig(decoder="cpu", num_threads=2)
WARM_UP_BATCHES = 6
_TICKS_HZ = os.sysconf("SC_CLK_TCK")


def stages(split: StoreSplit, clips: int) -> dict[str, float]:
    """Return CPU ms a clip of each stage of a worker, measured alone on the same clips.

    Args:
        split: Of a store.
        clips: How many are measured, after as many to warm up.
    """
    plan, wanted = TrainPlan(split, KINETICS, CONFIG, seed=0), Wanted(KINETICS.num_audio_samples, "cpu")
    plans = [plan.clip(position) for position in range(2 * clips)]
    cuts = [split.read_video(clip.media, clip.frames[0], clip.frames[-1]) for clip in plans]
    decoder, table = CutDecoder(), split.media
    slots = SlotSpec(picture_bytes(split, KINETICS.num_frames, wanted), KINETICS.num_audio_samples, with_negative=False)
    slot = Slot(slots, np.zeros(slots.slot_bytes, np.uint8))
    memory = np.zeros(slots.picture_bytes, np.uint8)
    whole = read_clip(split, plans[0], wanted, FreshMemory())

    def decode(number: int) -> None:
        cut, clip = cuts[number], plans[number]
        height, width = int(table.height[clip.media]), int(table.width[clip.media])
        planes = planes_of(memory, len(clip.frames), height, width)
        decoder.decode(cut.data, np.asarray(clip.frames) - cut.first_frame, width, height, planes)

    def read(number: int) -> None:
        split.read_video(plans[number].media, plans[number].frames[0], plans[number].frames[-1])

    def sound(number: int) -> None:
        slot.audio(read_sound(split, plans[number].media, plans[number].audio_start, wanted)[0])

    def answer(_: int) -> None:
        slot.read_reply(slot.write_reply(reply_of(whole)), plan, 0, 0)

    work: dict[str, Callable[[int], object]] = {
        "plan": plan.clip, "read and check the cut": read, "decode": decode, "sound": sound, "answer": answer,
    }  # fmt: skip
    return {name: round(_cpu_ms(call, clips), 4) for name, call in work.items()}


def _cpu_ms(call: Callable[[int], object], clips: int) -> float:
    for number in range(clips):
        call(number)
    began = time.process_time()
    for number in range(clips, 2 * clips):
        call(number)
    return (time.process_time() - began) * 1e3 / clips


def workers_alone(split: StoreSplit, workers: int, *, clips: int, seconds: float) -> dict[str, float]:
    """Return clips per second of worker processes that only read, and CPU ms a clip of them and of the parent.

    Args:
        split: Of a store.
        workers: Processes.
        clips: A batch.
        seconds: How long, after a warm-up.
    """
    plan, wanted = TrainPlan(split, KINETICS, CONFIG, seed=0), Wanted(KINETICS.num_audio_samples, "cpu")
    slots = SlotSpec(picture_bytes(split, KINETICS.num_frames, wanted), KINETICS.num_audio_samples, with_negative=False)
    num_batches = max(4, -(-2 * workers // clips) + 2)  # at least two clips for each worker are waiting
    source = WorkerSource(split, plan, wanted, slots, PoolOptions(workers, num_batches, clips, 60.0))
    graph, first = GraphSpec(KINETICS, max_clips=clips, decoder="cpu"), count(0, clips)
    try:
        for batch in count():
            if batch == WARM_UP_BATCHES:
                began, busy, parent = time.perf_counter(), _cpu_s(source.pids), time.thread_time()
            if batch > WARM_UP_BATCHES and time.perf_counter() - began > seconds:
                break
            while source.has_room():
                start = next(first)
                source.post(range(start, start + clips))
            taken = source.take()
            assert taken is not None
            host_inputs(graph, [clip for clip in taken.clips if isinstance(clip, HostClip)])
            source.release(taken.number)
        wall_s, number = time.perf_counter() - began, (batch - WARM_UP_BATCHES) * clips
        parent_s, workers_s = time.thread_time() - parent, _cpu_s(source.pids) - busy
    finally:
        source.close()
    return {
        "clips_per_second": round(number / wall_s, 2),
        "worker_cpu_ms": round(workers_s * 1e3 / number, 3),
        "parent_cpu_ms": round(parent_s * 1e3 / number, 4),
    }


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of processes since they began."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(own[11]) + int(own[12]) for own in fields) / _TICKS_HZ


def whole_loader(split: StoreSplit, workers: int, *, clips: int, seconds: float, device: str) -> dict[str, float]:
    """Return clips per second of the loader with its graph, and CPU ms a clip of everything.

    Args:
        split: Of a store.
        workers: Processes; 0: threads.
        clips: A batch.
        seconds: How long, after a warm-up.
        device: "cpu" or "cuda:0".
    """
    config = replace(CONFIG, num_workers=workers)
    loader = TrainLoader(split, KINETICS, config, LoaderOptions(clips, device=device), negatives=NegativeSchedule())
    before = _children()
    batches = loader.batches()
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    pids = sorted(_children() - before)
    began, busy, own, thread = time.perf_counter(), _cpu_s(pids), time.process_time(), time.thread_time()
    number = 0
    while time.perf_counter() - began < seconds:
        number += len(next(batches))
    wall_s, workers_s = time.perf_counter() - began, _cpu_s(pids) - busy
    own_s, thread_s = time.process_time() - own, time.thread_time() - thread
    batches.close()
    return {
        "clips_per_second": round(number / wall_s, 2),
        "cpu_ms": round((own_s + workers_s) * 1e3 / number, 3),
        "worker_cpu_ms": round(workers_s * 1e3 / number, 3),
        "caller_cpu_ms": round(thread_s * 1e3 / number, 4),
    }


def _children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def rows(
    split: StoreSplit, workers: Sequence[int], *, clips: int, seconds: float, device: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the three tables; arguments as in the functions that make them."""
    found = stages(split, 4 * clips)
    total = round(sum(found.values()), 4)
    yield {"what": "stages", "cpu_ms": found, "sum_cpu_ms": total}
    base = 0.0
    for number in workers:
        row = workers_alone(split, number, clips=clips, seconds=seconds)
        base = base or row["clips_per_second"]
        ratios = {
            "to_first": round(row["clips_per_second"] / base, 3),
            "to_stages": round(row["worker_cpu_ms"] / total, 3),
        }
        yield {"what": "workers", "workers": number, **row, **ratios}
    for number in (0, *workers):
        row = whole_loader(split, number, clips=clips, seconds=seconds, device=device)
        yield {"what": "loader", "workers": number, "device": device, **row}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_scaling", description=__doc__)
    parser.add_argument("store", nargs="?", type=Path, help="a store; default: one made here")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--codec", choices=["vp9", "h264"], default="h264", help="of the store made here")
    parser.add_argument("--keep", type=Path, help="folder of the store made here; default: a temporary one")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--clips", type=int, default=8, help="clips a batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        if min(options.clips, *options.workers) < 1 or options.seconds <= 0:
            raise ValueError("--clips, --workers and --seconds must be at least 1")
    except ValueError as problem:
        parser.error(str(problem))
    source = provenance("benchmarks.loader_scaling", options.device.partition(":")[0], given_arguments(arguments))
    with tempfile.TemporaryDirectory() as folder:
        path = options.store or kinetics_like(options.keep or Path(folder), options.codec)
        split = Store.open(path).split(options.split)
        common = {"benchmark": "loader_scaling", "store": path.name, "codec": split.video_codec, "clips": options.clips}
        sizes = {"clips": options.clips, "seconds": options.seconds, "device": options.device}
        tell_rows(rows(split, options.workers, **sizes), options.out, common, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
