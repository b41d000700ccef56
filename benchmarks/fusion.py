"""Fused operations against PyTorch's ways: `python -m benchmarks.fusion [--device cuda] [--clips 8 32] [--out FILE]`.

Four lateral stages, six normalisation sites and two stems of R50 4x16 at 224^2, forward and backward: microseconds,
bytes that must move, and the share of the same run's copy bandwidth. The single operations are timed as well.
Opponents: eager 5-D, eager through the 4-D view (float16 on CUDA is cuDNN's), torch.compile, apex groupbn (float16)
where NVIDIA apex has it. The smallest batch comes first, and --out is written anew after every row, with "finished":
false until the end: a run that is ended early keeps what it measured.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import check_out, copy_bandwidth, machine, time_us, use_processor_time, write_whole
from benchmarks.ops.sites import LATERALS, NORMS, Run, Site, draw, opponents
from kernels.apex_support import apex_status
from kernels.library import fused_devices

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # in the order of interest


def compare(
    site: Site,
    clips: int,
    dtype: torch.dtype,
    device: str,
    *,
    repeats: int,
    compiled: tuple[str, ...],
    copy_gbps: float,
) -> dict[str, Any]:
    """One row: every way at one site.

    Args:
        site: the place.
        clips: N.
        dtype: of the activations.
        device: "cpu" or "cuda".
        repeats: timed calls.
        compiled: torch.compile modes.
        copy_gbps: this run's copy rate.

    Returns:
        medians in microseconds by name (warm; cold too on CUDA), bytes, share of the copy rate, ratios over fused; an
        opponent that fails is in `failed` with its error, and costs its own figure only.
    """
    moved = site.bytes_moved(clips, torch.empty(0, dtype=dtype).element_size())
    runs = opponents(site, clips, dtype, device, compiled=compiled)
    warm: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, run in list(runs.items()):
        try:
            warm[name] = time_us(run, device, repeats=repeats)
        except (RuntimeError, TypeError, AssertionError) as error:  # a compiler's or apex's; ours must not fail
            if name.startswith("fused"):
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del runs[name]
    row: dict[str, Any] = {
        "site": site.name,
        "kind": "lateral" if site.lateral else "stem" if site.pool else "norm",
        "shape": list(site.shape(clips)),
        "lateral_channels": site.lateral,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "us": {name: round(value, 2) for name, value in warm.items()},
        "over_fused": {name: round(value / warm["fused"], 3) for name, value in warm.items()},
        "share_of_copy": round(moved / warm["fused"] / 1e3 / copy_gbps, 3),
    }
    if failed:
        row["failed"] = failed
    if device == "cuda":
        cold = {name: time_us(run, device, repeats=repeats, cold=True) for name, run in runs.items()}
        row["us_cold"] = {name: round(value, 2) for name, value in cold.items()}
    return row


def single_operations(site: Site, clips: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Each primitive operation of namespace avsf at one normalisation site; a quarter of its channels as a lateral.

    Args:
        site: a site without lateral.
        clips: N.
        dtype: of the activations.
        device: "cpu" or "cuda".
        repeats: timed calls.

    Returns:
        per operation: microseconds, bytes that must move, GB/s.
    """
    result = {}
    for name, (call, moved) in _operations(site, clips, dtype, device).items():
        us = time_us(call, device, repeats=repeats)
        result[name] = {"us": round(us, 2), "bytes": moved, "gb_per_s": round(moved / us / 1e3, 1)}
    return result


def _operations(site: Site, clips: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Run, int]]:
    """Call and bytes that must move by operation."""
    avsf, groups = torch.ops.avsf, max(1, clips // 8)
    x, dy, residual = (draw(site.shape(clips), dtype, device).detach() for _ in range(3))
    w = torch.ones(site.channels, device=device)
    coef = avsf.bn_finalize(avsf.bn_stats(x, groups), w, w, 1e-5)
    _, mask = avsf.bn_act(x, coef, residual, None, None, None, True)
    sums = avsf.bn_act_bwd_reduce(dy, x, None, mask, coef, None, groups, True)
    tensor, bits = x.nbytes, mask.nbytes
    stats = avsf.bn_stats(x, groups)
    lateral = draw((clips, -(-site.channels // 4), *x.shape[2:]), dtype, device).detach()
    lateral_coef = avsf.bn_finalize(avsf.bn_stats(lateral, groups), None, None, 1e-5)
    audio = torch.randn(clips, site.channels + lateral.shape[1], site.frames, device=device).to(dtype)
    keep = torch.ones(clips, dtype=torch.bool, device=device)
    joined = tensor + lateral.nbytes
    running = [[torch.zeros_like(w) for _ in range(80)] for _ in range(2)]
    counters = [torch.zeros((), dtype=torch.long, device=device) for _ in range(80)]
    value, taps = avsf.bn_relu_maxpool(x, coef, True)[1:]
    quarter = value.nbytes
    return {
        "bn_stats": (lambda: avsf.bn_stats(x, groups), tensor),
        "bn_finalize": (lambda: avsf.bn_finalize(stats, w, w, 1e-5), stats.nbytes + coef.nbytes + 2 * w.nbytes),
        "bn_act": (lambda: avsf.bn_act(x, coef, None, None, None, None, True), 2 * tensor),
        "bn_act residual": (lambda: avsf.bn_act(x, coef, residual, None, None, None, True), 3 * tensor + bits),
        "bn_act_bwd_reduce": (
            lambda: avsf.bn_act_bwd_reduce(dy, x, None, mask, coef, None, groups, True),
            2 * tensor + bits,
        ),
        "bn_act_bwd_apply": (
            lambda: avsf.bn_act_bwd_apply(dy, x, None, mask, coef, None, sums, True, True),
            4 * tensor + bits,
        ),
        "lateral_cat": (
            lambda: avsf.lateral_cat(x, None, None, None, lateral, lateral_coef, audio, keep),
            2 * joined,
        ),
        "lateral_cat block end": (
            lambda: avsf.lateral_cat(x, coef, residual, None, lateral, lateral_coef, audio, keep),
            2 * joined + tensor + bits,
        ),
        "frame_sum": (lambda: avsf.frame_sum(dy, None), tensor),
        "running_stats_update_ 80": (
            lambda: avsf.running_stats_update_(*running, counters, [stats] * 80, 0.1),
            80 * (stats.nbytes + 4 * w.nbytes + 16),
        ),
        "bn_relu_maxpool": (lambda: avsf.bn_relu_maxpool(x, coef, True), tensor + 2 * quarter + taps.nbytes),
        "bn_relu_maxpool_bwd_apply": (
            lambda: avsf.bn_relu_maxpool_bwd_apply(value, x, taps, coef, sums),
            2 * tensor + quarter + taps.nbytes,
        ),
    }


def measure(
    device: str,
    *,
    clips: tuple[int, ...] = (8, 16, 32, 64),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    compiled: tuple[str, ...] = ("default",),
    compiled_clips: tuple[int, ...] | None = None,
    compiled_dtypes: tuple[str, ...] | None = None,
    repeats: int = 50,
    sites: tuple[Site, ...] = LATERALS + NORMS,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The whole comparison, ready for JSON: all sites in one batch size and dtype, the next dtype, then more clips.

    Args:
        device: "cpu" or "cuda".
        clips: batch sizes N, in the order in which they are measured.
        dtypes: of `DTYPES`; on CUDA "float16" also measures cuDNN's and apex's.
        compiled: torch.compile modes; a compilation takes seconds, so these may be kept to some rows:
        compiled_clips, compiled_dtypes: batch sizes and dtypes with torch.compile; None: all.
        repeats: timed calls per figure.
        sites: places.
        record: called with the result so far after every row, every dtype's single operations, and at the end.

    Returns:
        finished, machine, copy rate (GB/s), apex status, one row per N x dtype x site, the single operations.

    Raises:
        ValueError: the library has no implementation for the device, or an argument is out of range.
    """
    _check(device, clips, compiled, repeats, sites)
    size_mib = 1024 if device == "cuda" else 64
    copy_gbps = copy_bandwidth(device, size_mib=size_mib, repeats=max(5, repeats // 2))
    result: dict[str, Any] = {
        "finished": False,
        "machine": machine(device),
        "copy_gb_per_s": round(copy_gbps, 1),
        "apex": apex_status().message,
        "rows": [],
        "operations": [],
    }
    record = record or (lambda result: None)
    widest = [site for site in sites if not site.lateral and not site.pool][:2]
    for n in clips:
        for dtype in dtypes:
            with_compile = n in (compiled_clips or clips) and dtype in (compiled_dtypes or dtypes)
            modes = compiled if with_compile else ()
            for site in sites:
                row = compare(site, n, DTYPES[dtype], device, repeats=repeats, compiled=modes, copy_gbps=copy_gbps)
                result["rows"].append(row)
                sys.stderr.write(f"N {n:3d} {dtype:8s} {site.name:16s} {row['us']}\n")
                torch._dynamo.reset()
                record(result)
            for site in widest if n == clips[0] else ():
                operations = single_operations(site, n, DTYPES[dtype], device, repeats)
                entry = {"site": site.name, "clips": n, "dtype": dtype, "operations": operations}
                result["operations"].append(entry)
                record(result)
    result["finished"] = True
    record(result)
    return result


def _check(
    device: str, clips: tuple[int, ...], compiled: tuple[str, ...], repeats: int, sites: tuple[Site, ...]
) -> None:
    if device not in fused_devices():
        raise ValueError(
            f"device {device!r} has no fused operations (built: {sorted(fused_devices())}); build them first"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU that PyTorch finds; use cpu")
    for n in clips:
        if n < 1 or (n > 8 and n % 8):
            raise ValueError(f"clips ({n}) must be 1 to 8 or a multiple of 8, the clips that share statistics")
    for mode in compiled:
        if mode not in MODES:
            raise ValueError(f"compiled ({mode}) must be of: {', '.join(MODES)}")
    if repeats < 1:
        raise ValueError(f"repeats ({repeats}) must be at least 1")
    if not sites:
        raise ValueError("sites must name at least one place; leave them out for all")


def _sites(names: list[str] | None) -> tuple[Site, ...]:
    every = LATERALS + NORMS
    unknown = [name for name in names or () if name not in {site.name for site in every}]
    if unknown:
        raise ValueError(f"sites ({', '.join(unknown)}) must be of: {', '.join(site.name for site in every)}")
    return tuple(site for site in every if names is None or site.name in names)


def _arguments(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clips", type=int, nargs="+", help="batch sizes; default 8 32 16 64 on CUDA, 8 on the CPU")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default all; on the CPU without float16")
    parser.add_argument(
        "--compiled", nargs="*", default=["default"], choices=MODES, help="torch.compile modes; none: leave compile out"
    )
    parser.add_argument("--compiled-clips", type=int, nargs="+", help="batch sizes with torch.compile; default all")
    parser.add_argument("--compiled-dtypes", nargs="+", choices=list(DTYPES), help="dtypes with it; default all")
    parser.add_argument("--repeats", type=int, help="timed calls; default 50 on CUDA, 7 on the CPU")
    parser.add_argument("--sites", nargs="+", help="names of sites; default all")
    parser.add_argument("--out", type=Path, help="JSON file, complete after every row; default standard output")
    parser.add_argument("--processor-time", action="store_true", help="CPU: one thread, processor time (busy machines)")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser, args = _arguments(arguments)
    use_processor_time(args.processor_time)
    cpu, out = args.device == "cpu", args.out
    try:
        check_out(out)
        result = measure(
            args.device,
            clips=tuple(args.clips or ([8] if cpu else [8, 32, 16, 64])),
            dtypes=tuple(args.dtypes or [name for name in DTYPES if not cpu or name != "float16"]),
            compiled=tuple(args.compiled),
            compiled_clips=args.compiled_clips,
            compiled_dtypes=args.compiled_dtypes,
            repeats=(7 if cpu else 50) if args.repeats is None else args.repeats,
            sites=_sites(args.sites),
            record=None if out is None else lambda so_far: write_whole(out, so_far),
        )
    except ValueError as problem:
        parser.error(str(problem))
    if out is None:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
