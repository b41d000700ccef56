"""Batch: the only type that leaves the pipeline.

Legend: B clips (views count as clips), C = 3 channels, T frames, H W pixels, M audio frames, F mel bins, R boxes,
K classes.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """Clips on the device, ready for the model; checks itself.

    Args:
        frames: (B, 3, T, H, W) float16 or float32, normalised; None where the model takes no video. Dense
            channels_last_3d, or (on CUDA) three channels of such memory of four (see `empty_frames`).
        log_mel: (B, 1, M, F) float32, normalised, zero where `has_audio` is False; None where the model takes no audio.
        negative_log_mel: Out-of-sync audio of the same shape, or None.
        has_audio: (B,) bool: False where the medium is silent or has no sound in the clip's window.
        has_negative: (B,) bool.
        is_substitute: (B,) bool: fills the slot of a clip that could not be read; never in an evaluation.
        labels: (B,) int64 class ids, or (B, K) float32 multi-hot; -1 where a sample has no label.
        rotation: (B,) int64 quarter turns counter-clockwise, or None.
        sample: (B,) int64 rows of the split's sample table, on the host.
        view: (B,) int64 number of the view, on the host.
        position: (B,) int64 place in the stream, on the host.
        ids: B sample names.
        start_s: B start times in the medium, seconds.
        boxes: (R, 5) float32: entry of the batch (0..B-1), x1, y1, x2, y2 in input pixels of that entry; or None. Each
            crop has the boxes that lie in it, cut at its edge.
        box_labels: (R, K) float32 multi-hot, or None.
        box_index: (R,) int64 number of the box in its sample, on the host, or None.
    """

    frames: Tensor | None
    log_mel: Tensor | None
    negative_log_mel: Tensor | None
    has_audio: Tensor
    has_negative: Tensor
    is_substitute: Tensor
    labels: Tensor
    rotation: Tensor | None
    sample: Tensor
    view: Tensor
    position: Tensor
    ids: list[str]
    start_s: list[float]
    boxes: Tensor | None = None
    box_labels: Tensor | None = None
    box_index: Tensor | None = None

    def __post_init__(self) -> None:
        size = len(self.ids)
        per_clip = (self.frames, self.log_mel, self.negative_log_mel, self.has_audio, self.has_negative,
                    self.is_substitute, self.labels, self.rotation, self.sample, self.view, self.position)  # fmt: skip
        assert all(t is None or len(t) == size for t in per_clip), f"every tensor must hold {size} clips: {self}"
        assert len(self.start_s) == size, f"start_s ({len(self.start_s)}) must hold {size} clips"
        if self.frames is not None:
            shape = tuple(self.frames.shape)
            assert (len(shape), *shape[1:2]) == (5, 3), f"frames {shape} must be (B, 3, T, H, W)"
            assert is_channels_last(self.frames), (
                f"strides {self.frames.stride()} of frames must be channels_last_3d, of 3 or 4 channels in memory"
            )
        for mel in (self.log_mel, self.negative_log_mel):
            assert mel is None or (mel.dim() == 4 and mel.dtype == torch.float32), "log-mel must be 4-D float32"

    def __len__(self) -> int:
        return len(self.ids)

    def clone(self) -> "Batch":
        """Return a batch in memory of its own, which outlives the loader's buffers; frames keep their channels."""
        values = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        if self.frames is not None:
            values["frames"] = empty_frames_like(self.frames).copy_(self.frames)
        return Batch(**values)

    def __repr__(self) -> str:
        shapes = (
            f"{f.name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        )
        return f"Batch({len(self)} clips: {'; '.join(shapes)})"


def empty_frames(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str, *, pad_channels: bool
) -> Tensor:
    """Return uninitialised frames as the graph lays them out.

    Args:
        shape: B, T, H, W.
        dtype: Of the frames.
        device: Where.
        pad_channels: Four channels in memory, the fourth zero, so that convolutions may read 4 as they lie there.

    Returns:
        (B, 3, T, H, W): dense channels_last_3d, or a view with pixels four values apart.
    """
    memory = torch.empty((*shape, 4 if pad_channels else 3), dtype=dtype, device=device)
    memory[..., 3:] = 0
    return memory.permute(0, 4, 1, 2, 3)[:, :3]


def empty_frames_like(frames: Tensor) -> Tensor:
    """Return uninitialised frames of the same shape, type, place and layout as those of a Batch."""
    clips, _, *sizes = frames.shape
    shape = (clips, sizes[0], sizes[1], sizes[2])
    return empty_frames(shape, frames.dtype, frames.device, pad_channels=has_padded_channels(frames))


def has_padded_channels(frames: Tensor) -> bool:
    """Whether frames (B, 3, T, H, W) are three channels of channels_last_3d memory of four."""
    _, shown, t, h, w = frames.shape
    wanted = (t * h * w * 4, 1, h * w * 4, w * 4, 4)
    strides = zip(frames.shape, frames.stride(), wanted, strict=True)
    return shown == 3 and all(size == 1 or stride == expected for size, stride, expected in strides)


def is_channels_last(frames: Tensor) -> bool:
    """Whether frames (B, 3, T, H, W) are dense channels_last_3d or three channels of such memory of four."""
    return frames.is_contiguous(memory_format=torch.channels_last_3d) or has_padded_channels(frames)
