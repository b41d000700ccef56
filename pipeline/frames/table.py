"""What is to be made of every crop of a batch, as one row of whole numbers: what a GPU is told in one small copy.

Worked out on the host in the arithmetic of csrc/frames.cpp (`touched`, `Resize::set`, the beginning of `fill_taps`), in
single precision. Floats are there as their bits.

Legend: N = clips x crops, S crops, T frames, H W pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipPlan

# Of a plane: address, bytes from frame to frame and from row to row, height, width, whether rows are blended first,
# then scale, origin and offset of its rows' taps, and of its columns'.
PLANE_FIELDS = 12
FIELDS = 2 * PLANE_FIELDS + 1  # luma, chroma, whether left and right are exchanged
MOST_PX = 1 << 15
_SLACK_PX = np.float32(0.01)  # windows are sums of rounded numbers


class Plane(NamedTuple):
    """Where a plane of a clip lies: the address of its first byte, bytes from frame to frame and row to row, size."""

    address: int
    frame_step: int
    row_step: int
    height: int
    width: int


def crop_corners(plan: ClipPlan) -> NDArray[np.float32]:
    """(S, 4): top, left, bottom, right of each crop in stored pixels."""
    corners = [(w.top, w.left, w.top + w.height, w.left + w.width) for w in plan.crops]
    return np.array(corners, np.float32)


def crop_table(plans: Sequence[ClipPlan], planes: Sequence[tuple[Plane, Plane]]) -> NDArray[np.int64]:
    """Return (N, FIELDS), the crops of a clip after one another.

    Args:
        plans: Of clips with one output size and equally many crops.
        planes: Luma and chroma of each.

    Raises:
        ValueError: a size beyond 32768 px, or a window that leaves its picture.
    """
    crops = len(plans[0].crops)
    corners = np.concatenate([crop_corners(plan) for plan in plans])
    luma, chroma = (np.repeat(np.array(kind, np.int64), crops, 0) for kind in zip(*planes, strict=True))
    _check(plans, corners, luma)
    table = np.empty((len(corners), FIELDS), np.int64)
    _fill(table[:, :PLANE_FIELDS], luma, corners, plans[0].size_px)
    _fill(table[:, PLANE_FIELDS:-1], chroma, corners * np.float32(0.5), plans[0].size_px)
    table[:, -1] = np.repeat([plan.flip for plan in plans], crops)
    return table


def _check(plans: Sequence[ClipPlan], corners: NDArray[np.float32], luma: NDArray[np.int64]) -> None:
    lengths = luma[:, 3:5]
    low, high = corners[:, :2], corners[:, 2:]
    inside = (low >= -_SLACK_PX) & (high > low) & (high <= lengths.astype(np.float32) + _SLACK_PX)
    sized = (lengths >= 1) & (lengths <= MOST_PX)
    for problem, holds in (
        (f"sizes must be 1..{MOST_PX} px", sized.all(1) & all(1 <= side <= MOST_PX for side in plans[0].size_px)),
        ("every crop window must be finite, not empty and inside the picture", inside.all(1)),
    ):
        if not holds.all():
            row = int(np.argmin(holds))
            plan, (height, width) = plans[row // len(plans[0].crops)], lengths[row].tolist()
            sizes = f"picture {height}x{width}, output {plan.size_px[0]}x{plan.size_px[1]}"
            raise ValueError(f"frames of {plan.id} ({sizes}, window {corners[row].tolist()}): {problem}")


def _fill(table: NDArray[np.int64], planes: NDArray[np.int64], corners: Any, size: tuple[int, int]) -> None:
    """Write the fields of one plane, (N, PLANE_FIELDS); corners (N, 4) float32 in its own pixels."""
    start, end, length = corners[:, :2], corners[:, 2:], planes[:, 3:5]
    low, high = (np.clip(np.floor(at), 0, length).astype(np.int64) for at in (start - 1, end + 2))  # what DALI reads
    rows, columns = size
    blended, picked = (high - low)[:, 1] * rows, (high - low)[:, 0] * columns
    rows_first = 5 * blended + rows * columns < 6 * picked
    scale = (end - start) / np.array(size, np.float32)
    offset = np.where(np.stack([rows_first, ~rows_first], 1), 0, low)
    origin = (start - offset.astype(np.float32)) + (np.float32(0.5) * scale - np.float32(0.5) - np.float32(1))
    table[:, :5], table[:, 5] = planes, rows_first
    for axis in (0, 1):
        at = 6 + 3 * axis
        table[:, at], table[:, at + 1] = scale[:, axis].view(np.int32), origin[:, axis].view(np.int32)
        table[:, at + 2] = offset[:, axis]
