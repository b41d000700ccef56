"""Whole training step: `python -m benchmarks.step [--variant small] [--device cuda] [--clips 8] [--out FILE]`.

One step is forward under autocast, loss, backward and SGD on synthetic inputs. Ways: PyTorch's own batch normalisation
in place of the norms (5-D, or through the 4-D view; the whole batch is one group), the fused operations, torch.compile.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import check_out, machine, time_us, use_processor_time, write_whole
from kernels.layout import group_count, rows_view
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, set_backend
from kernels.reference import max_pool
from model.avslowfast import build_model
from model.config import ModelConfig
from model.variants import VARIANTS

MIN_PX = 32  # res5 still has a pixel
WAYS = ("eager 5-D", "eager 4-D view", "fused", "compile eager 4-D view", "compile fused")


class EagerNorm(GhostBatchNorm):
    """The whole batch as one group through PyTorch's own normalisation, on the 5-D tensor or on its 4-D view."""

    flat = True

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_norm: GhostBatchNorm | None = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Tensor:
        """As `GhostBatchNorm.forward`, without groups and in separate steps."""
        view = rows_view(x) if self.flat else x
        buffers = self.running_mean, self.running_var
        y = nn.functional.batch_norm(view, *buffers, self.weight, self.bias, self.training, self.momentum, self.eps)
        y = y.view(x.shape)
        if residual is not None:
            y = y + (residual if residual_norm is None else residual_norm(residual))
        y = torch.relu(y) if relu else y
        return max_pool(y) if pool else y


def make_eager(model: nn.Module, *, flat: bool) -> nn.Module:
    """Turn every norm of a model into PyTorch's, in place.

    Args:
        model: with `GhostBatchNorm` modules.
        flat: through the 4-D view; else on 5-D tensors.

    Returns:
        the model.
    """
    kind = type("EagerNorm", (EagerNorm,), {"flat": flat})
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.__class__ = kind
    return model


def synthetic_batch(config: ModelConfig, clips: int, pixels: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (N, 3, alpha*T, H, W) channels_last_3d, log-mel (N, 1, M, F) and labels (N,).

    Args:
        config: of the model.
        clips: N.
        pixels: H = W.
        device: "cpu" or "cuda".

    Returns:
        the three tensors on the device.
    """
    frames = torch.randn(clips, 3, config.num_fast_frames, pixels, pixels, device=device)
    log_mel = torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, device=device)
    labels = torch.randint(config.num_classes, (clips,), device=device)
    return frames.to(memory_format=torch.channels_last_3d), log_mel, labels


def make_step(
    way: str, config: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> Callable[[], Any]:
    """A function that runs one training step in one of `WAYS`.

    Args:
        way: of `WAYS`.
        config: of the model.
        inputs: from `synthetic_batch`.
        dtype: of autocast; float32 leaves autocast off.

    Returns:
        a function without arguments.
    """
    frames, log_mel, labels = inputs
    device = frames.device.type
    model: nn.Module = build_model(config).to(device).train()
    fused = way.endswith("fused")
    if not fused:
        make_eager(model, flat="4-D" in way)
    run: Any = torch.compile(model, dynamic=False) if way.startswith("compile") else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=device == "cuda")

    def step() -> None:
        """Forward, backward and SGD."""
        set_backend("fused" if fused else "reference")
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(run(frames, log_mel), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    variant: str,
    device: str,
    *,
    clips: int,
    pixels: int,
    dtype: torch.dtype,
    repeats: int,
    ways: tuple[str, ...] = WAYS,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Milliseconds per step of every way, in one run.

    Args:
        variant: name in `VARIANTS`.
        device: "cpu" or "cuda".
        clips: N.
        pixels: H = W of the input.
        dtype: of autocast.
        repeats: timed steps per way.
        ways: of `WAYS`.
        record: takes the result so far after every way.

    Returns:
        machine, settings, milliseconds and clips/s by way, and each way's time over the fused one's.

    Raises:
        ValueError: numbers below their least value, a variant that classifies no frames with sound, no such device.
    """
    _check(variant, device, clips, pixels, repeats)
    config = VARIANTS[variant]
    inputs = synthetic_batch(config, clips, pixels, device)
    settings = {"variant": variant, "clips": clips, "pixels": pixels, "dtype": str(dtype).removeprefix("torch.")}
    milliseconds: dict[str, float] = {}
    result: dict[str, Any] = {}
    for way in ways:
        if way.endswith("fused") and device not in fused_devices():
            continue
        torch.manual_seed(0)
        milliseconds[way] = time_us(make_step(way, config, inputs, dtype), device, repeats=repeats) / 1e3
        sys.stderr.write(f"{way:24s} {milliseconds[way]:10.2f} ms\n")
        torch._dynamo.reset()
        base = milliseconds.get("fused")
        result = {
            "machine": machine(device),
            **settings,
            "ms_per_step": {way: round(ms, 3) for way, ms in milliseconds.items()},
            "clips_per_s": {way: round(clips / ms * 1e3, 2) for way, ms in milliseconds.items()},
            "over_fused": {way: round(ms / base, 3) for way, ms in milliseconds.items()} if base else {},
        }
        if record is not None:
            record(result)
    set_backend("auto")
    return result


def _check(variant: str, device: str, clips: int, pixels: int, repeats: int) -> None:
    """Raise ValueError for what no step can be made of."""
    config = VARIANTS[variant]
    if not (config.has_visual and config.has_audio and config.head in ("softmax", "sigmoid")):
        raise ValueError(f"variant ({variant}) must have frames, sound and a classifier, such as small")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device (cuda) must be there; take --device cpu")
    if repeats < 1:
        raise ValueError(f"repeats ({repeats}) must be at least 1")
    if pixels < MIN_PX:
        raise ValueError(f"pixels ({pixels}) must be at least {MIN_PX}")
    if clips < 1:
        raise ValueError(f"clips ({clips}) must be at least 1")
    group_count(clips, config.clips_per_bn_group)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variant", default="avslowfast_r50_4x16" if cuda else "small", choices=list(VARIANTS))
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=224 if cuda else 64, help="height and width of the input")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, help="JSON file, whole after every way; default standard output")
    parser.add_argument("--processor-time", action="store_true", help="CPU: one thread, processor time (busy machines)")
    args = parser.parse_args(arguments)
    use_processor_time(args.processor_time)
    try:
        check_out(args.out)
        result = measure(
            args.variant,
            args.device,
            clips=args.clips,
            pixels=args.pixels,
            dtype=getattr(torch, args.dtype),
            repeats=args.repeats,
            ways=tuple(args.ways),
            record=partial(write_whole, args.out) if args.out else None,
        )
    except ValueError as problem:
        parser.error(str(problem))
    if args.out is None:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
