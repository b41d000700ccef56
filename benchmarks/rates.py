"""Ceilings of a machine in one run: `python -m benchmarks.rates [--device cuda] [--out FILE]`.

The copy rate (bytes read and written by one large copy) and the rate of one large matrix product, on random data.
"""

import argparse
import json
import statistics
import sys
from functools import cache
from pathlib import Path

import torch

from benchmarks.kernel_timing import check_out, copy_bandwidth, time_us
from benchmarks.result_rows import append_rows, given_arguments, provenance

SIDE = {"cpu": 1024, "cuda": 8192}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = 15


@cache
def rates(device: str) -> dict[str, float]:
    """Measure both, once in a process.

    Args:
        device: "cpu" (float32 product) or "cuda" (bfloat16 product).

    Returns:
        copy_gb_per_s and matrix_tflop_per_s.
    """
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE[device]) for _ in range(2))
    product_us = statistics.median([time_us(lambda: torch.mm(a, b), device, repeats=REPEATS) for _ in range(2)])
    copy = copy_bandwidth(device, size_mib=1024 if device == "cuda" else 64, repeats=REPEATS)
    return {"copy_gb_per_s": round(copy, 1), "matrix_tflop_per_s": round(2 * side**3 / product_us / 1e6, 3)}


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON file to append the row to")
    args = parser.parse_args(arguments)
    try:
        check_out(args.out)
    except ValueError as problem:
        parser.error(str(problem))
    row = {"benchmark": "rates", "device": args.device, **rates(args.device)}
    sys.stdout.write(json.dumps(row) + "\n")
    if args.out is not None:
        append_rows(args.out, [row | provenance("benchmarks.rates", args.device, given_arguments(arguments))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
