"""Throughput of the named models in evaluation, what `benchmarks.views --measure` prints."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.model_inputs import autocast, device, interleaved, make_inputs, make_model, size_px
from model.flops import count
from model.folding import fold
from model.variants import VARIANTS


@dataclass(frozen=True)
class Speed:
    """Evaluation throughput of one variant in one precision."""

    variant: str
    precision: str
    clips: int
    views_per_s: float
    tflops_per_s: float  # two operations per multiply-add


def measure_views(names: Sequence[str], precisions: Sequence[str], clips: int, repeats: int = 5) -> list[Speed]:
    """Views/s and achieved TFLOP/s in evaluation, batch normalisations folded.

    Args:
        names: variants. precisions: of DTYPES. clips: views per batch. repeats: timed batches (median).
    """
    out = []
    for name in names:
        config = replace(VARIANTS[name], sync_loss="none")
        model = fold(make_model(config).eval())
        frames, log_mel = make_inputs(config, clips, size_px(name))
        boxes = torch.zeros(1, 5, device=device()) + 64 if config.head == "detection" else None
        if boxes is not None:
            boxes[:, 0], boxes[:, 3:] = 0, 192
        operations = 2 * sum(count(config, *size_px(name)).multiply_adds.values())
        for precision in precisions:
            with torch.no_grad(), autocast(precision):
                (times,) = interleaved([lambda: model(frames, log_mel, boxes=boxes)], repeats)  # noqa: B023
                took = statistics.median(times)
            rate = clips / took
            out.append(Speed(name, precision, clips, round(rate, 3), round(rate * operations / 1e12, 5)))
    return out
