"""Throughput of the named models in evaluation, what `benchmarks.views --measure` prints."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.inference import runner
from benchmarks.steps.inputs import DTYPES, autocast, device, interleaved, make_inputs, make_model, size_px
from benchmarks.steps.ways import Inputs
from model.config import ModelConfig
from model.flops import count
from model.folding import fold
from model.variants import VARIANTS

VIEWS = 30  # of a video in the paper's evaluation: ten clips, three crops
CLIPS = {"cpu": 2, "cuda": 32}  # views a batch where none is asked for


@dataclass(frozen=True)
class Speed:
    """Evaluation throughput of one variant in one precision.

    Args:
        variant: name.
        precision: fp32, bf16 or fp16.
        clips: views a batch.
        gflops: giga multiply-adds of a view, as the paper counts GFLOPs.
        views: of a video.
        views_per_s: of the model alone, its views there.
        seconds_per_video: for all of its views.
        tflops_per_s: two operations a multiply-add.
    """

    variant: str
    precision: str
    clips: int
    gflops: float
    views: int
    views_per_s: float
    seconds_per_video: float
    tflops_per_s: float


def measure_views(names: Sequence[str], precisions: Sequence[str], clips: int, repeats: int = 5) -> list[Speed]:
    """Views/s and achieved TFLOP/s in evaluation, norms folded; on CUDA one graph, as evaluation runs it.

    Args:
        names: variants.
        precisions: of DTYPES.
        clips: views a batch.
        repeats: timed batches (median).
    """
    torch.backends.cudnn.benchmark = device().type == "cuda"
    out = []
    for name in names:
        config = replace(VARIANTS[name], sync_loss="none")
        gmacs = count(config, *size_px(name)).gmacs
        views = 1 if config.head == "detection" else VIEWS
        for precision in precisions:
            (times,) = interleaved([_forward(name, config, precision, clips)], repeats)
            rate = clips / statistics.median(times)
            speed = Speed(
                name, precision, clips, round(gmacs, 4), views, round(rate, 3), round(views / rate, 4),
                round(rate * 2 * gmacs / 1e3, 5),
            )  # fmt: skip
            out.append(speed)
    return out


def _forward(name: str, config: ModelConfig, precision: str, clips: int) -> Callable[[], Any]:
    """A function that evaluates one batch."""
    model = fold(make_model(config).eval())
    frames, log_mel = make_inputs(config, clips, size_px(name))
    if config.has_visual and config.head != "detection":
        assert frames is not None
        labels = torch.zeros(clips, dtype=torch.long, device=device())
        way = "folded graph" if device().type == "cuda" else "folded"
        return runner(way, model, Inputs(frames, log_mel, labels), DTYPES[precision])
    boxes = None
    if config.head == "detection":
        boxes = torch.zeros(1, 5, device=device()) + 64
        boxes[:, 0], boxes[:, 3:] = 0, 192

    def forward() -> Any:
        """Evaluate; boxes vary from batch to batch, and a model of sound alone is one launch after the other."""
        with torch.no_grad(), autocast(precision):
            return model(frames, log_mel, boxes=boxes)

    return forward


def speeds_text(rows: Sequence[Speed]) -> str:
    """Rows for a terminal."""
    head = f"{'variant':30} {'precision':9} {'GFLOPs x views':>15} {'batch':>5} {'views/s':>9} {'s a video':>10}"
    lines = [f"{head} {'TFLOP/s':>8}"]
    for row in rows:
        lines.append(
            f"{row.variant:30} {row.precision:9} {row.gflops:10.2f} x {row.views:<2} {row.clips:5d} "
            f"{row.views_per_s:9.2f} {row.seconds_per_video:10.3f} {row.tflops_per_s:8.3f}"
        )
    return "\n".join(lines)
