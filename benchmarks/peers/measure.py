"""One way in a process of its own: `python -m benchmarks.peers.measure WAY FOLDER`, which ends with a JSON line.

Processor seconds and bytes are those of the whole process tree between two batches, in steady state: nothing waits
between batches, so what is begun at one end is begun at the other. The parent watches the memory.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peers.clips import check_clip
from benchmarks.peers.common import Clip, Settings

# Way -> module, function, packages whose versions count.
WAYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "PyAV + DataLoader, as PySlowFast": ("pyav_ways", "pyslowfast", ("av",)),
    "PyAV + DataLoader, tuned": ("pyav_ways", "tuned", ("av",)),
    "torchcodec + DataLoader": ("torchcodec_ways", "basic", ("torchcodec",)),
    "torchcodec + DataLoader, tuned": ("torchcodec_ways", "tuned", ("torchcodec",)),
    "torchcodec in threads, tuned": ("torchcodec_ways", "threads", ("torchcodec",)),
    "SPDL": ("other_ways", "spdl_threads", ("spdl-io",)),
    "decord + DataLoader": ("other_ways", "decord_loader", ("decord",)),
    "PyTorchVideo + DataLoader": ("other_ways", "pytorchvideo_loader", ("pytorchvideo",)),
}
PROJECT = "this project"
COARSE_SOUND = {"PyTorchVideo + DataLoader": 48.0}  # ms: its sound begins with a whole AAC frame of 21 ms
CHECKED_BATCHES, WARM_UP_BATCHES = 2, 3


def tree() -> list[psutil.Process]:
    """This process and everything below it."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def used() -> tuple[float, int]:
    """Processor seconds and bytes read of the whole tree."""
    seconds, read = 0.0, 0
    for process in tree():
        try:
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
            read += process.io_counters().read_chars
        except psutil.NoSuchProcess:
            continue  # what it used is its parent's from now on
    return seconds, read


def way_of(name: str) -> Callable[[str, Settings], Iterator[Clip]]:
    """The way of a name, as a function of a folder.

    Raises:
        ImportError: it is not installed.
    """
    if name == PROJECT:
        return import_module("benchmarks.peers.project").batches  # type: ignore[no-any-return]
    module, function, packages = WAYS[name]
    for package in packages:
        version(package)
    way = getattr(import_module(f"benchmarks.peers.{module}"), function)

    def of_folder(folder: str, settings: Settings) -> Iterator[Clip]:
        """Give the way the videos of a folder."""
        videos = sorted(str(path) for path in Path(folder).glob("*.mp4"))
        return way(videos, settings)  # type: ignore[no-any-return]

    return of_folder


def checked(batch: Clip, tolerance_ms: float = 24.0) -> list[tuple[int, float]]:
    """First frame and click error of every clip of a batch; raises ValueError where one is wrong."""
    frames, mel = batch
    return [check_clip(frames[i].float().numpy(), mel[i, 0].numpy(), tolerance_ms) for i in range(len(frames))]


def measure(
    make: Callable[[], Iterator[Clip]], settings: Settings, seconds: float, tolerance_ms: float = 24.0
) -> dict[str, Any]:
    """Check the first batches and time those after them.

    Args:
        make: starts the way. seconds: of timing, at least; ends on an even number of batches.
        tolerance_ms: of the clicks.

    Returns:
        clips_per_s, cpu_s_per_clip, bytes_per_clip, first_batch_s, clips, first_frames, click_error_ms.
    """
    began = time.perf_counter()
    stream = make()
    first = next(stream)
    first_batch_s = time.perf_counter() - began
    found = [
        checked(batch, tolerance_ms) for batch in chain([first], (next(stream) for _ in range(CHECKED_BATCHES - 1)))
    ]
    for _ in range(WARM_UP_BATCHES):  # what was made ahead while the others were checked
        next(stream)
    (cpu, read), began, count = used(), time.perf_counter(), 0
    while count % 2 or time.perf_counter() - began < seconds:
        next(stream)
        count += 1
    wall = time.perf_counter() - began
    cpu_end, read_end = used()
    clips = count * settings.clips
    results = [clip for batch in found for clip in batch]
    return {
        "clips_per_s": round(clips / wall, 2),
        "cpu_s_per_clip": round((cpu_end - cpu) / clips, 4),
        "bytes_per_clip": round((read_end - read) / clips),
        "first_batch_s": round(first_batch_s, 2),
        "clips": clips,
        "first_frames": [number for number, _ in results],
        "click_error_ms": round(max(error for _, error in results), 1),
    }


def _versions(name: str) -> dict[str, str]:
    packages = ("nvidia-dali-cuda120", "av") if name == PROJECT else WAYS[name][2]
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; prints one JSON line, with "failed" where the way cannot be run, and ends without clean-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=[*WAYS, PROJECT])
    parser.add_argument("folder")
    parser.add_argument("--clips", type=int, default=Settings.clips)
    parser.add_argument("--workers", type=int, default=Settings.workers)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keys", default="{}", help="JSON of further settings of this project's loader")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = Settings(options.clips, options.workers, options.seed)
    try:
        way = way_of(options.way)
        keys = json.loads(options.keys)
        make = partial(way, options.folder, settings, **keys)
        row = measure(make, settings, options.seconds, COARSE_SOUND.get(options.way, 24.0))
        row |= {"versions": _versions(options.way)}
    except Exception as error:  # whatever a library throws is its row
        row = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()
    for process in tree()[1:]:
        process.kill()
    os._exit(0)  # some libraries hang while they are taken down


if __name__ == "__main__":
    main()
