"""Graph outputs and host clips to a Batch, without copying what DALI returned."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.boxes import to_input_pixels
from pipeline.clip import ClipPlan
from pipeline.config import DataConfig
from pipeline.dataset import Int32, SampleTable
from pipeline.plan import TrainPlan
from pipeline.source import HostClip
from pipeline.views import EvalPlan


def assemble(
    clips: list[HostClip],
    outputs: dict[str, Any],
    plan: TrainPlan | EvalPlan,
    config: DataConfig,
    options: Any,
) -> Batch:
    """Make a Batch of the graph's outputs; crops of one clip become neighbouring entries.

    Args:
        clips: B host clips.
        outputs: DALI tensor lists by name.
        plan: Where the clips come from.
        config: Label set and kind.
        options: `LoaderOptions`.
    """
    crops = len(clips[0].plan.crops)
    samples = plan.dataset.samples
    frames = _frames(outputs["frames"], crops) if "frames" in outputs else None
    if frames is not None and any(clip.plan.rotation for clip in clips):
        _rotate_(frames, [clip.plan.rotation for clip in clips])
    training = isinstance(plan, TrainPlan)
    num_classes = options.num_classes or len(plan.dataset.classes.get(config.label_set, ()))
    boxes = _boxes(clips, plan, num_classes) if _has_boxes(samples) else (None, None, None)
    device = torch.device(options.device)

    def per_clip(values: list[Any], dtype: torch.dtype, on_device: bool = True) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype).repeat_interleave(crops, 0)
        return tensor.to(device, non_blocking=True) if on_device else tensor

    return Batch(
        frames=frames,
        log_mel=_mel(outputs.get("log_mel"), crops),
        negative_log_mel=_mel(outputs.get("negative_log_mel"), crops),
        has_audio=per_clip([clip.has_audio for clip in clips], torch.bool),
        has_negative=per_clip([clip.negative is not None for clip in clips], torch.bool),
        is_substitute=per_clip([clip.plan.substitute_for >= 0 for clip in clips], torch.bool),
        labels=_labels(clips, samples, config, num_classes, training).repeat_interleave(crops, 0).to(device),
        rotation=per_clip([clip.plan.rotation for clip in clips], torch.int64) if config.rotation else None,
        sample=per_clip([clip.plan.sample for clip in clips], torch.int64, on_device=False),
        view=torch.tensor([clip.plan.view * crops + crop for clip in clips for crop in range(crops)]),
        position=per_clip([clip.plan.position for clip in clips], torch.int64, on_device=False),
        ids=[samples.id(clip.plan.sample) for clip in clips for _ in range(crops)],
        start_s=[clip.plan.start_s for clip in clips for _ in range(crops)],
        boxes=None if boxes[0] is None else boxes[0].to(device),
        box_labels=None if boxes[1] is None else boxes[1].to(device),
        box_index=boxes[2],
    )


def _has_boxes(samples: SampleTable) -> bool:
    return samples.box_columns is not None and len(samples.box_columns[0].values) > 0


def _frames(output: Any, crops: int) -> Tensor:
    """DALI's (T, H, W, C) or (S, T, H, W, C) samples as (B*S, 3, T, H, W) without a copy.

    A view in channels_last_3d, or in such memory of four channels, of which three are shown.
    """
    tensor: Tensor = torch.from_dlpack(output.as_tensor())
    if crops > 1:
        tensor = tensor.flatten(0, 1)  # (B, S, T, H, W, C) -> (B*S, T, H, W, C)
    return tensor.permute(0, 4, 1, 2, 3)[:, :3]


def _mel(output: Any, crops: int) -> Tensor | None:
    """DALI's (M, F) samples as (B*S, 1, M, F)."""
    if output is None:
        return None
    tensor: Tensor = torch.from_dlpack(output.as_tensor()).unsqueeze(1)
    return tensor.repeat_interleave(crops, 0) if crops > 1 else tensor


def _rotate_(frames: Tensor, quarter_turns: list[int]) -> None:
    """Turn clips in place (square pictures), counter-clockwise."""
    for clip, turns in zip(frames, quarter_turns, strict=True):
        if turns:
            clip.copy_(torch.rot90(clip, turns, dims=(-2, -1)))


def _labels(
    clips: list[HostClip], samples: SampleTable, config: DataConfig, num_classes: int, training: bool
) -> Tensor:
    """(B,) int64, or (B, K) float32 multi-hot."""
    if config.label_kind == "boxes" or (config.label_kind == "single" and not samples.has(config.label_set)):
        return torch.full((len(clips),), -1, dtype=torch.int64)
    if config.label_kind == "single":
        return torch.tensor([_single_label(samples, clip.plan.sample, config.label_set) for clip in clips])
    out = torch.zeros(len(clips), num_classes)
    for row, clip in enumerate(clips):
        out[row, torch.from_numpy(active_labels(clip.plan, samples, config, training).astype(np.int64))] = 1.0
    return out


def _single_label(samples: SampleTable, sample: int, label_set: str) -> int:
    labels = samples.labels(label_set).row(sample)
    return -1 if len(labels) == 0 else samples.label_of(sample, label_set)


def active_labels(clip: ClipPlan, samples: SampleTable, config: DataConfig, training: bool) -> Int32:
    """Return the classes of a clip, (L,) int32: the sample's, or with timed labels in training those of the moment.

    Of the moment are the ones between first and last frame, both included. An evaluation counts all of the sample's,
    also those whose time lies behind the end of the file.
    """
    if config.label_kind == "multi_hot":
        return samples.labels(config.label_set).row(clip.sample)
    actions = samples.actions(clip.sample)
    if not training:
        whole = samples.labels(config.label_set).row(clip.sample) if samples.has(config.label_set) else ()
        return np.union1d(actions.label, np.asarray(whole, np.int32))
    begin, end = clip.start_s, clip.end_s
    return np.unique(actions.label[(actions.start_s <= end) & (actions.end_s >= begin)])


def _boxes(
    clips: list[HostClip], plan: TrainPlan | EvalPlan, num_classes: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Boxes of every crop, in the order of the batch's entries: (R, 5), (R, K) and their numbers in the sample."""
    table, samples = plan.dataset.media, plan.dataset.samples
    boxes, labels, numbers = [], [], []
    crops = [(clip.plan, window) for clip in clips for window in clip.plan.crops]
    for entry, (clip, window) in enumerate(crops):
        described = samples.boxes(clip.sample)
        stored = (int(table.height[clip.media]), int(table.width[clip.media]))
        pixels, keep = to_input_pixels(described.boxes, window, stored, clip.size_px, clip.flip, clip.rotation)
        boxes.append(np.hstack([np.full((int(keep.sum()), 1), entry, np.float32), pixels[keep]]))
        labels.append(described.multi_hot(num_classes)[keep])
        numbers.append(np.flatnonzero(keep))
    return (
        torch.from_numpy(np.concatenate(boxes)),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.concatenate(numbers).astype(np.int64)),
    )
