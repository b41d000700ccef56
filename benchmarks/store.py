"""The store against plain files, and the cost of an index of a million clips.

    python -m benchmarks.store                       # all, about 10 minutes of encoding
    python -m benchmarks.store --videos 10 --clips 50 --media 100000

Writes benchmarks/results/store.json and prints a table. A clip is 64 frames and 33 024 samples, random start; both
sides decode with PyAV in one thread. Bytes read are those of the process (/proc/self/io, page cache included).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from benchmarks.store_cases import FPS, QUALITY, make_million, make_sources
from pipeline.clip import ClipPlan, ClipSpec
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.folder.dataset import FolderSplit, PlainFolder
from pipeline.plan import NegativeSchedule, TrainPlan
from pipeline.store.reader import Store

CLIP_FRAMES, FRAME_STEP, CLIP_SAMPLES = 64, 2, 33_024
CODECS = ("vp9", "h264")
ROOT = Path(__file__).resolve().parent.parent


def bytes_read() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def memory_mib() -> dict[str, float]:
    """Resident memory of this process in MiB: all, anonymous, pages of files, and the most it ever was."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    names = {"all": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {key: round(int(lines[name].split()[0]) / 1024, 1) for key, name in names.items()}


def frames_to_decode(path: str, first: int, last: int) -> int:
    """Frames that a decoder gives from the key frame before `first` to the frame after `last`, of a plain file.

    Args:
        path: a video of constant rate `FPS`.
        first: number of the first frame wanted.
        last: number of the last one.
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        ticks_per_frame = 1 / (FPS * stream.time_base)
        start = stream.start_time or 0
        container.seek(start + int(first * ticks_per_frame), stream=stream, backward=True)
        count = 0
        for frame in container.decode(stream):
            count += 1
            if frame.pts is not None and frame.pts > start + last * ticks_per_frame:
                break
        return count


def draw_clips(dataset: Dataset, num_clips: int, seed: int = 0) -> list[tuple[int, int]]:
    """(media, first frame) of random clips."""
    rng = np.random.default_rng(seed)
    media = rng.integers(0, len(dataset.media), num_clips)
    return [(int(m), int(rng.integers(0, dataset.media.num_frames[m] - CLIP_FRAMES + 1))) for m in media]


def open_source(name: str, path: Path) -> Dataset:
    """A folder of plain files or a store as a Dataset."""
    return PlainFolder.open(path).split("all") if name == "plain" else Store.open(path).split("all")


def compare(sources: dict[str, Path], num_clips: int) -> dict[str, dict[str, float]]:
    """Read the same random clips from all, interleaved; per clip: bytes, decoded frames; clips/s."""
    datasets = {name: open_source(name, path) for name, path in sources.items()}
    clips = draw_clips(datasets["plain"], num_clips)
    read, frames, seconds = (dict.fromkeys(datasets, 0.0) for _ in range(3))
    for media, first in clips:
        numbers = np.arange(first, first + CLIP_FRAMES, FRAME_STEP)
        for name, dataset in datasets.items():
            before, began = bytes_read(), time.perf_counter()
            dataset.read_frames(media, numbers)
            dataset.read_audio(media, first * 16_000 // FPS, CLIP_SAMPLES)
            seconds[name] += time.perf_counter() - began
            read[name] += bytes_read() - before
            last = int(numbers[-1])
            if isinstance(dataset, FolderSplit):
                frames[name] += frames_to_decode(dataset.files[media].path, first, last)
            else:
                frames[name] += dataset.read_video(media, first, last).num_frames
    return {
        name: {
            "kib_per_clip": round(read[name] / num_clips / 1024, 1),
            "decoded_frames_per_clip": round(frames[name] / num_clips, 1),
            "clips_per_s": round(num_clips / seconds[name], 2),
        }
        for name in datasets
    }


def timed_ms(call: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - began) * 1e3


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile."""
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 90, 99)}


def cut_cost(store: Path, num_clips: int) -> dict[str, Any]:
    """Milliseconds of a cut (bytes, checksums) and of its sound, and the last clip of a video against the first."""
    dataset = Store.open(store).split("all")
    clips = draw_clips(dataset, num_clips, seed=1)
    video = [timed_ms(dataset.read_video, m, f, f + CLIP_FRAMES - 1) for m, f in clips]
    audio = [timed_ms(dataset.read_audio, m, f * 16_000 // FPS, CLIP_SAMPLES) for m, f in clips]
    return {"video_ms": percentiles(video), "audio_ms": percentiles(audio)}


def start_ratio(dataset: Dataset, rounds: int) -> dict[str, float]:
    """Time of the last clip of medium 0 over its first one (medians of interleaved calls), cut and cut + decode."""
    span = CLIP_FRAMES - 1
    last = (int(dataset.media.num_frames[0]) - CLIP_FRAMES) // 12 * 12  # both begin with a fragment
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for first in (0, last):
            if "dali" in dataset.decoders:
                cut = timed_ms(dataset.read_video, 0, first, first + span)
                times.setdefault(("cut", first), []).append(cut)
            frames = np.arange(first, first + CLIP_FRAMES, FRAME_STEP)
            whole = timed_ms(dataset.read_frames, 0, frames)
            times.setdefault(("cut_and_decode", first), []).append(whole)
    median = {key: float(np.median(values)) for key, values in times.items()}
    names = {name for name, _ in median}
    return {"last_frame": last} | {f"{n}_ratio": round(median[n, last] / median[n, 0], 3) for n in sorted(names)}


def read_clip(dataset: Dataset, clip: ClipPlan) -> None:
    """All that training reads of a clip: bytes, its sound and another's, label and name."""
    dataset.read_video(clip.media, min(clip.frames), max(clip.frames))
    dataset.read_audio(clip.media, clip.audio_start, CLIP_SAMPLES)
    dataset.read_audio(max(clip.negative_media, 0), clip.negative_start, CLIP_SAMPLES)
    dataset.samples.label_of(clip.sample, "action")
    dataset.samples.id(clip.sample)


def plan_batch(plan: TrainPlan, number: int) -> list[ClipPlan]:
    """The plans of one batch of 64 clips."""
    return [plan.clip(64 * number + i) for i in range(64)]


def plan_and_read(dataset: Dataset, plan: TrainPlan, position: int) -> None:
    """Plan the clip at a position and read all of it."""
    read_clip(dataset, plan.clip(position))


def measure_million(path: Path, num_cuts: int = 20_000) -> dict[str, Any]:
    """Open a large store in this process, plan and cut from it; run in a fresh process."""
    memory = {"imports": memory_mib()}
    began = time.perf_counter()
    store = Store.open(path)
    open_s = time.perf_counter() - began
    dataset = store.split("train")
    split_s = time.perf_counter() - began - open_s
    store.wait_for_checks()
    checked_s = time.perf_counter() - began
    memory["open"] = memory_mib()
    spec = ClipSpec(num_frames=32, frame_stride=2)
    batches = {}
    for enabled in (False, True):
        plan = TrainPlan(dataset, spec, DataConfig(), seed=0, negatives=NegativeSchedule(enabled=enabled))
        first_ms = timed_ms(plan.clip, 0)
        times = [timed_ms(plan_batch, plan, b) for b in range(100)]
        batches[enabled] = percentiles(times)
    memory["plan"] = memory_mib()
    rng = np.random.default_rng(0)
    cuts = []
    for media in rng.integers(0, len(dataset.media), num_cuts).tolist():
        cuts.append(timed_ms(dataset.read_video, media, 100, 163))
    memory["after_cuts"] = memory_mib()
    clips = [timed_ms(plan_and_read, dataset, plan, position) for position in range(num_cuts)]
    memory["after_clips"] = memory_mib()
    return {
        "media": len(store.media),
        "index_mib": round(sum(d.bytes for n, d in store.info.files.items() if n.endswith(".arrow")) / 2**20, 1),
        "open_s": round(open_s, 3),
        "tables_checked_after_s": round(checked_s, 3),
        "split_s": round(split_s, 3),
        "plan_first_clip_of_epoch_ms": round(first_ms, 1),
        "plan_batch_of_64_ms": batches[False],
        "plan_batch_of_64_with_negatives_ms": batches[True],
        "cut_ms": percentiles(cuts),
        "clip_with_sound_ms": percentiles(clips),
        "memory_mib": memory,
        "peak_mib": memory["after_clips"]["peak"],
        "growth_over_imports_mib": round(memory["after_clips"]["peak"] - memory["imports"]["all"], 1),
    }


def million(root: Path, num_media: int) -> dict[str, Any]:
    """measure_million in a fresh process."""
    path = make_million(root / "million", num_media)
    command = [sys.executable, "-m", "benchmarks.store", "--measure", str(path)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {"python": platform.python_version(), "av": av.__version__, "pyarrow": pa.__version__}
    return {"cpu": cpu, "cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)} | {
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def run(root: Path, num_videos: int, num_frames: int, num_clips: int, num_media: int) -> dict[str, Any]:
    """All measurements as one dictionary."""
    sources = make_sources(root / "many", num_videos, num_frames, CODECS, os.cpu_count() or 1)
    long = make_sources(root / "long", 1, num_frames * 10, CODECS[:1], 1)
    return {
        "machine": machine(),
        "settings": {"videos": num_videos, "frames": num_frames, "clips": num_clips, "quality": QUALITY},
        "per_clip": compare(sources, num_clips),
        "cut": cut_cost(sources[CODECS[0]], num_clips),
        "last_over_first": {
            "store": start_ratio(open_source("store", long[CODECS[0]]), 40),
            "plain": start_ratio(open_source("plain", long["plain"]), 5),
        },
        "million": million(root, num_media),
    }


def table(result: dict[str, Any]) -> str:
    """The figures that matter, as text."""
    rows: list[tuple[str, ...]] = [("", "plain files", "store, VP9", "store, H.264")]
    for key, title in (
        ("kib_per_clip", "KiB read per clip"),
        ("decoded_frames_per_clip", "frames decoded per clip"),
        ("clips_per_s", "clips/s, one thread, PyAV"),
    ):
        rows.append((title, *(str(result["per_clip"][name][key]) for name in ("plain", *CODECS))))
    rows.append(("video cut, ms (p50 / p99)", "", "{p50} / {p99}".format(**result["cut"]["video_ms"])))
    rows.append(("audio cut, ms (p50 / p99)", "", "{p50} / {p99}".format(**result["cut"]["audio_ms"])))
    rows.append(("last clip / first clip, cut", "", str(result["last_over_first"]["store"]["cut_ratio"])))
    ratios = (str(result["last_over_first"][name]["cut_and_decode_ratio"]) for name in ("plain", "store"))
    rows.append(("last clip / first clip, with decode", *ratios))
    large = result["million"]
    rows.append((f"open an index of {large['media']} clips, s", "", str(large["open_s"])))
    rows.append(("plan of a batch of 64, ms (p50)", "", str(large["plan_batch_of_64_ms"]["p50"])))
    negatives = large["plan_batch_of_64_with_negatives_ms"]["p50"]
    rows.append(("the same with negatives, ms (p50)", "", str(negatives)))
    rows.append(("resident memory, at most, MiB", "", str(large["peak_mib"])))
    rows.append(("memory added to the process, MiB", "", str(large["growth_over_imports_mib"])))
    return "\n".join(f"{row[0]:44}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--media", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "store.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        sys.stdout.write(json.dumps(measure_million(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.videos, options.frames, options.clips, options.media)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result) + "\n")


if __name__ == "__main__":
    main()
