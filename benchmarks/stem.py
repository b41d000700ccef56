"""The first convolutions: `python -m benchmarks.stem [--device cuda] [--clips 8 32] [--out FILE]`, about 20 seconds.

Fast's, 3 -> 8 channels, kernel 5x7x7, on 32 frames of 224 px, and Slow's, 3 -> 64 channels, kernel 1x7x7, on every
eighth, both with stride 1,2,2 in bfloat16: milliseconds forward and of the weight gradient by the library's own
kernels, by grouped pixels, and by the plain convolution, with TFLOP/s of the real convolution (zeros not counted) and
GB/s of its input and output. The smallest batch comes first, and --out is written anew after each row.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_timing import check_out, copy_bandwidth, machine, time_us, write_whole
from kernels.stem import STEM_WEIGHTS, STRIDE, covers, padding, stem_conv
from model.convolutions import FactoredConv3d, set_grouping

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PATHWAYS = ("fast", "slow")
Call = Callable[[], Any]


def draw_frames(clips: int, frames: int, pixels: int, dtype: torch.dtype, device: str) -> Tensor:
    """(N, 4, T, H, W) channels_last_3d normal values, the fourth channel zero."""
    rows = torch.randn((clips, frames, pixels, pixels, 4), device=device, dtype=dtype)
    rows[..., 3] = 0
    return rows.movedim(-1, 1)


def ways(frames: Tensor, weight: Tensor) -> dict[str, tuple[Call, Call]]:
    """By name: a call of the forward, and a call of the weight gradient alone.

    Args:
        frames: (N, 4, T, H, W).
        weight: one of `STEM_WEIGHTS`, float32, a leaf.

    Returns:
        "own" only where the library's kernels cover the input.
    """
    found: dict[str, tuple[Call, Call]] = {}
    if covers(frames, weight):
        found["own"] = _calls(lambda: stem_conv(frames, weight), weight)
    module = FactoredConv3d(3, weight.shape[0], weight.shape[2:], STRIDE, padding(weight), bias=False)
    module.to(device=frames.device, dtype=frames.dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    set_grouping(module, "always")
    if module.takes_four_channels(frames[:, :3]):
        found["grouped"] = _calls(lambda: module(frames), module.weight)
    plain = weight.detach().to(frames.dtype, memory_format=torch.channels_last_3d).requires_grad_()
    rows = frames[:, :3].contiguous(memory_format=torch.channels_last_3d)
    found["plain"] = _calls(lambda: F.conv3d(rows, plain, None, STRIDE, padding(weight)), plain)
    return found


def _calls(forward: Callable[[], Tensor], weight: Tensor) -> tuple[Call, Call]:
    y = forward()
    gradient = torch.randn_like(y)

    def run_forward() -> Tensor:
        with torch.no_grad():
            return forward()

    return run_forward, lambda: torch.autograd.grad(y, weight, gradient, retain_graph=True)


def measure(pathway: str, clips: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: every way at one batch size.

    Args:
        pathway: "fast" or "slow".
        clips: N.
        options: of the command line.

    Returns:
        milliseconds by way and pass, TFLOP/s and GB/s beside them.
    """
    dtype, px = DTYPES[options.dtype], options.pixels
    shape, t = {
        "fast": (STEM_WEIGHTS[0], options.frames),
        "slow": (STEM_WEIGHTS[1], max(options.frames // 8, 1)),
    }[pathway]
    frames = draw_frames(clips, t, px, dtype, options.device)
    weight = (torch.randn(shape, device=options.device) * 0.05).requires_grad_()
    outputs = clips * t * ((px + 1) // 2) ** 2 * shape[0]
    flop, moved = 2 * outputs * weight[0].numel(), 2 * (frames.numel() + outputs)
    row: dict[str, Any] = {"pathway": pathway, "clips": clips}
    for name, calls in ways(frames, weight).items():
        for part, call in zip(("forward", "weight_grad"), calls, strict=True):
            repeats = options.repeats if name == "own" else max(options.repeats // 4, 3)
            us = time_us(call, options.device, repeats=repeats)
            row[f"{name}_{part}"] = {
                "ms": round(us / 1e3, 4),
                "tflops": round(flop / us / 1e6, 1),
                "gbps": round(moved / us / 1e3, 1),
            }
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        what was measured.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stem", description="Time the first convolutions.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, nargs="+", default=[8, 32], help="batch sizes")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; a quarter for other ways")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    for name in ("repeats", "frames", "pixels"):
        if getattr(options, name) < 1:
            parser.error(f"{name} ({getattr(options, name)}) must be at least 1")
    if min(options.clips) < 1:
        parser.error(f"clips ({min(options.clips)}) must be at least 1")
    try:
        check_out(options.out)
    except ValueError as problem:
        parser.error(str(problem))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        result = _run(options)
    sys.stdout.write(_table(result))
    return result


def _run(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine(options.device), "finished": False, "rows": []}
    result |= {name: getattr(options, name) for name in ("frames", "pixels", "dtype")}
    large = options.device == "cuda"
    result["copy_gbps"] = round(copy_bandwidth(options.device, size_mib=512 if large else 64, repeats=20), 1)
    cases = [(pathway, clips) for clips in sorted(options.clips) for pathway in PATHWAYS]
    for pathway, clips in cases:
        result["rows"].append(measure(pathway, clips, options))
        result["finished"] = len(result["rows"]) == len(cases)
        if options.out is not None:
            write_whole(options.out, result)
    return result


def _table(result: dict[str, Any]) -> str:
    lines = [f"copy {result['copy_gbps']} GB/s; {json.dumps(result['machine'])}"]
    for row in result["rows"]:
        for name, value in row.items():
            if isinstance(value, dict):
                lines.append(
                    f"{row['pathway']} N = {row['clips']:3d} {name:20s} {value['ms']:9.3f} ms "
                    f"{value['tflops']:7.1f} TFLOP/s {value['gbps']:7.1f} GB/s"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
