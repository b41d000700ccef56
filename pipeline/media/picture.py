"""One decoded picture -> the stored picture: yuv420p, limited range, turned upright, sides multiples of 16."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipeline.media.fragments import SIZE_MULTIPLE_PX
from pipeline.media.probe import RefusedError

BT601_MATRICES = (2, 5, 6)  # ISO 23091-2: untagged, BT.470BG, SMPTE 170M; the store's and DALI's matrix


@dataclass(frozen=True)
class Turn:
    """How a picture must be turned to stand upright: quarter turns counter-clockwise, 0..3, then mirrored or not."""

    quarters: int = 0
    mirror: bool = False

    def __bool__(self) -> bool:
        return self.quarters != 0 or self.mirror


@dataclass(frozen=True)
class Size:
    """Stored size (multiples of 16) and display size (true aspect), in px, both upright."""

    width: int
    height: int
    display_width: int
    display_height: int


def turn_of(frame: Any) -> Turn:
    """Read a frame's display matrix (ISO 14496-12: 3x3, 16.16 fixed point, row by row), to the nearest quarter turn."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    a, b, _, c, d = struct.unpack_from("<5i", bytes(data))
    mirror = a * d - b * c < 0
    if mirror:
        a, c = -a, -c  # the picture is mirrored last: take that off, what is left is a rotation
    degrees = float(np.degrees(np.arctan2(-b, a)))  # counter-clockwise; the matrix has y pointing down
    return Turn(round(degrees / 90) % 4, mirror)


def stored_size(width: int, height: int, pixel_aspect: Fraction, turn: Turn, short_side_px: int) -> Size:
    """Compute the stored and the display size of a picture.

    The display size stretches one side by the pixel aspect and is scaled down, never up, to the short side. The stored
    size has square pixels unless that would add pixels to a side, and is rounded up to a multiple of 16.

    Args:
        width, height: as coded, px. pixel_aspect: width of a pixel over its height. short_side_px: upper bound.
    """
    if turn.quarters % 2:
        width, height, pixel_aspect = height, width, 1 / pixel_aspect
    wide, high = width * max(pixel_aspect, Fraction(1)), height * max(1 / pixel_aspect, Fraction(1))
    scale = min(Fraction(1), short_side_px / min(wide, high))
    wide, high = wide * scale, high * scale
    return Size(
        _multiple(min(wide, Fraction(width))),
        _multiple(min(high, Fraction(height))),
        max(1, round(wide)),
        max(1, round(high)),
    )


def _multiple(side: Fraction) -> int:
    return max(1, -(-round(side) // SIZE_MULTIPLE_PX)) * SIZE_MULTIPLE_PX


class PictureConverter:
    """Converts frames of any size and format to one stored size.

    Full-range sources (MJPEG, yuvj420p) become limited range, and other colour matrices (BT.709 of HD video) BT.601,
    because that is what DALI decodes with. Scaling is bicubic.

    Args:
        size: of the result. turn: applied after scaling, when there are fewer pixels.
    """

    def __init__(self, size: Size, turn: Turn) -> None:
        self._size, self._turn = size, turn
        self._scaler = VideoReformatter()

    def convert(self, frame: Any) -> Any:
        """Return the stored picture as a PyAV frame (yuv420p); raises RefusedError for colours nothing converts."""
        width, height = self._size.width, self._size.height
        if self._turn.quarters % 2:
            width, height = height, width
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        other_matrix = int(frame.colorspace) not in BT601_MATRICES
        try:
            out = self._scaler.reformat(
                frame,
                width=width,
                height=height,
                format="yuv420p",
                interpolation=Interpolation.BICUBIC,
                src_colorspace=frame.colorspace if other_matrix else Colorspace.ITU601,
                dst_colorspace=Colorspace.ITU601,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
        except (av.error.FFmpegError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            colours = f"{frame.format.name}, matrix {int(frame.colorspace)}, transfer {int(frame.color_trc)}"
            raise RefusedError(
                f"pictures ({colours}) cannot be converted to yuv420p ({error}); encode it anew"
            ) from error
        return self._upright(out) if self._turn else out

    def _upright(self, frame: Any) -> Any:
        planes = [self._plane(plane) for plane in frame.planes]
        turned = []
        for plane in planes:
            plane = np.rot90(plane, self._turn.quarters)
            turned.append(np.fliplr(plane) if self._turn.mirror else plane)
        packed = np.concatenate([plane.reshape(-1) for plane in turned])
        array = packed.reshape(self._size.height * 3 // 2, self._size.width)
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="yuv420p")

    @staticmethod
    def _plane(plane: Any) -> NDArray[np.uint8]:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return rows[: plane.height, : plane.width]
