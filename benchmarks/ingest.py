"""Ingest against `ffmpeg` with the same settings on the same files and cores, as a ratio in one run.

    python -m benchmarks.ingest [--files 12] [--seconds 10] [--repeats 3] [--out results.json]

Both decode, scale to short side 256, encode with the store's settings into fragmented MP4 and resample the audio to
16 kHz mono PCM. Two ways of running ffmpeg are timed, and the faster one counts: one process per core with one thread
each, and one process at a time with its own threads. Ingest also reads every packet beforehand, checks, hashes, and
writes the finished store. The library inside this package and the `ffmpeg` on the path may differ in version: both are
printed. Arms are interleaved; medians are compared, by the wall clock and, because that says little on a machine with
other work on it, by processor seconds too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.annotations import read
from pipeline.ingest.item import DEFAULT_QUALITY, TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.media.fragments import ENCODERS, MOVFLAGS, encoder_options


def make_source(path: Path, *, seconds: float, size: tuple[int, int], seed: int) -> None:
    """Write an H.264 + AAC file with moving texture and noise, about as hard to code as real footage."""
    width, height = size
    generator = np.random.Generator(np.random.Philox(seed))
    base = generator.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(30000, 1001), options={"preset": "veryfast", "crf": "23"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=44100, layout="stereo")
        noise = generator.integers(-6, 7, (height, width, 3), dtype=np.int16)
        for number in range(round(seconds * 30)):
            x, y = 3 * number % 448, 2 * number % 448
            picture = base[y : y + height, x : x + width].astype(np.int16) + np.roll(
                noise, 7 * number, (0, 1)[number % 2]
            )
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = (generator.standard_normal((2, round(seconds * 44100))) * 0.1).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        sound.sample_rate = 44100
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def ffmpeg_command(source: Path, out: Path, codec: str, threads: int) -> list[str]:
    """Return the command that makes the same media as ingest does."""
    options = encoder_options(codec, 12, DEFAULT_QUALITY[codec])
    if threads != 1:
        options.pop("threads", None)
    encoder = [text for key, value in options.items() for text in (f"-{key}:v", value)]
    scale = "scale=480:256:flags=bicubic"  # what ingest makes of 640x352
    return [
        *("ffmpeg", "-nostdin", "-v", "error", "-y", "-threads", str(threads), "-i", str(source)),
        *("-map", "0:v:0", "-vf", scale, "-pix_fmt", "yuv420p", "-c:v", ENCODERS[codec], *encoder),
        *("-filter_threads", str(threads), "-movflags", MOVFLAGS, "-an", f"{out}.mp4"),
        *("-map", "0:a:0", "-ar", "16000", "-ac", "1", "-c:a", "pcm_s16le", "-f", "s16le", f"{out}.pcm"),
    ]


def clocks() -> tuple[float, float]:
    """Wall clock and processor seconds of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in used)


def since(begin: tuple[float, float]) -> tuple[float, float]:
    """Seconds of both clocks since `begin`."""
    wall, processor = clocks()
    return wall - begin[0], processor - begin[1]


def time_ffmpeg(sources: list[Path], folder: Path, codec: str, processes: int, threads: int) -> tuple[float, float]:
    """Wall and processor seconds that ffmpeg needs for all files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    commands = [ffmpeg_command(source, folder / source.stem, codec, threads) for source in sources]
    began = clocks()
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    return since(began)


def time_ingest(videos: Path, out: Path, codec: str, workers: int) -> tuple[float, float]:
    """Wall and processor seconds that ingest needs for the same files, to the finished store."""
    shutil.rmtree(out, ignore_errors=True)
    began = clocks()
    report = ingest(
        read("folder", None, videos), videos, out, TranscodeSettings(codec=codec), None, IngestOptions(workers)
    )
    seconds = since(began)
    assert report.counts["refused"] == 0, report.lines()
    return seconds


def measure(codec: str, videos: Path, scratch: Path, cores: int, repeats: int) -> dict[str, object]:
    """Time all arms interleaved and return seconds of both clocks and the ratios."""
    sources = sorted(videos.iterdir())
    arms: dict[str, Callable[[], tuple[float, float]]] = {
        "ingest": lambda: time_ingest(videos, scratch / "store", codec, cores),
        "ffmpeg_processes": lambda: time_ffmpeg(sources, scratch / "one", codec, cores, 1),
        "ffmpeg_threads": lambda: time_ffmpeg(sources, scratch / "many", codec, 1, 0),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            times[name].append(run())
    result: dict[str, object] = {"codec": codec}
    for place, clock in enumerate(("wall_s", "processor_s")):
        medians = {name: statistics.median(value[place] for value in values) for name, values in times.items()}
        best = min(medians["ffmpeg_processes"], medians["ffmpeg_threads"])
        result[clock] = {name: [round(value[place], 2) for value in values] for name, values in times.items()}
        result[f"share_of_best_ffmpeg_by_{clock[:-2]}"] = round(best / medians["ingest"], 3)
        same = medians[
            "ffmpeg_processes"
        ]  # as many processes as ingest has: a fair share of a machine that is not idle
        result[f"share_of_ffmpeg_processes_by_{clock[:-2]}"] = round(same / medians["ingest"], 3)
    return result


def main() -> None:
    """Run the comparison and print, or write, JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--codecs", default="h264,vp9")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        raise SystemExit("ffmpeg (not found) must be on the path for this comparison; apt-get install ffmpeg")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        videos = Path(name) / "videos"
        videos.mkdir()
        for number in range(options.files):
            make_source(videos / f"{number:03d}.mp4", seconds=options.seconds, size=(640, 352), seed=number)
        results = [measure(codec, videos, Path(name), cores, options.repeats) for codec in options.codecs.split(",")]
        size = sum(path.stat().st_size for path in videos.iterdir())
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    document = {
        "what": "ingest against ffmpeg with the same settings",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f} at the end",
        "versions": {"ffmpeg": version, "av": av.__version__, "libavcodec": av.library_versions["libavcodec"]},
        "files": options.files,
        "source": f"640x352, 29.97 fps, {options.seconds:g} s, H.264 + AAC stereo, {size / 2**20:.1f} MiB in all",
        "results": results,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
