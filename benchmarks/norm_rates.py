"""Rate of every normalisation of a model: `python -m benchmarks.norm_rates [--device cuda] [--out FILE]`.

Each place of the model (shape and form, found by running it without data) is timed alone, both ways, with the
cache overwritten before each call. A row gives milliseconds, the bytes that two passes over the map must move, their
rate as a share of the same run's copy, and how the groups of 8 clips were walked: pass by pass, or group by group, so
that the second pass finds its group in the cache (which may move fewer bytes: then the share can pass 1). The summary
adds the places up, each as often as the model has it, and by size of the map. On a GPU it takes less than a minute.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernel_timing import check_out, copy_bandwidth, machine, time_us, write_whole
from benchmarks.ops.sites import draw
from kernels.layout import group_count, memory_format
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm
from model.avslowfast import build_model
from model.convolutions import Conv2d, FactoredConv3d, set_grouping
from model.variants import VARIANTS

FORMS = ("plain", "relu", "residual", "projected", "pool")
SIZES = ((64, "over 64 MB"), (10, "10 to 64 MB"), (0, "under 10 MB"))


@dataclass(frozen=True, order=True)
class Place:
    """One shape (N, C, ...) and form of normalisation."""

    shape: tuple[int, ...]
    form: str

    def megabytes(self) -> float:
        """Size of the normalised map in bfloat16, in 1e6 bytes."""
        return 2e-6 * torch.Size(self.shape).numel()

    def bytes_moved(self, operation: str) -> float:
        """Bytes of two passes over bfloat16 maps, masks included: what no cache spares.

        Args:
            operation: "forward", "backward", or "backward fork": with the gradients of two readers.
        """
        size = 2 * torch.Size(self.shape).numel()
        fork = operation == "backward fork"
        mask = size / 16
        if self.form == "pool":  # y, x at the maxima: a quarter each; one byte a maximum
            return 2 * size + 2 * size / 4 + size / 8 if operation == "forward" else 2 * size + 3 * size / 4 + size / 8
        if operation == "forward":
            return {"plain": 3, "relu": 3, "residual": 4, "projected": 5}[self.form] * size + (
                mask if self.form in ("residual", "projected") else 0
            )
        passes = {"plain": 5, "relu": 5, "residual": 6, "projected": 8}[self.form]
        if fork:
            passes = {"plain": 7, "relu": 7, "residual": 7, "projected": 10}[self.form]
        masks = {"residual": 1, "projected": 1 if fork else 2}.get(self.form, 0)
        return passes * size + masks * mask


def places(variant: str, clips: int, pixels: int) -> Counter[Place]:
    """How often a model normalises which shape in which form: found by running it without data.

    Args:
        variant: a name of `model.variants.VARIANTS`.
        clips: N.
        pixels: H = W of the frames.
    """
    config = VARIANTS[variant]
    found: Counter[Place] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Count one call of a norm."""
        form = "pool" if options.get("pool") else "relu" if options.get("relu") else "plain"
        if options.get("residual") is not None:
            form = "residual" if options.get("residual_norm") is None else "projected"
        found[Place(tuple(args[0].shape), form)] += 1

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config).train()
        frames = torch.empty(clips, 3, config.num_fast_frames, pixels, pixels)
        log_mel = torch.empty(clips, 1, config.num_mel_frames, config.num_mel_bins)
        set_grouping(model, "off")  # the weights of a grouped convolution are found by their values
        for module in model.modules():
            if isinstance(module, Conv2d | FactoredConv3d):
                module.register_forward_hook(lambda _module, _args, y: y.to(memory_format=memory_format(y)))
            if isinstance(module, GhostBatchNorm):
                module.backend = "reference"
                module.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(frames.to(memory_format=torch.channels_last_3d), log_mel)
    return found


def calls(place: Place, device: str, blocked: bool) -> dict[str, Callable[[], Any]]:
    """The operations of one place, on random bfloat16 maps, by name."""
    avsf = torch.ops.avsf
    channels, groups = place.shape[1], group_count(place.shape[0], 8)
    x, dy, other = (draw_map(place.shape, device) for _ in range(3))
    w = torch.ones(channels, device=device)
    none = (None,) * 4
    if place.form == "pool":
        y, value, tap, _, coef = avsf.norm_pool(x, w, w, None, None, 1e-5, groups, True)
        return {
            "forward": lambda: avsf.norm_pool(x, w, w, None, None, 1e-5, groups, True),
            "backward": lambda: avsf.norm_pool_backward(y, x, value, tap, coef, groups),
        }
    ends, projected = place.form in ("residual", "projected"), place.form == "projected"
    relu = place.form != "plain"
    given = (x, w, w, None, None, 1e-5, other if ends else None)
    second = (w, w, None, None) if projected else none
    arguments = (*given, *second, 1e-5, projected, groups, relu, blocked)
    _, mask, _, coef, _, other_coef = avsf.norm_act(*arguments)
    used = other_coef if projected else None
    kept = other if projected else None

    def backward(dy2: Tensor | None) -> Any:
        """The backward with or without a second reader's gradient."""
        return avsf.norm_act_backward(dy, dy2, x, kept, mask, coef, used, groups, relu, ends, blocked)

    result: dict[str, Callable[[], Any]] = {
        "forward": lambda: avsf.norm_act(*arguments),
        "backward": lambda: backward(None),
    }
    if ends:
        result["backward fork"] = lambda: backward(dy)
    return result


def draw_map(shape: tuple[int, ...], device: str) -> Tensor:
    """Normal bfloat16 values, channels innermost."""
    if len(shape) == 5:
        return draw(shape, torch.bfloat16, device).detach()
    return torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last)


def measure(
    device: str, *, variant: str, clips: tuple[int, ...], pixels: int, repeats: int, record: Callable[[Any], None]
) -> dict[str, Any]:
    """All places, all operations, both walks; ready for JSON.

    Args:
        device: "cpu" or "cuda".
        variant: the model.
        clips: batch sizes N.
        pixels: H = W.
        repeats: timed calls per figure.
        record: takes the result so far after every batch size.

    Returns:
        machine, copy rate (GB/s), rows, and the summary by N.
    """
    copy_gbps = copy_bandwidth(device, size_mib=1024 if device == "cuda" else 64, repeats=10)
    result: dict[str, Any] = {
        "machine": machine(device),
        "variant": variant,
        "pixels": pixels,
        "copy_gb_per_s": round(copy_gbps, 1),
        "rows": [],
        "summary": {},
    }
    for n in clips:
        rows = []
        for place, count in sorted(places(variant, n, pixels).items(), key=lambda item: -item[0].megabytes()):
            for blocked in (False, True) if n > 8 and place.form != "pool" else (False,):
                for name, call in calls(place, device, blocked).items():
                    us = time_us(call, device, repeats=repeats, cold=device == "cuda")
                    moved = place.bytes_moved(name)
                    rows.append(
                        {
                            "clips": n,
                            "shape": list(place.shape),
                            "form": place.form,
                            "count": count,
                            "mb": round(place.megabytes(), 2),
                            "operation": name,
                            "walk": "group by group" if blocked else "pass by pass",
                            "us": round(us, 2),
                            "bytes": int(moved),
                            "share_of_copy": round(moved / us / 1e3 / copy_gbps, 3),
                        }
                    )
        result["rows"] += rows
        result["summary"][str(n)] = summarize(rows, copy_gbps)
        record(result)
    return result


def summarize(rows: list[dict[str, Any]], copy_gbps: float) -> dict[str, Any]:
    """Milliseconds and share of the copy rate of a whole step: by walk and size of map, and with the better walk each.

    A block's end counts with the backward of two readers, as the model has it.
    """
    by_place: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    ends = {(tuple(row["shape"]), row["form"]) for row in rows if row["operation"] == "backward fork"}
    for row in rows:
        if row["operation"] == "backward" and (tuple(row["shape"]), row["form"]) in ends:
            continue
        by_place.setdefault((tuple(row["shape"]), row["form"], row["operation"]), {})[row["walk"]] = row
    summary: dict[str, Any] = {}
    for walk in ("pass by pass", "group by group", "better"):
        for least, size in SIZES:
            most = next((m for m, _ in reversed(SIZES) if m > least), float("inf"))
            chosen = [
                min(walks.values(), key=lambda row: row["us"])
                if walk == "better"
                else walks.get(walk, walks["pass by pass"])
                for walks in by_place.values()
            ]
            chosen = [row for row in chosen if least <= row["mb"] < most]
            ms = sum(row["us"] * row["count"] for row in chosen) / 1e3
            moved = sum(row["bytes"] * row["count"] for row in chosen)
            summary.setdefault(walk, {})[size] = {
                "ms": round(ms, 3),
                "share_of_copy": round(moved / 1e6 / ms / copy_gbps, 3) if ms else None,
                "calls": sum(row["count"] for row in chosen),
            }
        summary[walk]["ms"] = round(sum(summary[walk][size]["ms"] for _, size in SIZES), 3)
    return summary


def report(result: dict[str, Any]) -> str:
    """The rows and the summary as text."""
    lines = [f"copy {result['copy_gb_per_s']} GB/s"]
    for row in result["rows"]:
        shape = "x".join(map(str, row["shape"]))
        what = f"{shape:22s} {row['form']:9s} {row['operation']:13s} {row['walk']:14s}"
        rate = f"{row['us']:9.1f} us {100 * row['share_of_copy']:5.0f} %  x{row['count']}"
        lines.append(f"{row['mb']:8.2f} MB {what} {rate}")
    for n, summary in result["summary"].items():
        for walk, sizes in summary.items():
            parts = [f"{size} {v['ms']} ms ({v['share_of_copy']})" for size, v in sizes.items() if size != "ms"]
            lines.append(f"N {n}, {walk}: {sizes['ms']} ms: " + ", ".join(parts))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norm_rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variant", choices=list(VARIANTS), help="default: avslowfast_r50_4x16; CPU: small")
    parser.add_argument("--clips", type=int, nargs="+", help="batch sizes; default 8 32 on CUDA, 16 on the CPU")
    parser.add_argument("--pixels", type=int, help="H = W of the frames; default 224 on CUDA, 64 on the CPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls per figure")
    parser.add_argument("--out", type=Path, help="JSON file, whole after every batch size")
    args = parser.parse_args(arguments)
    cuda = args.device == "cuda"
    if args.device not in fused_devices():
        parser.error(f"the library has no operations for {args.device}; run `python -m kernels.build`")
    try:
        check_out(args.out)
    except ValueError as problem:
        parser.error(str(problem))
    result = measure(
        args.device,
        variant=args.variant or ("avslowfast_r50_4x16" if cuda else "small"),
        clips=tuple(args.clips or ((8, 32) if cuda else (16,))),
        pixels=args.pixels or (224 if cuda else 64),
        repeats=args.repeats,
        record=lambda so_far: None if args.out is None else write_whole(args.out, so_far),
    )
    sys.stdout.write(report(result))


if __name__ == "__main__":
    main()
