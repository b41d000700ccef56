"""What a decoder of whole clips is, and its twin on the CPU: Annex-B bytes in, planes of the wanted pictures out.

A decoder lives on from clip to clip, because making one costs NVDEC 0.2 s. H.264 says what every bit of a decoded
picture is, so that planes do not depend on who decoded them.

Legend: T wanted pictures, H W pixels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.media.annexb import AnnexB
from pipeline.media.yuv import PlaneWriter


class DecodeError(RuntimeError):
    """A decoder that failed with a clip; its state is unknown, so that another one is made for the next clip."""


class StreamKind(NamedTuple):
    """What one decoder is made for: codec of a store, coded size in px."""

    codec: str
    width: int
    height: int


@dataclass(frozen=True)
class ClipPlanes:
    """Planes of one clip where the graph takes them: NumPy arrays of the CPU twin, tensors of a CUDA device.

    Args:
        luma: (T, H, W, 1) uint8, contiguous.
        chroma: (T, H/2, W/2, 2) uint8, contiguous.
        ready: CUDA event behind the work that fills them; None where they are filled.
    """

    luma: Any
    chroma: Any
    ready: Any = None


class StreamDecoder(Protocol):
    """Decodes clips of one kind, one after the other, in one thread."""

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        """Decode a clip to its end.

        Args:
            stream: A whole closed run of GOPs.
            wanted: (T,) int numbers of pictures in display order from 0, not falling; repeats are allowed.

        Raises:
            DecodeError: not every wanted picture came out, or the decoder failed.
        """
        ...

    def close(self) -> None:
        """Give back what the decoder holds."""
        ...


class FFmpegDecoder:
    """The CPU twin: FFmpeg, fed with the same bytes in the same way. For tests and rehearsals.

    Args:
        kind: Streams that it takes.
    """

    def __init__(self, kind: StreamKind) -> None:
        self._kind = kind
        self._context = av.CodecContext.create(kind.codec, "r")
        self._context.thread_count = 1

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        """See StreamDecoder."""
        context, numbers = self._context, wanted.tolist()
        writer = PlaneWriter(len(numbers), self._kind.width, self._kind.height, convert_matrix=False)
        slot, count = 0, 0
        try:
            packets = [*context.parse(stream.data.tobytes()), *context.parse(None), None]
            for frame in (frame for packet in packets for frame in context.decode(packet)):
                if (frame.width, frame.height) != self._kind[1:]:
                    raise DecodeError(f"picture ({frame.width}x{frame.height} px) must be of {self._kind}")
                while slot < len(numbers) and numbers[slot] == count:
                    writer.write(slot, frame)
                    slot += 1
                count += 1
            context.flush_buffers()
        except av.error.FFmpegError as error:
            raise DecodeError(str(error)) from error
        check_count(count, stream, numbers)
        return ClipPlanes(writer.y, writer.uv)

    def close(self) -> None:
        """See StreamDecoder."""


def check_count(decoded: int, stream: AnnexB, wanted: list[int]) -> None:
    """Check that a clip gave every picture that it holds.

    Raises:
        DecodeError: fewer or more pictures than samples, or a number wanted that there is not.
    """
    if decoded != stream.num_frames or not 0 <= wanted[0] <= wanted[-1] < decoded:
        raise DecodeError(
            f"pictures decoded ({decoded}) must be those of the clip ({stream.num_frames}) and hold numbers "
            f"{wanted[0]}..{wanted[-1]}"
        )


def on_host(plane: Any) -> NDArray[np.uint8]:
    """Return a plane as a NumPy array; waits for the device."""
    return plane if isinstance(plane, np.ndarray) else plane.cpu().numpy()
