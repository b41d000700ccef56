"""Boxes through resize, crop, flip and rotation (AVA)."""

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import CropWindow


def to_input_pixels(
    boxes: NDArray[np.float32],
    window: CropWindow,
    stored_size_px: tuple[int, int],
    size_px: tuple[int, int],
    flip: bool,
    quarter_turns: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Carry boxes from the picture into the model's input.

    Args:
        boxes: (R, 4) x1, y1, x2, y2 in [0, 1] of the picture.
        window: The crop, in stored pixels.
        stored_size_px: Height and width of the stored picture.
        size_px: Height and width of the input.
        flip: Whether the clip is mirrored left and right.
        quarter_turns: Quarter turns counter-clockwise that follow (square inputs).

    Returns:
        (R, 4) float32 boxes in input pixels clipped to the input, and (R,) bool: whether anything of the box is left.
    """
    height, width = stored_size_px
    to_stored = np.array([width, height, width, height], np.float32)
    origin = np.array([window.left, window.top, window.left, window.top], np.float32)
    scale = np.array([size_px[1] / window.width, size_px[0] / window.height] * 2, np.float32)
    out = (boxes * to_stored - origin) * scale
    out[:, 0::2] = out[:, 0::2].clip(0, size_px[1])
    out[:, 1::2] = out[:, 1::2].clip(0, size_px[0])
    if flip:
        out[:, [0, 2]] = size_px[1] - out[:, [2, 0]]
    for _ in range(quarter_turns):  # a point (x, y) goes to (y, side - x)
        out = np.stack([out[:, 1], size_px[1] - out[:, 2], out[:, 3], size_px[1] - out[:, 0]], axis=1)
    keep = (out[:, 2] - out[:, 0] >= 1) & (out[:, 3] - out[:, 1] >= 1)
    return out.astype(np.float32), keep
