"""Speed and precision of the model itself on the present device: what `benchmarks.views --measure` and docs report.

python -m benchmarks.model_speed dropped       # a dropped step against the visual-only model's step
python -m benchmarks.model_speed layout        # channels_last_3d against row-major, small preset, CPU
python -m benchmarks.model_speed precision     # bf16 and fp16 autocast against fp32, per variant
python -m benchmarks.model_speed step          # small preset: milliseconds per clip, forward + backward
python -m benchmarks.model_speed folded        # inference form against the unfolded model

`--out FILE` merges the rows into a result file: a row replaces the earlier one of the same variant, others stay.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernel_timing import check_out, machine, write_whole
from benchmarks.views import size_px
from kernels.modules import GhostBatchNorm
from kernels.precise_bn import precise_bn
from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig
from model.flops import count
from model.folding import fold
from model.modes import apply_freeze
from model.output import ModelOutput
from model.variants import VARIANTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILDS = 5  # of the models of a ratio


@dataclass(frozen=True)
class Speed:
    """Evaluation throughput of one variant in one precision."""

    variant: str
    precision: str
    clips: int
    views_per_s: float
    tflops_per_s: float  # two operations per multiply-add


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(
    config: ModelConfig, clips: int, size: tuple[int, int], seed: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Normal frames (N, 3, T, H, W) channels_last_3d and log-mels (N, 1, M, F) on the device."""
    generator = torch.Generator().manual_seed(seed)
    frames = log_mel = None
    if config.has_visual:
        frames = torch.randn(clips, 3, config.num_fast_frames, *size, generator=generator)
        frames = frames.to(device(), memory_format=torch.channels_last_3d)
    if config.has_audio:
        log_mel = torch.randn(clips, 1, config.num_mel_frames, config.num_mel_bins, generator=generator).to(device())
    return frames, log_mel


def make_model(config: ModelConfig) -> AVSlowFast:
    """Seeded weights; norms and the fc scaled so that logits are of order 1 as in a trained model."""
    torch.manual_seed(0)
    model = build_model(replace(config, freeze="none", sync_loss="none")).to(device())
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            nn.init.constant_(module.weight, 0.7)
    return model


def interleaved(steps: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each step in each of `repeats` turns, after two to warm up.

    Steps that alternate share the machine's moods.
    """
    times: list[list[float]] = [[] for _ in steps]
    for number in range(repeats + 2):
        order = list(enumerate(steps))
        for which, step in order if number % 2 else reversed(order):  # no step always runs in another's warm caches
            _finish()
            start = time.perf_counter()
            step()
            _finish()
            if number >= 2:
                times[which].append(time.perf_counter() - start)
    return times


def over_builds(build: Callable[[], Sequence[Callable[[], object]]], repeats: int) -> list[list[float]]:
    """As `interleaved`, over `BUILDS` builds of the models: their speed depends on where the weights happen to lie."""
    rounds = [interleaved(build(), repeats) for _ in range(BUILDS)]
    return [[t for times in arms for t in times] for arms in zip(*rounds, strict=True)]


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the turns of time / base: a machine that changes its speed from turn to turn does not enter."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


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


def _training(model: AVSlowFast, frames: Tensor | None, log_mel: Tensor | None, **options: Any) -> Callable[[], None]:
    """Return a step of the model, forward and backward."""

    def step() -> None:
        model.zero_grad()
        model(frames, log_mel, **options).logits.square().mean().backward()

    return step


def _medians(**times: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(turns) for name, turns in times.items()}


def dropped(variant: str, clips: int, repeats: int) -> dict[str, Any]:
    """A dropped training step against the same step of the visual-only model of the same laterals."""
    config = replace(VARIANTS[variant], sync_loss="none")
    plain = replace(config, pathways=("slow", "fast"), fusion="none")
    frames, log_mel = make_inputs(config, clips, size_px(variant))

    def build() -> list[Callable[[], None]]:
        """Return the kept, the dropped and the visual-only step."""
        both, visual = make_model(config), make_model(plain)
        given = frames, log_mel
        return [_training(both, *given), _training(both, *given, drop_audio=True), _training(visual, *given)]

    kept_s, dropped_s, visual_s = over_builds(build, repeats)
    medians = _medians(kept_s=kept_s, dropped_s=dropped_s, visual_only_s=visual_s)
    ratios = {"dropped_over_visual_only": ratio(dropped_s, visual_s), "kept_over_visual_only": ratio(kept_s, visual_s)}
    return {"variant": variant, "clips": clips, "builds": BUILDS, **_rounded(medians | ratios)}


def settle(model: AVSlowFast, forward: Callable[[Tensor | None, Tensor | None], object], size: tuple[int, int]) -> None:
    """Give every layer a part in the logits, as in a trained model: in place, the same on every call.

    Fresh weights would leave most of the model out: the last scale of each residual branch is 0. Scales become uniform
    in [0.5, 1], shifts in [-0.2, 0.2]; running statistics are those of two other clips, moved by up to a tenth of a
    standard deviation (means) and a quarter (variances).

    Args:
        forward: one forward of the model on (frames, log_mel).
        size: height and width of its frames.
    """
    generator = torch.Generator().manual_seed(1)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    norms = [module for module in model.modules() if isinstance(module, GhostBatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(uniform(norm.weight, 0.5, 1.0))
            norm.bias.copy_(uniform(norm.bias, -0.2, 0.2))
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and module.bias is not None:
                module.bias.copy_(uniform(module.bias, -0.2, 0.2))
        precise_bn(model, [make_inputs(model.config, 2, size, seed=1)], forward)
        for norm in norms:
            norm.running_mean.add_(uniform(norm.bias, -0.1, 0.1) * norm.running_var.sqrt())
            norm.running_var.mul_(uniform(norm.bias, 0.8, 1.25))


def precision_row(name: str, clips: int, px: int, batch_statistics: bool) -> dict[str, Any]:
    """Relative difference of the logits of bf16 and fp16 autocast from fp32, same weights (see `settle`).

    Args:
        name: of a variant. clips: N. px: side of the frames; 0 = as in the paper.
        batch_statistics: norms as in training, over the clips of the batch, instead of running statistics.
    """
    config = replace(VARIANTS[name], dropout_rate=0.0, sync_loss="none")
    size = (px, px) if px else size_px(name)
    model = make_model(config)  # in train mode: logits, not scores
    boxes = torch.tensor([[0, 8.0, 8, 56, 56]], device=device()) if config.head == "detection" else None

    def forward(frames: Tensor | None, log_mel: Tensor | None) -> ModelOutput:
        output: ModelOutput = model(frames, log_mel, boxes=boxes)
        return output

    settle(model, forward, size)
    apply_freeze(model, "none" if batch_statistics else "bn_statistics")
    frames, log_mel = make_inputs(config, clips, size)
    logits = {}
    with torch.no_grad():
        for precision in DTYPES:
            with autocast(precision), _float16_convolutions(precision):
                logits[precision] = forward(frames, log_mel).logits
    row: dict[str, Any] = {"variant": name, "clips": clips, "px": list(size)}
    for precision in ("bf16", "fp16"):
        difference = (logits[precision] - logits["fp32"]).norm() / logits["fp32"].norm()
        row[f"{precision}_relative"] = round(difference.item(), 5)
    return row


def layout(variant: str, clips: int, repeats: int) -> dict[str, Any]:
    """Training step in channels_last_3d against the same step with row-major tensors and plain batch norms."""
    config = replace(VARIANTS[variant], sync_loss="none")
    frames, log_mel = make_inputs(config, clips, size_px(variant))
    contiguous = None if frames is None else frames.contiguous()

    def build() -> list[Callable[[], None]]:
        """Return the step in channels_last_3d and the row-major one."""
        last, row_major = make_model(config), make_model(config)
        _make_row_major(row_major)
        return [_training(last, frames, log_mel), _training(row_major, contiguous, log_mel)]

    with mock.patch("model.avslowfast.check_frames", _accept):  # row-major frames too
        last_s, contiguous_s = over_builds(build, repeats)
    medians = _medians(channels_last_s=last_s, contiguous_s=contiguous_s)
    times = _rounded(medians | {"ratio": ratio(last_s, contiguous_s)})
    return {"variant": variant, "clips": clips, "builds": BUILDS, **times}


def step_time(variant: str, clips: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per clip of forward and backward, kept and dropped."""
    config = VARIANTS[variant]
    model = make_model(config)
    frames, log_mel = make_inputs(config, clips, size_px(variant))
    labels = torch.zeros(clips, dtype=torch.long, device=device())

    def train(drop_audio: bool) -> Callable[[], None]:
        """Return a step with the audio kept or dropped."""

        def step() -> None:
            F.cross_entropy(model(frames, log_mel, drop_audio=drop_audio).logits, labels).backward()

        return step

    kept_s, dropped_s = (statistics.median(turns) for turns in interleaved([train(False), train(True)], repeats))
    per_clip = {"kept_ms": 1e3 * kept_s / clips, "dropped_ms": 1e3 * dropped_s / clips}
    return {"variant": variant, "clips": clips, "threads": torch.get_num_threads(), **_rounded(per_clip)}


def folded(variant: str, clips: int, repeats: int) -> dict[str, Any]:
    """Evaluation with batch normalisations folded against the unfolded model: time and largest score difference."""
    config = replace(VARIANTS[variant], sync_loss="none")
    frames, log_mel = make_inputs(config, clips, size_px(variant))

    def build() -> list[Callable[[], Tensor]]:
        """Return the evaluation of the folded and of the unfolded model."""
        model = make_model(config).eval()
        short = fold(model)
        return [lambda: short(frames, log_mel).scores, lambda: model(frames, log_mel).scores]

    with torch.no_grad():
        folded_s, plain_s = over_builds(build, repeats)
        short_scores, scores = (run() for run in build())
    medians = _medians(folded_s=folded_s, unfolded_s=plain_s)
    times = _rounded(medians | {"ratio": ratio(folded_s, plain_s)})
    difference = (short_scores - scores).abs().max().item()
    return {"variant": variant, "clips": clips, "builds": BUILDS, **times, "max_score_difference": difference}


def merge(path: Path, section: str, entry: dict[str, Any]) -> None:
    """Merge one section of results into a JSON file.

    Args:
        path: of the file; is made if it does not exist.
        section: its key in the document; other sections stay.
        entry: "rows" and whatever describes them; a row replaces the earlier one of its variant and precision.
    """
    document = json.loads(path.read_text()) if path.exists() else {}
    rows = {(row["variant"], row.get("precision")): row for row in document.get(section, {}).get("rows", [])}
    rows.update({(row["variant"], row.get("precision")): row for row in entry["rows"]})
    document[section] = entry | {"rows": list(rows.values())}
    write_whole(path, document)


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bf16 or fp16; nothing for fp32."""
    return torch.autocast(device().type, DTYPES[precision], enabled=precision != "fp32")


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


class _PlainNorm(nn.Module):
    """`torch.batch_norm` in whatever layout, with the interface of GhostBatchNorm."""

    def __init__(self, norm: GhostBatchNorm) -> None:
        super().__init__()
        self.inner = norm

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_norm: Any = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Tensor:
        """As `GhostBatchNorm.forward`: (N, C, ...) to the same shape, H and W halved with pool."""
        n = self.inner
        y = torch.batch_norm(x, n.weight, n.bias, n.running_mean, n.running_var, True, 0.1, n.eps, False)
        if residual is not None:
            y = y + (residual if residual_norm is None else residual_norm(residual))
        y = torch.relu(y) if relu else y
        return F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1)) if pool else y


class _PlainLateral(nn.Module):
    """Concatenation and audio addition in whatever layout, with the interface of LateralFusion."""

    def __init__(self, norm: GhostBatchNorm) -> None:
        super().__init__()
        self.norm = _PlainNorm(norm)

    def forward(self, slow: Tensor, lateral: Tensor, *, audio: Tensor | None = None, keep: Any = None) -> Tensor:
        y = torch.cat([slow, self.norm(lateral, relu=True)], 1)
        return y if audio is None else y + audio[:, :, :, None, None]


def _make_row_major(model: AVSlowFast) -> None:
    """Row-major weights, plain norms and plain 3-D convolutions, in place."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()
        if isinstance(module, nn.Conv3d):
            module.forward = nn.Conv3d.forward.__get__(module)  # type: ignore[method-assign]
        for name, child in list(module.named_children()):
            if isinstance(child, GhostBatchNorm) and not isinstance(module, _PlainNorm):
                setattr(module, name, _PlainNorm(child))
    for stage in model.stages.values():
        lateral: Any = stage.fast_to_slow
        lateral.fuse = _PlainLateral(lateral.fuse.norm.inner)


def _accept(frames: Tensor, config: ModelConfig) -> None:
    """Frames of any layout."""


@contextlib.contextmanager
def _float16_convolutions(precision: str) -> Iterator[None]:
    """On a CPU, float16 convolutions as float32 ones of rounded operands, rounded again: float16 with float32 sums.

    oneDNN has float16 convolutions for few CPUs; elsewhere PyTorch's own take five times as long as float32's, half of
    it in Fast's conv1 (5x7x7, 3-D).
    """
    if precision != "fp16" or device().type != "cpu":
        yield
        return
    originals = {name: getattr(F, name) for name in ("conv2d", "conv3d")}

    def rounded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a convolution of operands rounded to float16."""

        def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):  # a part that runs in float32
                return original(x, weight, bias, *args)
            with torch.autocast("cpu", enabled=False):
                operands = [None if t is None else t.half().float() for t in (x, weight, bias)]
                return original(*operands, *args).half()

        return convolution

    try:
        for name, original in originals.items():
            setattr(F, name, rounded(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _check(what: str, variants: Sequence[str], px: int) -> None:
    """Raise ValueError for a measurement that a variant has no meaning for."""
    if px != 0 and px < 32:
        raise ValueError(f"--px ({px}) must be 0 (as in the paper) or at least 32")
    for name in variants if what != "precision" else ():
        config = VARIANTS[name]
        if not config.has_visual or config.head not in ("softmax", "sigmoid"):
            raise ValueError(f"variant ({name}) must classify frames for {what}; take another one, such as small")
        if what in ("dropped", "step") and not config.has_audio:
            raise ValueError(f"variant ({name}) must have sound for {what}; take another one, such as small")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("what", choices=["dropped", "layout", "precision", "step", "folded"])
    parser.add_argument("--variants", nargs="+", default=["small"], choices=sorted(VARIANTS), metavar="VARIANT")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--px", type=int, default=0, help="side of a view for precision; 0 = as in the paper")
    parser.add_argument("--repeats", type=int, default=11, help="timed turns of every build")
    parser.add_argument("--batch-statistics", action="store_true", help="for precision: norms as in training")
    parser.add_argument("--out", type=Path, help="merge the rows into this JSON file")
    options = parser.parse_args(arguments)
    for name in ("clips", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} ({getattr(options, name)}) must be at least 1")
    try:
        check_out(options.out)
        _check(options.what, options.variants, options.px)
    except ValueError as problem:
        parser.error(str(problem))
    measure: Callable[[str], dict[str, Any]]
    if options.what == "precision":
        section = "precision_batch_statistics" if options.batch_statistics else "precision"
        measure = lambda name: precision_row(name, options.clips, options.px, options.batch_statistics)  # noqa: E731
    else:
        section = options.what
        chosen = {"dropped": dropped, "layout": layout, "step": step_time, "folded": folded}[section]
        measure = lambda name: chosen(name, options.clips, options.repeats)  # noqa: E731
    given = list(sys.argv[1:] if arguments is None else arguments)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.model_speed", *given]),
        "machine": machine(device().type),
    }
    sys.stdout.write(json.dumps(about) + "\n")
    for name in options.variants:
        row = measure(name)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        if options.out is not None:
            merge(options.out, section, about | {"rows": [row]})


if __name__ == "__main__":
    main()
