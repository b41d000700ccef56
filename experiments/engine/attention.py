"""Where a model with AV Nonlocal looks when it hears: the affinity of the sound with every place (section 3.3, iii)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.engine.data import eval_loader
from experiments.engine.predictor import Predictor
from model.fusion import AudioVisualNonLocal
from pipeline.clip import PIXEL_MEAN, PIXEL_STD
from pipeline.folder.dataset import FolderSplit
from pipeline.folder.describe import PlainFile

CLIPS = 2  # of a file


class NoAttentionError(ValueError):
    """A model that has no such attention."""


@dataclass(frozen=True)
class Attended:
    """One clip at one stage.

    Args:
        start_s: of the clip.
        stage: such as res4.
        has_audio: whether the clip has sound; without it the audio is dropped, and the map is of no consequence.
        frames: (T, H, W, 3) uint8, those of Slow, as the model has them.
        maps: (T, h, w) float32 affinity, mean over the steps of the sound; positive: its value is added.
    """

    start_s: float
    stage: str
    has_audio: bool
    frames: NDArray[np.uint8]
    maps: NDArray[np.float32]


def attending_stages(model: nn.Module | None) -> dict[str, AudioVisualNonLocal]:
    """Return the fusions that ask, by stage.

    Raises:
        NoAttentionError: a model without any, or a program, whose parts cannot be seen.
    """
    modules = () if model is None else model.named_modules()
    found = {n.split(".")[-1]: m for n, m in modules if isinstance(m, AudioVisualNonLocal) and hasattr(m, "key")}
    if not found:
        kind = "an exported program" if model is None else "other fusions"
        raise NoAttentionError(
            f"--attention must be given for a model with model.fusion=av_nonlocal, not {kind}; leave it out"
        )
    return found


def affinities(stages: dict[str, AudioVisualNonLocal], forward: Any) -> dict[str, Tensor]:
    """Run a forward pass and return the affinity of the sound with every place, by stage.

    Args:
        stages: of `attending_stages`.
        forward: runs the model, without arguments.

    Returns:
        stage -> (N, T, h, w) float32, the mean over the steps of the sound of query times key, over the number of keys.
    """
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(stage: str, part: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__((stage, part), output.detach().float())

    with ExitStack() as stack:
        for stage, module in stages.items():
            for part in ("query", "key"):
                handle = getattr(module, part).register_forward_hook(keep(stage, part))
                stack.callback(handle.remove)
        forward()
    found = {}
    for stage in stages:
        query, key = seen[stage, "query"].flatten(2).mean(2), seen[stage, "key"]  # (N, C), (N, C, T, h, w)
        found[stage] = torch.einsum("nc,ncthw->nthw", query, key) / key.shape[2:].numel()
    return found


def attention_of(predictor: Predictor, file: PlainFile) -> list[Attended]:
    """Return what a model attends to in some clips of a file, its middle crop.

    Args:
        predictor: with a model of AV Nonlocal.
        file: described.

    Raises:
        NoAttentionError: another model.
    """
    stages = attending_stages(predictor.scorer.model)
    views = dataclasses.replace(predictor.config.views, num_clips=CLIPS, num_crops=1)
    config = dataclasses.replace(predictor.config, views=views)
    loader = eval_loader(config, FolderSplit.of_files([file], ["000000"]), predictor.runtime)
    found: dict[tuple[float, str], Attended] = {}
    with closing(loader.batches()) as batches:
        for batch in batches:
            assert batch.frames is not None, "AV Nonlocal has visual pathways"
            maps = affinities(stages, lambda batch=batch: predictor.scorer.score(batch))  # type: ignore[misc]
            for clip in range(len(batch)):
                for stage, each in maps.items():
                    shown = _pictures(batch.frames[clip], each.shape[1])
                    attended = Attended(
                        batch.start_s[clip], stage, bool(batch.has_audio[clip]), shown, each[clip].cpu().numpy()
                    )
                    found[attended.start_s, stage] = attended
    return [found[key] for key in sorted(found)]


def _pictures(frames: Tensor, count: int) -> NDArray[np.uint8]:
    """(3, F, H, W) normalised -> the `count` frames of Slow, (count, H, W, 3)."""
    slow = frames.float()[:, :: max(1, frames.shape[1] // count)][:, :count]
    pixels = ((slow * PIXEL_STD + PIXEL_MEAN).clamp(0, 1) * 255).round().to(torch.uint8)
    shown: NDArray[np.uint8] = pixels.permute(1, 2, 3, 0).cpu().numpy()
    return shown


def draw_attention_of(predictor: Predictor, path: Path, file: PlainFile, name: str) -> None:
    """Draw what a model attends to in a file; arguments as for `attention_of`, and where the PNG goes."""
    from experiments.records.attention_picture import draw_attention

    rows: Sequence[Attended] = attention_of(predictor, file)
    draw_attention(list(_labelled(rows)), path, f"{name}: affinity of the sound with each place, beside its mean")


def _labelled(rows: Sequence[Attended]) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float32]]]:
    for row in rows:
        heard = "" if row.has_audio else "\nno sound: dropped"
        yield f"{row.stage}, {row.start_s:.1f} s{heard}", row.frames, row.maps
