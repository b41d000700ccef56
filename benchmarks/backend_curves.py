"""Free-running training of the small model with both backends: `python -m benchmarks.backend_curves [--steps 200]`.

The same seed, the same synthetic batches (the label sets the brightness), float32. Writes the losses as JSON, a plot.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import machine
from kernels.modules import set_backend
from model.avslowfast import build_model
from model.variants import VARIANTS

SMALL = replace(VARIANTS["small"], dropout_rate=0.0, pool_window=1, num_frames=2, width=8, num_mel_bins=16)


def losses(backend: str, steps: int) -> list[float]:
    """Cross entropy of every step.

    Args:
        backend: "fused" or "reference".
        steps: of SGD with 8 clips of 32 x 32 pixels.

    Returns:
        one loss a step.
    """
    set_backend(backend)
    torch.manual_seed(0)
    model = build_model(SMALL).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    values: list[Tensor] = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(SMALL.num_classes, (8,), generator=generator)
        noise = torch.randn(8, 3, SMALL.num_fast_frames, 32, 32, generator=generator)
        frames = 0.3 * noise + 2 * labels[:, None, None, None, None] / SMALL.num_classes
        log_mel = torch.randn(8, 1, SMALL.num_mel_frames, SMALL.num_mel_bins, generator=generator)
        logits = model(frames.to(memory_format=torch.channels_last_3d), log_mel).logits
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    set_backend("auto")
    return [round(float(v), 6) for v in values]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backend_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backend_curves"), help="without suffix")
    args = parser.parse_args(arguments)
    curves = {name: losses(name, args.steps) for name in ("reference", "fused")}
    args.out.with_suffix(".json").write_text(json.dumps({"machine": machine("cpu"), "losses": curves}) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, values in curves.items():
        pyplot.plot(values, label=name, alpha=0.7)
    pyplot.xlabel("step")
    pyplot.ylabel("cross entropy")
    pyplot.title("small model, float32: same seed and batches, free-running")
    pyplot.legend()
    pyplot.savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
