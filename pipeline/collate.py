"""Graph outputs and planned clips to a Batch, without copying what DALI returned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.clip import ClipBox
from pipeline.config import LabelKind
from pipeline.source import HostClip


@dataclass(frozen=True)
class BatchSpec:
    """What a Batch holds beside the graph's outputs.

    Args:
        device: Where its tensors are.
        label_kind: As in `DataConfig`.
        num_classes: K of multi-hot labels.
        rotation: Whether it tells the quarter turns of each clip.
    """

    device: torch.device
    label_kind: LabelKind
    num_classes: int
    rotation: bool


def collate(clips: Sequence[HostClip], outputs: dict[str, Any], spec: BatchSpec) -> Batch:
    """Make a Batch of the graph's outputs; crops of one clip become neighbouring entries.

    Args:
        clips: The clips of the batch.
        outputs: DALI tensor lists by name; frames may be a tensor (B, S, T, H, W, C).
        spec: What else it holds.

    Raises:
        ValueError: a box whose label is none of the classes.
    """
    plans = [clip.plan for clip in clips]
    crops = len(plans[0].crops)
    frames = _frames(outputs["frames"]) if "frames" in outputs else None
    if frames is not None and any(plan.rotation for plan in plans):
        _rotate_(frames, [plan.rotation for plan in plans])
    boxes, box_labels, box_index = _boxes([plan.boxes for plan in plans], crops, spec)

    def per_clip(values: list[Any], dtype: torch.dtype, on_device: bool = True) -> Tensor:
        """Return (B,) values, each repeated for the crops of its clip."""
        tensor = torch.tensor(values, dtype=dtype).repeat_interleave(crops, 0)
        return _to_device(tensor, spec.device) if on_device else tensor

    return Batch(
        frames=frames,
        log_mel=_mel(outputs.get("log_mel"), crops),
        negative_log_mel=_mel(outputs.get("negative_log_mel"), crops),
        has_audio=per_clip([clip.has_audio for clip in clips], torch.bool),
        has_negative=per_clip([clip.negative is not None for clip in clips], torch.bool),
        is_substitute=per_clip([plan.substitute_for >= 0 for plan in plans], torch.bool),
        labels=_to_device(_labels([plan.labels for plan in plans], spec).repeat_interleave(crops, 0), spec.device),
        rotation=per_clip([plan.rotation for plan in plans], torch.int64) if spec.rotation else None,
        sample=per_clip([plan.sample for plan in plans], torch.int64, on_device=False),
        view=torch.tensor([plan.view * crops + crop for plan in plans for crop in range(crops)]),
        position=per_clip([plan.position for plan in plans], torch.int64, on_device=False),
        ids=[plan.id for plan in plans for _ in range(crops)],
        start_s=[plan.start_s for plan in plans for _ in range(crops)],
        boxes=boxes,
        box_labels=box_labels,
        box_index=box_index,
    )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without a wait: from pageable memory the host would wait for the steps that the device has in hand."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _frames(output: Any) -> Tensor:
    """DALI's (T, H, W, C) or (S, T, H, W, C) samples, or a tensor of the latter, as (B*S, 3, T, H, W) without a copy.

    A view in channels_last_3d, or in such memory of four channels, of which three are shown.
    """
    tensor: Tensor = output if isinstance(output, Tensor) else torch.from_dlpack(output.as_tensor())
    if tensor.dim() == 6:
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


def _labels(labels: Sequence[tuple[int, ...]], spec: BatchSpec) -> Tensor:
    """(B,) int64, -1 where a clip has no label of its own; or (B, K) float32 multi-hot."""
    if spec.label_kind in ("single", "boxes"):
        return torch.tensor([classes[0] if classes else -1 for classes in labels], dtype=torch.int64)
    return _multi_hot(labels, spec.num_classes)


def _multi_hot(labels: Sequence[tuple[int, ...]], num_classes: int) -> Tensor:
    """(rows, K) float32 of 0 and 1."""
    out = torch.zeros(len(labels), num_classes)
    for row, classes in enumerate(labels):
        out[row, list(classes)] = 1.0
    return out


def _boxes(
    found: Sequence[tuple[ClipBox, ...] | None], crops: int, spec: BatchSpec
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Boxes of every crop, in the order of the batch's entries: (R, 5), (R, K) and their numbers in the sample."""
    if any(boxes is None for boxes in found):
        return None, None, None
    rows = [(clip * crops + box.crop, box) for clip, boxes in enumerate(found) for box in boxes or ()]
    labels = [box.labels for _, box in rows]
    classes = [label for own in labels for label in own]
    if classes and not 0 <= min(classes) <= max(classes) < spec.num_classes:
        raise ValueError(
            f"box labels ({min(classes)}..{max(classes)}) must be in 0..{spec.num_classes - 1}; "
            "check num_classes against the classes of the store"
        )
    corners = torch.tensor([(entry, *box.corners) for entry, box in rows], dtype=torch.float32).reshape(-1, 5)
    index = torch.tensor([box.index for _, box in rows], dtype=torch.int64)
    return _to_device(corners, spec.device), _to_device(_multi_hot(labels, spec.num_classes), spec.device), index
