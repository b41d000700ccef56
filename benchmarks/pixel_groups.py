"""Narrow convolutions, plain and with grouped pixels: `python -m benchmarks.pixel_groups [--device cuda] [--out FILE]`.

Every narrow convolution of a model, as the 2-D or 3-D convolution that it is run as, in several sizes of groups: the
forward and both gradients, each without the build of the weights. Times of the sizes are taken in turns, so that other
work on the machine falls on all of them. On CUDA a turn is a replayed graph of several calls: no launch is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.kernel_timing import check_out, machine, time_us, write_whole
from model.pixel_groups import PixelGroups, expand_by_padding, fit_groups, group_pixels, widest_groups

PASSES: Final = ("forward", "data gradient", "weight gradient")
CALLS = 3  # in one CUDA graph


@dataclass(frozen=True)
class Site:
    """One convolution as it is run: maps (batch * clips, channels, *size), padded by half of the kernel."""

    name: str
    channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    size: tuple[int, ...]
    batch: int = 1  # images of one clip

    @property
    def padding(self) -> tuple[int, ...]:
        """Per axis."""
        return tuple(k // 2 for k in self.kernel)

    def sizes(self) -> list[tuple[int, int]]:
        """Groups (n, m) that are tried, the plain convolution first."""
        if self.channels == 3:
            return [(1, 1), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8)]
        return [(1, 1), (2, 2), (4, 4), (8, 8)]


def sites(preset: str) -> tuple[Site, ...]:
    """Narrow convolutions of AVSlowFast R50 4x16 at 224 px ("r50") or of the small preset at 64 px ("small")."""
    if preset == "small":
        return (
            Site("fast stem", 3, 4, (5, 7, 7), (1, 2, 2), (16, 64, 64)),
            Site("slow stem", 3, 16, (7, 7), (2, 2), (64, 64), 4),
            Site("audio stem, time", 1, 8, (9, 1), (1, 1), (64, 40)),
            Site("audio stem, frequency", 1, 8, (1, 9), (1, 1), (64, 40)),
            Site("fast res2 reduce", 4, 4, (3, 1), (1, 1), (16, 256)),
            Site("fast res2 3x3", 4, 4, (3, 3), (1, 1), (16, 16), 16),
            Site("fast res2 expand", 4, 16, (1, 1), (1, 1), (16, 16), 16),
            Site("fast res3 reduce", 16, 8, (3, 1), (1, 1), (16, 256)),
            Site("fast res3 strided 3x3", 8, 8, (3, 3), (2, 2), (16, 16), 16),
            Site("fast res3 expand", 8, 32, (1, 1), (1, 1), (8, 8), 16),
            Site("fast res4 strided 3x3", 16, 16, (3, 3), (2, 2), (8, 8), 16),
            Site("slow res2 3x3", 16, 16, (3, 3), (1, 1), (16, 16), 4),
            Site("audio res2, time", 8, 8, (3, 1), (1, 1), (64, 40)),
            Site("audio res2, frequency", 8, 8, (1, 3), (1, 1), (64, 40)),
        )
    return (
        Site("slow stem", 3, 64, (7, 7), (2, 2), (224, 224), 4),
        Site("audio stem, time", 1, 32, (9, 1), (1, 1), (128, 80)),
        Site("audio stem, frequency", 1, 32, (1, 9), (1, 1), (128, 80)),
        Site("fast res2 reduce", 8, 8, (3, 1), (1, 1), (32, 3136)),
        Site("fast res2 3x3", 8, 8, (3, 3), (1, 1), (56, 56), 32),
        Site("fast res2 expand", 8, 32, (1, 1), (1, 1), (56, 56), 32),
        Site("fast res2 next reduce", 32, 8, (3, 1), (1, 1), (32, 3136)),
        Site("fast res3 reduce", 32, 16, (3, 1), (1, 1), (32, 3136)),
        Site("fast res3 strided 3x3", 16, 16, (3, 3), (2, 2), (56, 56), 32),
        Site("fast res3 3x3", 16, 16, (3, 3), (1, 1), (28, 28), 32),
        Site("fast res3 expand", 16, 64, (1, 1), (1, 1), (28, 28), 32),
        Site("fast res3 next reduce", 64, 16, (3, 1), (1, 1), (32, 784)),
        Site("fast res4 strided 3x3", 32, 32, (3, 3), (2, 2), (28, 28), 32),
        Site("fast res4 3x3", 32, 32, (3, 3), (1, 1), (14, 14), 32),
        Site("fast res4 reduce", 128, 32, (3, 1), (1, 1), (32, 196)),
        Site("fast res4 expand", 32, 128, (1, 1), (1, 1), (14, 14), 32),
        Site("fast res5 3x3", 64, 64, (3, 3), (1, 1), (7, 7), 32),
        Site("F->S after res3", 64, 128, (5, 1), (8, 1), (32, 784)),
        Site("audio res2, time", 128, 32, (3, 1), (1, 1), (128, 80)),
        Site("audio res2, frequency", 128, 32, (1, 3), (1, 1), (128, 80)),
        Site("fast stem", 3, 8, (5, 7, 7), (1, 2, 2), (32, 224, 224)),  # has a kernel of its own: see kernels/stem.py
    )


def candidate(
    site: Site, size: tuple[int, int], clips: int, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]] | None:
    """Functions that run the three passes of a site with groups of `size`, or None where the rows do not allow it.

    Args:
        site: of `sites`.
        size: (n, m); (1, 1) is the plain convolution.
        clips: N.
        device, dtype: of the maps.
    """
    groups: PixelGroups | None = None
    if size != (1, 1):
        groups = fit_groups(size, site.size[-1], site.kernel[-1], site.stride[-1], site.padding[-1])
        if groups is None or (groups.inputs, groups.outputs) != size:
            return None
    form = torch.channels_last_3d if len(site.size) == 3 else torch.channels_last
    channels = 4 if site.channels == 3 and groups is not None else site.channels
    x = torch.randn(clips * site.batch, channels, *site.size, device=device, dtype=dtype).to(memory_format=form)
    weight = torch.randn(site.out_channels, site.channels, *site.kernel, device=device, dtype=dtype)
    stride, padding = site.stride, site.padding
    if groups is not None:
        x, weight = group_pixels(x, groups.inputs), expand_by_padding(weight, groups, channels)
        stride, padding = (*stride[:-1], groups.grouped_stride), (*padding[:-1], groups.grouped_padding)
    weight = weight.contiguous(memory_format=form)
    ones, zeros = (1,) * len(stride), (0,) * len(stride)

    def forward() -> Tensor:
        """Return y."""
        return torch.ops.aten.convolution(x, weight, None, stride, padding, ones, False, zeros, 1)

    dy = torch.randn_like(forward())

    def backward(*mask: bool) -> Any:
        """Return the gradients of input, weight and bias that `mask` names."""
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, ones, False, zeros, 1, list(mask)
        )

    return {
        "forward": forward,
        "data gradient": lambda: backward(True, False, False),
        "weight gradient": lambda: backward(False, True, False),
    }


def _replayed(function: Callable[[], Any]) -> Callable[[], Any]:
    """`CALLS` calls as one CUDA graph, after autotuning."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            function()
    return graph.replay


def measure_site(site: Site, clips: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Milliseconds of every pass in every size of groups, the fastest size, and the one that the model takes.

    Args:
        site: of `sites`.
        clips: N.
        device: "cpu" or "cuda".
        dtype: of the maps.
        repeats: turns; the median is given.
    """
    calls = CALLS if device == "cuda" else 1
    ways: dict[tuple[int, int], dict[str, Callable[[], Any]]] = {}
    passes = [name for name in PASSES if not (name == "data gradient" and "stem" in site.name)]
    for size in site.sizes():
        found = candidate(site, size, clips, device, dtype)
        if found is not None:
            ways[size] = {name: _replayed(found[name]) if device == "cuda" else found[name] for name in passes}
    times: dict[tuple[int, int], dict[str, list[float]]] = {size: {name: [] for name in passes} for size in ways}
    for _ in range(repeats):
        for size, runs in ways.items():
            for name in passes:
                times[size][name].append(time_us(runs[name], device, repeats=1) / 1e3 / calls)
    ms = {size: {name: median(values) for name, values in row.items()} for size, row in times.items()}
    total = {size: sum(row.values()) for size, row in ms.items()}
    rule = widest_groups(site.channels, site.out_channels)
    best = min(total, key=lambda size: total[size])
    return {
        "site": site.name,
        "ms": {f"{n}:{m}": {name: round(value, 4) for name, value in ms[n, m].items()} for n, m in ms},
        "total_ms": {f"{n}:{m}": round(value, 4) for (n, m), value in total.items()},
        "rule": f"{rule[0]}:{rule[1]}",
        "rule_over_plain": round(total[rule] / total[1, 1], 3) if rule in total else None,
        "best": f"{best[0]}:{best[1]}",
        "best_over_plain": round(total[best] / total[1, 1], 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pixel_groups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="r50" if cuda else "small", choices=["r50", "small"])
    parser.add_argument("--clips", type=int, default=32 if cuda else 8)
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sites", nargs="+", help="only sites whose name holds one of these words")
    parser.add_argument("--out", type=Path, help="JSON file, whole after every site")
    args = parser.parse_args(arguments)
    chosen = [s for s in sites(args.preset) if args.sites is None or any(word in s.name for word in args.sites)]
    try:
        check_out(args.out)
        if not chosen or min(args.clips, args.repeats) < 1:
            raise ValueError(f"--sites ({args.sites}), --clips ({args.clips}) and --repeats must name something")
    except ValueError as problem:
        parser.error(str(problem))
    torch.backends.cudnn.benchmark = True
    settings = {"preset": args.preset, "clips": args.clips, "dtype": args.dtype}
    result: dict[str, Any] = {"machine": machine(args.device), **settings, "rows": []}
    for site in chosen:
        row = measure_site(site, args.clips, args.device, getattr(torch, args.dtype), args.repeats)
        result["rows"].append(row)
        totals = "  ".join(f"{size} {value:8.3f}" for size, value in row["total_ms"].items())
        sys.stderr.write(f"{site.name:24s} {totals}  ms; rule {row['rule']} best {row['best']}\n")
        if args.out is not None:
            write_whole(args.out, result)
    if args.out is None:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
