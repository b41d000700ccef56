"""Fused operations against PyTorch's ways: `python -m benchmarks.fusion [--device cuda] [--clips 8 32] [--out FILE]`.

Six normalisation sites and four lateral stages of R50 4x16 at 224^2, forward and backward: microseconds, bytes that
must move, and the share of the same run's copy bandwidth. The single operations are timed as well. Opponents: eager
5-D, eager through the 4-D view (float16 on CUDA is cuDNN's), torch.compile, apex groupbn where NVIDIA apex has it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_sites import LATERALS, NORMS, Site, draw, opponents
from benchmarks.kernel_timing import copy_bandwidth, machine, time_us, use_processor_time
from kernels.apex_support import apex_status
from kernels.library import fused_devices

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        medians in microseconds by name (warm; cold too on CUDA), bytes, share of the copy rate, ratios over fused.
    """
    moved = site.bytes_moved(clips, torch.empty(0, dtype=dtype).element_size())
    runs = opponents(site, clips, dtype, device, compiled=compiled)
    warm = {name: time_us(run, device, repeats=repeats) for name, run in runs.items()}
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
    if device == "cuda":
        cold = {name: time_us(run, device, repeats=repeats, cold=True) for name, run in runs.items()}
        row["us_cold"] = {name: round(value, 2) for name, value in cold.items()}
    return row


def single_operations(site: Site, clips: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Each operation of namespace avsf at one normalisation site.

    Args:
        site: a site without lateral.
        clips: N.
        dtype: of the activations.
        device: "cpu" or "cuda".
        repeats: timed calls.

    Returns:
        per operation: microseconds, bytes that must move, GB/s.
    """
    avsf, groups = torch.ops.avsf, max(1, clips // 8)
    x, dy, residual = (draw(site.shape(clips), dtype, device).detach() for _ in range(3))
    w = torch.ones(site.channels, device=device)
    coef = avsf.bn_finalize(avsf.bn_stats(x, groups), w, w, 1e-5)
    _, mask = avsf.bn_act(x, coef, residual, None, None, None, True)
    sums = avsf.bn_act_bwd_reduce(dy, x, None, mask, coef, None, groups, True)
    tensor, bits = x.nbytes, mask.nbytes
    calls = {
        "bn_stats": (lambda: avsf.bn_stats(x, groups), tensor),
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
        "frame_sum": (lambda: avsf.frame_sum(dy, None), tensor),
    }
    result = {}
    for name, (call, moved) in calls.items():
        us = time_us(call, device, repeats=repeats)
        result[name] = {"us": round(us, 2), "bytes": moved, "gb_per_s": round(moved / us / 1e3, 1)}
    return result


def measure(
    device: str,
    *,
    clips: tuple[int, ...] = (8, 16, 32, 64),
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    compiled: tuple[str, ...] = ("default", "max-autotune"),
    repeats: int = 50,
    sites: tuple[Site, ...] = NORMS + LATERALS,
) -> dict[str, Any]:
    """The whole comparison, ready for JSON; benchmarks that report on a GPU call this.

    Args:
        device: "cpu" or "cuda".
        clips: batch sizes N.
        dtypes: of `DTYPES`; on CUDA "float16" also measures cuDNN's.
        compiled: torch.compile modes.
        repeats: timed calls per figure.
        sites: places.

    Returns:
        machine, copy rate (GB/s), apex status, one row per site x N x dtype, the single operations.

    Raises:
        ValueError: the library has no implementation for the device.
    """
    if device not in fused_devices():
        raise ValueError(
            f"device {device!r} has no fused operations (built: {sorted(fused_devices())}); build them first"
        )
    size_mib = 1024 if device == "cuda" else 64
    copy_gbps = copy_bandwidth(device, size_mib=size_mib, repeats=max(5, repeats // 2))
    result: dict[str, Any] = {
        "machine": machine(device),
        "copy_gb_per_s": round(copy_gbps, 1),
        "apex": apex_status().message,
        "rows": [],
        "operations": [],
    }
    for n in clips:
        for dtype in dtypes:
            for site in sites:
                row = compare(site, n, DTYPES[dtype], device, repeats=repeats, compiled=compiled, copy_gbps=copy_gbps)
                result["rows"].append(row)
                sys.stderr.write(f"N {n:3d} {dtype:8s} {site.name:16s} {row['us']}\n")
                torch._dynamo.reset()
    widest = [site for site in sites if not site.lateral and not site.pool][:2]
    for site in widest:
        for dtype in dtypes:
            operations = single_operations(site, clips[0], DTYPES[dtype], device, repeats)
            result["operations"].append(
                {"site": site.name, "clips": clips[0], "dtype": dtype, "operations": operations}
            )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clips", type=int, nargs="+", help="batch sizes; default 8 16 32 64 on CUDA, 8 on the CPU")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--compiled", nargs="*", default=None, help="torch.compile modes; none: leave compile out")
    parser.add_argument("--repeats", type=int, help="timed calls; default 50 on CUDA, 7 on the CPU")
    parser.add_argument("--sites", nargs="+", help="names of sites; default all")
    parser.add_argument("--out", type=Path, help="JSON file; default standard output")
    parser.add_argument("--processor-time", action="store_true", help="CPU: one thread, processor time (busy machines)")
    args = parser.parse_args(arguments)
    use_processor_time(args.processor_time)
    cpu = args.device == "cpu"
    modes = args.compiled if args.compiled is not None else (["default"] if cpu else ["default", "max-autotune"])
    sites = tuple(s for s in NORMS + LATERALS if args.sites is None or s.name in args.sites)
    result = measure(
        args.device,
        clips=tuple(args.clips or ([8] if cpu else [8, 16, 32, 64])),
        dtypes=tuple(args.dtypes),
        compiled=tuple(modes),
        repeats=args.repeats or (7 if cpu else 50),
        sites=sites,
    )
    text = json.dumps(result, indent=1) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
