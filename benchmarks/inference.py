"""Views a second in evaluation: `python -m benchmarks.inference [--variants ...] [--clips 64] [--pixels 256]`.

One view is one forward under autocast. Ways: plain PyTorch as PySlowFast evaluates (NCDHW), the same channels-last,
ours unfolded, ours folded (batch normalisations inside the convolutions), and on CUDA the folded form as one graph.
Scores of ours are compared with those of the unfolded float32 model on the same weights and inputs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import check_out
from benchmarks.rates import rates
from benchmarks.result_rows import append_rows, given_arguments, provenance
from benchmarks.step import check
from benchmarks.steps.measure import times_ms
from benchmarks.steps.plain_model import build_plain
from benchmarks.steps.ways import Inputs, logits_of, synthetic_batch
from experiments.engine.graphs import CapturedForward, CudaCapturer
from kernels.library import fused_devices
from model.avslowfast import build_model
from model.config import ModelConfig
from model.flops import count
from model.folding import fold
from model.pixel_groups import with_four_channels
from model.variants import VARIANTS

PLAIN = ("eager channels-last", "pyslowfast")
WAYS = ("folded graph", "folded", "unfolded", *PLAIN)
COMPARED = 4  # views whose scores are compared


def make_model(way: str, config: ModelConfig, device: str) -> nn.Module:
    """An evaluation model in one of `WAYS`, the same seeded weights in all of ours."""
    torch.manual_seed(0)
    if way in PLAIN:
        plain = build_plain(config, view="5-D", channels_last=way != "pyslowfast")
        return plain.to(device).eval()
    backend: Literal["fused", "reference"] = "fused" if device in fused_devices() else "reference"
    model = build_model(replace(config, backend=backend)).to(device).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # the last of a block starts at 0, and would leave the block out
            nn.init.constant_(parameter, 0.7)
    return model if way == "unfolded" else fold(model)


def runner(way: str, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A function that gives the scores (N, K) of the inputs; captured where the way is a graph, as evaluation does."""
    frames = inputs.frames.contiguous() if way == "pyslowfast" else inputs.frames
    device = frames.device
    if device.type == "cuda" and way not in PLAIN:  # as the loader gives them
        frames = with_four_channels(frames, frames.dtype)[:, :3]
    forward: Callable[..., Tensor] = lambda *given: logits_of(model(*given))  # noqa: E731
    if "graph" in way:
        forward = CapturedForward(model, CudaCapturer(device), logits_of)

    def run() -> Tensor:
        """One forward of every view."""
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(frames, inputs.log_mel)

    for _ in range(3):
        run()
    return run


def scores_in_float32(config: ModelConfig, inputs: Inputs) -> Tensor:
    """Scores (n, K) of the first `COMPARED` views by the unfolded model in float32."""
    log_mel = None if inputs.log_mel is None else inputs.log_mel[:COMPARED]
    some = Inputs(inputs.frames[:COMPARED].float(), log_mel, inputs.labels[:COMPARED])
    return runner("unfolded", make_model("unfolded", config, inputs.frames.device.type), some, torch.float32)()


def measure(
    variant: str,
    device: str,
    clips: int,
    pixels: int,
    dtype: torch.dtype,
    repeats: int,
    ways: Sequence[str] = WAYS,
) -> Iterator[dict[str, Any]]:
    """Yield one row a way.

    Args:
        variant: name in `VARIANTS`.
        device: "cpu" or "cuda".
        clips: views a batch.
        pixels: H = W.
        dtype: of autocast.
        repeats: timed batches.
        ways: of `WAYS`; graphs only on CUDA.
    """
    config = replace(VARIANTS[variant], sync_loss="none")
    inputs = synthetic_batch(config, clips, pixels, device, torch.float16 if device == "cuda" else torch.float32)
    operations = 2 * sum(count(config, pixels, pixels).multiply_adds.values())
    limits = rates(device)
    expected = scores_in_float32(config, inputs)
    torch.backends.cudnn.benchmark = device == "cuda"
    for way in ways:
        if "graph" in way and device == "cpu":
            continue
        began = time.perf_counter()
        run = runner(way, make_model(way, config, device), inputs, dtype)
        setup_s = time.perf_counter() - began
        times, host = times_ms(run, device, repeats)
        ms = statistics.median(times)
        row = {
            "benchmark": "inference",
            "variant": variant,
            "clips": clips,
            "pixels": pixels,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "way": way,
            "ms": round(ms, 3),
            "host_ms": round(statistics.median(host), 3),
            "views_per_s": round(1e3 * clips / ms, 2),
            "tflop_per_s": round(clips * operations / ms / 1e9, 3),
            "setup_s": round(setup_s, 1),
            **limits,
        }
        if way not in PLAIN:
            row["score_difference"] = round((run()[: len(expected)].float() - expected).abs().max().item(), 6)
        sys.stderr.write(f"{variant:22} N {clips:3d} {way:20} {ms:9.2f} ms {row['views_per_s']:9.1f} views/s\n")
        yield row


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    default = "avslowfast_r50_4x16" if cuda else "small"
    parser.add_argument("--variants", nargs="+", default=[default], choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--clips", type=int, default=64 if cuda else 8)
    parser.add_argument("--pixels", type=int, default=256 if cuda else 64)
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    args = parser.parse_args(arguments)
    source = provenance("benchmarks.inference", args.device, given_arguments(arguments))
    try:
        check_out(args.out)
        check(args.variants, args.device, [], args.pixels, args.repeats)
        if args.clips < 1:
            raise ValueError(f"clips ({args.clips}) must be at least 1")
    except ValueError as problem:
        parser.error(str(problem))
    for variant in args.variants:
        dtype = getattr(torch, args.dtype)
        for row in measure(variant, args.device, args.clips, args.pixels, dtype, args.repeats, args.ways):
            if args.out is not None:
                append_rows(args.out, [row | source])
    return 0


if __name__ == "__main__":
    sys.exit(main())
