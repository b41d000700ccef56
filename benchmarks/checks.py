"""What the checks of a training cost: `python -m benchmarks.checks [--variant NAME] [--clips 4] [--pixels 224]`.

Processor seconds of one process on the CPU, for one step with and the checks by themselves: those of every step
(`StepGuard`), and those of every save and comparison (`not_finite`, `bit_digest`), spread over their interval. The
checks depend on the model alone; a step grows with clips and pixels, so that small ones are the worst case.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from experiments.config import PRESETS, OptimConfig
from experiments.engine.guard import StepGuard
from experiments.engine.optim import build_optimizer
from experiments.engine.replica_check import bit_digest
from experiments.engine.step import StepInputs, TrainingStep, task_loss
from experiments.records.finite import not_finite
from experiments.tasks import make_task
from model import build_model


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds of a call, the median."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def measure(variant: str, clips: int, pixels: int, repeats: int) -> dict[str, float | str | int]:
    """Seconds of a step and of each check, and their shares of a step at the default intervals.

    Args:
        variant: of the model.
        clips, pixels: of the step, the side of the crop.
        repeats: of each measurement.
    """
    torch.manual_seed(0)
    config = PRESETS[variant]
    model = build_model(config)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    task = make_task("classification", tuple(f"class {i}" for i in range(config.num_classes)))
    frames = torch.randn(clips, 3, config.num_fast_frames, pixels, pixels)
    inputs = StepInputs(
        frames.contiguous(memory_format=torch.channels_last_3d),
        torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins), None, torch.arange(clips),
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = TrainingStep(model, optimizer, scaler, task_loss(task), lambda: torch.autocast("cpu", enabled=False))
    step(inputs, drop_audio=False)
    step_s = seconds(lambda: step(inputs, drop_audio=False), max(1, repeats // 4))
    guard = StepGuard(model, spike_ratio=10.0)
    for parameter in step.parameters:
        parameter.grad = torch.ones_like(parameter)
    total = torch.ones((), requires_grad=True)

    def judge() -> None:
        guard.remember()
        guard.guarded(total)
        guard.judge(step.parameters, drop_audio=False)
        bool(guard.left_out())

    def digests() -> None:
        torch.stack([bit_digest(t) for t in model.state_dict().values()]).tolist()

    momenta = {str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    found = {
        "guard_s": seconds(judge, repeats),
        "finite_s": seconds(lambda: not_finite({**model.state_dict(), **momenta}), repeats),
        "digest_s": seconds(digests, repeats),
    }
    share = (found["guard_s"] + found["finite_s"] / 1000 + found["digest_s"] / 500) / step_s  # their default intervals
    rounded = {name: round(value, 5) for name, value in {"step_s": step_s, **found}.items()}
    return {"variant": variant, "clips": clips, "pixels": pixels, **rounded, "share_percent": round(100 * share, 3)}


def main() -> int:
    """Print one row as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks", description="What the checks of a training cost, on the CPU."
    )
    parser.add_argument("--variant", default="avslowfast_r50_4x16", choices=sorted(PRESETS))
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(options.variant, options.clips, options.pixels, options.repeats)
    sys.stdout.write(json.dumps({**row, "torch": torch.__version__}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
