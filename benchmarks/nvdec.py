"""What NVDEC does with decoders that live on: `python -m benchmarks.nvdec calls|exact|rates [--out FILE]`.

calls  whether one call takes a whole clip, what it costs by stages, and whether other Python threads run meanwhile
exact  planes of 200 clips, with and without B-frames and of two sizes in turn, byte for byte against FFmpeg on the CPU
rates  clips per second by threads and processes, with the decoder's utilisation beside it

Clips are 64 of 72 pictures of noise that drifts, GOP 12, of which 32 are wanted. `--device cpu` is a rehearsal: FFmpeg
stands in for NVDEC, and nothing there is a figure. Rows are appended as they come.
"""

import argparse
import functools
import io
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.decoder_load import DecoderLoad
from benchmarks.kernel_timing import check_out
from benchmarks.result_rows import given_arguments, provenance, tell_rows
from pipeline.media.annexb import AnnexB, to_annex_b
from pipeline.media.fragments import MOVFLAGS, FragmentedVideo, parse_fragments
from pipeline.media.yuv import decode_cut
from pipeline.nvdec.decoder import FFmpegDecoder, StreamDecoder, StreamKind, on_host
from pipeline.nvdec.hardware import HardwareDecoder, why_not
from pipeline.nvdec.pool import DecoderPool

WANTED = np.arange(0, 64, 2)
SPIN_S = 0.5


def encode(side_px: int, frames: int, bframes: int, seed: int = 0) -> FragmentedVideo:
    """Drifting noise as a store has it, one fragment a GOP of 12, with as many B-frames as asked."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (side_px // 4, side_px // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    parameters = f"keyint=12:min-keyint=12:scenecut=0:open-gop=0:bframes={bframes}"
    options = {"preset": "veryfast", "threads": "1", "x264-params": parameters}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": MOVFLAGS}) as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width = stream.height = side_px
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.roll(noise, (number, 2 * number), (0, 1)) // 2 + number % 100
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return parse_fragments(buffer.getvalue(), fps=Fraction(30), width=side_px, height=side_px)


def clips_of(video: FragmentedVideo) -> list[bytes]:
    """Every cut of six GOPs."""
    return [video.init + b"".join(video.fragments[i : i + 6]) for i in range(len(video.fragments) - 5)]


def kind_of(video: FragmentedVideo) -> StreamKind:
    """What its decoder is made for."""
    return StreamKind("h264", video.width, video.height)


def maker(device: str) -> Callable[[StreamKind], StreamDecoder]:
    """Makes decoders of a device."""
    return FFmpegDecoder if device == "cpu" else HardwareDecoder


def wait(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def calls(device: str, side_px: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield one row for a stream without and one with B-frames."""
    for bframes in (0, 3):
        video = encode(side_px, 72, bframes)
        data, decoder = clips_of(video)[0], maker(device)(kind_of(video))
        stream = to_annex_b(data)
        decoder.decode(stream, WANTED)
        wait(device)
        row: dict[str, Any] = {"bframes": bframes, "bytes": len(data), "pictures": stream.num_frames}
        row["annex_b_ms"] = timed(functools.partial(to_annex_b, data), repeats)
        clip = functools.partial(decoder.decode, stream, WANTED)
        row["clip_ms"] = timed(clip, repeats)
        if isinstance(decoder, HardwareDecoder):
            row |= by_call(decoder, stream, repeats)
        alone, beside = spins(None), spins(clip)
        row["python_left_beside_decoding"] = round(beside / alone, 3)
        decoder.close()
        yield row


def by_call(decoder: HardwareDecoder, stream: AnnexB, repeats: int) -> dict[str, Any]:
    """What one call to the library gives: pictures by flag, and its time without any copy."""
    library, address, size = decoder._library, stream.data.ctypes.data, len(stream.data)

    def call(address: int, size: int, flag: int) -> int:
        """Pictures of one call."""
        packet = library.PacketData()
        packet.bsl_data, packet.bsl, packet.decode_flag = address, size, flag
        return len(decoder._decoder.Decode(packet))

    end = int(library.VideoPacketFlag.ENDOFSTREAM)
    with torch.cuda.stream(decoder._stream):
        row: dict[str, Any] = {"pictures_of_one_call_with_end": call(address, size, end)}
        row["pictures_behind_it"] = call(0, 0, end)
        row["pictures_of_one_call_without_end"] = call(address, size, 0)
        row["pictures_of_the_flush"] = call(0, 0, end)
        row["call_ms"] = timed(lambda: call(address, size, end), repeats)
    return row


def timed(act: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call, on the host."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return round(float(np.median(times)) * 1e3, 3)


def spins(beside: Callable[[], Any] | None) -> int:
    """Turns of a loop in this thread while another one does `beside` over and over."""
    stop = threading.Event()

    def work() -> None:
        while beside is not None and not stop.is_set():
            beside()

    thread = threading.Thread(target=work)
    thread.start()
    count, end = 0, time.perf_counter() + SPIN_S
    while time.perf_counter() < end:
        count += 1
    stop.set()
    thread.join()
    return count


def exact(device: str, side_px: int, clips: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each kind of stream: clips compared, clips and bytes that differ."""
    wide = side_px + 32
    streams = {"no B-frames": (0, side_px), "B-frames": (3, side_px), "two sizes in turn": (0, wide)}
    for name, (bframes, side) in streams.items():
        videos = [encode(side, 12 * 16, bframes, seed) for seed in range(2)]
        if name == "two sizes in turn":
            videos[1] = encode(side_px, 12 * 16, 3)
        decoders = {kind_of(video): maker(device)(kind_of(video)) for video in videos}
        cuts = [(videos[i % 2], clips_of(videos[i % 2])[i // 2 % 11]) for i in range(clips)]
        different, worst = 0, 0
        for video, data in cuts:
            planes = decoders[kind_of(video)].decode(to_annex_b(data), WANTED)
            wanted = decode_cut(data, WANTED, video.width, video.height)
            gaps = [gap(on_host(a), b) for a, b in zip((planes.luma, planes.chroma), wanted, strict=True)]
            different, worst = different + (max(gaps) > 0), max(worst, *gaps)
        for decoder in decoders.values():
            decoder.close()
        yield {"streams": name, "clips": clips, "different": different, "largest_difference": worst}


def gap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    """Largest difference of two planes of the same shape."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(np.int16) - other).max())


def rates(
    device: str, side_px: int, seconds: float, threads: list[int], processes: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield one row for each number of processes and threads in each."""
    data = clips_of(encode(side_px, 72, 0))[0]
    for count in processes:
        for number in threads:
            with DecoderLoad(device) as load:
                done = many(device, data, side_px, seconds, number, count)
            yield {"processes": count, "threads": number, "clips_per_second": round(done, 1), **load.row()}


def many(device: str, data: bytes, side_px: int, seconds: float, threads: int, processes: int) -> float:
    """Clips per second of all processes, each with a pool of threads; they begin together."""
    if processes == 1:
        return pool_rate(device, data, side_px, seconds, threads, lambda: None)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    arguments = (device, data, side_px, seconds, threads, barrier, answers)
    children = [context.Process(target=_child, args=arguments, daemon=True) for _ in range(processes)]
    for child in children:
        child.start()
    total = sum(answers.get(timeout=60) for _ in children)
    for child in children:
        child.join(10)
    return float(total)


def _child(device: str, data: bytes, side_px: int, seconds: float, threads: int, barrier: Any, answers: Any) -> None:
    answers.put(pool_rate(device, data, side_px, seconds, threads, lambda: barrier.wait(60)))


def pool_rate(device: str, data: bytes, side_px: int, seconds: float, threads: int, ready: Callable[[], Any]) -> float:
    """Clips per second of one pool: conversion, decoding and copies of the wanted pictures."""
    pool, kind = DecoderPool(maker(device), threads), StreamKind("h264", side_px, side_px)

    def submit() -> "Future[Any]":
        return pool.submit(lambda decoders: decoders.decode(kind, to_annex_b(data), WANTED))

    for future in [submit() for _ in range(2 * threads)]:
        pool.result(future)
    ready()
    began, done = time.perf_counter(), 0
    waiting = [submit() for _ in range(2 * threads)]
    while time.perf_counter() - began < seconds:
        pool.result(waiting.pop(0))
        waiting.append(submit())
        done += 1
    wait(device)
    rate = done / (time.perf_counter() - began)
    pool.close()
    return rate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nvdec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("calls", "exact", "rates"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--repeats", type=int, default=50, help="of a timed call")
    parser.add_argument("--clips", type=int, default=200, help="compared, of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one rate")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 1 where planes differ, 2 where there is no NVDEC."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
    except ValueError as problem:
        parser.error(str(problem))
    if options.device == "cuda" and (reason := why_not(0)):
        print(f"error: NVDEC cannot be used: {reason}; --device cpu rehearses", file=sys.stderr)
        return 2
    found = {
        "calls": lambda: calls(options.device, options.pixels, options.repeats),
        "exact": lambda: exact(options.device, options.pixels, options.clips),
        "rates": lambda: rates(options.device, options.pixels, options.seconds, options.threads, options.processes),
    }[options.what]()
    source = provenance("benchmarks.nvdec", options.device, given_arguments(arguments))
    common = {"benchmark": "nvdec", "what": options.what, "pixels": options.pixels}
    rows = tell_rows(found, options.out, common, source)
    return int(any(row.get("different", 0) > 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
