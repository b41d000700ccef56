"""Frames on their way to the stems: Slow's share of them, four channels in memory, their dtype.

Legend: B or N clips, T frames, H W pixels.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convolutions import FactoredConv3d
from model.pixel_groups import with_four_channels


def slow_frames(frames: Tensor, config: ModelConfig) -> Tensor:
    """Slow's T frames of Fast's alpha_F T: every alpha_F-th, or floored linspace(0, alpha_F T - 1, T).

    Args:
        frames: (B, 3, alpha_F T, H, W) channels_last_3d; or 4 channels, see `pixel_groups.with_four_channels`.
    Returns:
        (B, 3 or 4, T, H, W) channels_last_3d.
    """
    if config.slow_frame_sampling == "stride":
        # The one copy that the two frame rates need; it keeps the layout. Frames that are folded into the batch axis as
        # they lie, alpha_F apart, would be copied by the convolution itself, which wants dense batches.
        return frames[:, :, :: config.alpha_fast].clone(memory_format=torch.channels_last_3d)
    last, count = config.num_fast_frames - 1, config.num_frames
    picked = [index * last // max(count - 1, 1) for index in range(count)]
    rows = frames.movedim(1, -1)  # in memory order, so that the result is channels_last_3d whatever the strides
    return torch.cat([rows[:, i : i + 1] for i in picked], 1).movedim(-1, 1)


def stem_frames(frames: Tensor, stem: FactoredConv3d) -> Tensor:
    """Frames as both stems take them: of four channels where they are convolved like that, else as given.

    Args:
        frames: (B, 3, T, H, W) channels_last_3d, or a view of four channels.
        stem: Fast's.
    Returns:
        (B, 3 or 4, T, H, W) channels_last_3d; four channels are in autocast's dtype, cast once for both stems.
    """
    if not stem.takes_four_channels(frames):
        return in_dtype_of(frames, stem.weight)
    kind = frames.device.type
    autocast = torch.is_autocast_enabled(kind)
    return with_four_channels(frames, torch.get_autocast_dtype(kind) if autocast else stem.weight.dtype)


def in_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs x in the weights' dtype, unless autocast takes care of it (the loader gives float16)."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)
