"""Decoded pictures as YUV planes: PyAV in, BT.601 limited range 4:2:0 out; colour is converted here only.

Odd sizes lose their last column or row. A rotation flag is applied. Legend: F frames, H W pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipeline.media.picture import BT601_MATRICES

UInt8 = NDArray[np.uint8]
Planes = tuple[UInt8, UInt8]  # y (F, H, W, 1), uv (F, H/2, W/2, 2): what NV12 holds
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class PlaneWriter:
    """Fills y (F, H, W, 1) and uv (F, H/2, W/2, 2) from decoded frames of any pixel format.

    Args:
        count: F. width, height: px of the output, even, after rotation.
        quarter_turns, mirror: counter-clockwise quarter turns, then left-right mirror, that bring a frame upright.
        convert_matrix: bring tagged BT.709 and the like to BT.601 (plain files); off for stored video, whose planes
            are what every decoder hands to the same BT.601 formula.
        out: memory of these shapes to fill; None takes new memory.
    """

    def __init__(
        self,
        count: int,
        width: int,
        height: int,
        *,
        quarter_turns: int = 0,
        mirror: bool = False,
        convert_matrix: bool = True,
        out: Planes | None = None,
    ) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"size ({width}x{height}) must be even and at least 2x2; crop odd sizes with even_size()")
        shapes = (count, height, width, 1), (count, height // 2, width // 2, 2)
        self.y, self.uv = out or (np.empty(shapes[0], np.uint8), np.empty(shapes[1], np.uint8))
        assert (self.y.shape, self.uv.shape) == shapes, f"memory for planes must be {shapes}"
        self._turns, self._mirror, self._convert = quarter_turns % 4, mirror, convert_matrix
        self._size = (height, width) if self._turns % 2 else (width, height)  # of the decoded frame
        self._reformatter = VideoReformatter()

    def write(self, slot: int, frame: VideoFrame) -> None:
        """Put one frame into slot 0..F-1."""
        frame = self._normalized(frame)
        width, height = self._size
        planes = [_plane(frame, i)[: height // s, : width // s] for i, s in enumerate((1, 2, 2))]
        if self._turns:
            planes = [np.rot90(plane, self._turns) for plane in planes]
        if self._mirror:
            planes = [plane[:, ::-1] for plane in planes]
        self.y[slot, :, :, 0], self.uv[slot, :, :, 0], self.uv[slot, :, :, 1] = planes

    def copy(self, source: int, target: int) -> None:
        """Repeat the picture of one slot in another."""
        self.y[target], self.uv[target] = self.y[source], self.uv[source]

    def _normalized(self, frame: VideoFrame) -> VideoFrame:
        width, height = self._size
        close = width <= frame.width <= width + 1 and height <= frame.height <= height + 1
        full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
        matrix = self._convert and frame.colorspace not in BT601_MATRICES
        if frame.format.name == "yuv420p" and close and not full and not matrix:
            return frame
        return self._reformatter.reformat(
            frame,
            width=frame.width if close else width,
            height=frame.height if close else height,
            format="yuv420p",
            src_colorspace=frame.colorspace if matrix else Colorspace.ITU601,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND,
            threads=1,
        )


def _plane(frame: VideoFrame, number: int) -> NDArray[np.uint8]:
    plane: Any = frame.planes[number]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


def in_order_asked(planes: Planes, inverse: NDArray[Any], out: Planes | None) -> Planes:
    """Put planes of distinct rising frames into the order in which frames were asked for.

    Args:
        planes: of D distinct frames; `out` itself where nothing has to be moved.
        inverse: (F,) which of the distinct frames each asked one is.
        out: memory for the result, or None.
    """
    if is_rising(inverse):
        return planes
    if out is None:
        return planes[0][inverse], planes[1][inverse]
    for plane, target in zip(planes, out, strict=True):
        np.take(plane, inverse, axis=0, out=target)
    return out


def is_rising(numbers: NDArray[Any]) -> bool:
    """Whether each number is larger than the one before it."""
    return bool((numbers[1:] > numbers[:-1]).all())


def even_size(width: int, height: int) -> tuple[int, int]:
    """Size without an odd last column or row (at least 2x2)."""
    return max(2, width // 2 * 2), max(2, height // 2 * 2)


@contextmanager
def open_video(source: Any, stream: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a path or a buffer for decoding; gives the container and the stream (by number, or the first video).

    The decoder has one thread. Only local files and buffers are opened: no network or device protocol.
    """
    in_memory = isinstance(source, bytes | np.ndarray)
    target = io.BytesIO(source) if in_memory else f"file:{source}"
    options = {} if in_memory else {"protocol_whitelist": "file"}
    with av.open(target, container_options=options) as container:
        chosen = container.streams[stream] if stream is not None else container.streams.video[0]
        if chosen.type == "video":
            chosen.codec_context.thread_count = 1
            chosen.codec_context.thread_type = "SLICE"
        yield container, chosen


def decode_cut(data: UInt8 | bytes, wanted: NDArray[Any], width: int, height: int) -> tuple[UInt8, UInt8]:
    """Decode frames of a cut by their number in it.

    Args:
        data: a whole video file in memory, e.g. VideoCut.data.
        wanted: (F,) int numbers from 0, rising, without repeats.
        width, height: px, even.

    Returns:
        y (F, H, W, 1), uv (F, H/2, W/2, 2) uint8, the stored planes (BT.601 limited range by the store's contract).

    Raises:
        ValueError: fewer frames than wanted. av.error.FFmpegError: undecodable.
    """
    out = PlaneWriter(len(wanted), width, height, convert_matrix=False)
    numbers = iter(enumerate(wanted.tolist()))
    slot, number = next(numbers, (0, -1))
    with open_video(data) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            if count == number:
                out.write(slot, frame)
                slot, number = next(numbers, (0, -1))
                if number < 0:
                    break
    if number >= 0:
        raise ValueError(f"frames decoded must reach number {number} of the cut; it is damaged, make it again")
    return out.y, out.uv
