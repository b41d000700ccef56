"""Speed and precision of the model itself on the present device: what docs report.

python -m benchmarks.model_speed dropped       # a dropped step against the visual-only model's step
python -m benchmarks.model_speed layout        # channels_last_3d against plain row-major PyTorch, small preset, CPU
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.kernel_timing import check_out, machine, write_whole
from benchmarks.steps.inputs import (
    BUILDS,
    DTYPES,
    autocast,
    device,
    interleaved,
    make_inputs,
    make_model,
    over_builds,
    ratio,
    size_px,
)
from benchmarks.steps.plain_model import build_plain, check_plain
from benchmarks.steps.ways import logits_of
from kernels.modules import GhostBatchNorm
from kernels.precise_bn import precise_bn
from model.avslowfast import AVSlowFast
from model.folding import fold
from model.modes import apply_freeze
from model.variants import VARIANTS


def _training(model: nn.Module, frames: Tensor | None, log_mel: Tensor | None, **options: Any) -> Callable[[], None]:
    """Return a step of the model, forward and backward."""

    def step() -> None:
        model.zero_grad()
        logits_of(model(frames, log_mel, **options)).square().mean().backward()

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
        model: changed in place.
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
        name: of a variant.
        clips: N.
        px: side of the frames; 0 = as in the paper.
        batch_statistics: norms as in training, over the clips of the batch, instead of running statistics.
    """
    config = replace(VARIANTS[name], dropout_rate=0.0, sync_loss="none")
    size = (px, px) if px else size_px(name)
    model = make_model(config)  # in train mode: logits, not scores
    boxes = torch.tensor([[0, 8.0, 8, 56, 56]], device=device()) if config.head == "detection" else None

    def forward(frames: Tensor | None, log_mel: Tensor | None) -> Tensor:
        return logits_of(model(frames, log_mel, boxes=boxes)).float()

    settle(model, forward, size)
    apply_freeze(model, "none" if batch_statistics else "bn_statistics")
    frames, log_mel = make_inputs(config, clips, size)
    logits = {}
    with torch.no_grad():
        for precision in DTYPES:
            with autocast(precision), float16_convolutions(precision):
                logits[precision] = forward(frames, log_mel)
    row: dict[str, Any] = {"variant": name, "clips": clips, "px": list(size)}
    for precision in ("bf16", "fp16"):
        difference = (logits[precision] - logits["fp32"]).norm() / logits["fp32"].norm()
        row[f"{precision}_relative"] = round(difference.item(), 5)
    return row


def layout(variant: str, clips: int, repeats: int) -> dict[str, Any]:
    """Training step in channels_last_3d against that of the same network in plain row-major PyTorch."""
    config = replace(VARIANTS[variant], sync_loss="none")
    frames, log_mel = make_inputs(config, clips, size_px(variant))
    contiguous = None if frames is None else frames.contiguous()

    def build() -> list[Callable[[], None]]:
        """Return the step in channels_last_3d and the row-major one."""
        row_major = build_plain(config, view="5-D", channels_last=False).to(device())
        return [_training(make_model(config), frames, log_mel), _training(row_major, contiguous, log_mel)]

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
            F.cross_entropy(logits_of(model(frames, log_mel, drop_audio=drop_audio)), labels).backward()

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
        return [lambda: logits_of(short(frames, log_mel)), lambda: logits_of(model(frames, log_mel))]

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


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


class Float16Convolutions(TorchFunctionMode):
    """Convolutions of operands rounded to float16, summed in float32, their result rounded to float16.

    oneDNN has float16 convolutions for few CPUs; elsewhere PyTorch's own take five times as long as float32's, half of
    it in Fast's conv1 (5x7x7, 3-D). Outside autocast, in a part that runs in float32, nothing changes.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Call `function`, a convolution in its own way."""
        options = options or {}
        if function not in (torch.conv2d, torch.conv3d) or not torch.is_autocast_enabled("cpu"):
            return function(*arguments, **options)
        with torch.autocast("cpu", enabled=False):
            x, weight, bias, *rest = (*arguments, None) if len(arguments) == 2 else arguments
            operands = [None if t is None else t.half().float() for t in (x, weight, bias)]
            return function(*operands, *rest, **options).half()


@contextlib.contextmanager
def float16_convolutions(precision: str) -> Iterator[None]:
    """`Float16Convolutions` for fp16 on a CPU, nothing elsewhere."""
    if precision != "fp16" or device().type != "cpu":
        yield
        return
    with Float16Convolutions():
        yield


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
        if what == "layout":
            check_plain(config)


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
