"""Cuts of stored videos to YUV planes with decoders that live on: no container is opened, packets come from `trun`.

Opening a container and a decoder for each clip costs more than decoding light pictures. A `CutDecoder` keeps one
decoder for each stream header that it has seen lately, and gives the planes that `yuv.decode_cut` gives.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.media.cut_boxes import fragments_of, init_bytes, stream_header
from pipeline.media.yuv import Planes, PlaneWriter

UInt8 = NDArray[np.uint8]
_DECODERS_KEPT = 8  # by stream header: a store has one for each picture size and rate that it holds


class CutDecoder:
    """Decodes cuts of H.264, VP9 and MJPEG stores; belongs to one thread."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()  # with the default size of a sample

    def decode(
        self, data: UInt8 | bytes, wanted: NDArray[Any], width: int, height: int, out: Planes | None = None
    ) -> Planes:
        """Decode frames of a cut by their number in it.

        Args:
            data: Init segment and whole fragments, e.g. VideoCut.data.
            wanted: (F,) int numbers from 0, rising, without repeats.
            width: Pixels, even.
            height: Pixels, even.
            out: Memory for the planes; None takes new memory.

        Returns:
            y (F, H, W, 1), uv (F, H/2, W/2, 2) uint8, the stored planes: `out` where it was given.

        Raises:
            ValueError: fewer frames than wanted, or bytes that are no such cut. av.error.FFmpegError: undecodable.
        """
        view = memoryview(data) if isinstance(data, bytes) else data.data
        begin = init_bytes(view)
        header = bytes(view[:begin])
        writer = PlaneWriter(len(wanted), width, height, convert_matrix=False, out=out)
        numbers = wanted.tolist()
        slot, count = 0, 0
        context, default_size = self._context(header)
        try:
            for frame in _frames(context, packets(view, begin, default_size)):
                if count == numbers[slot]:
                    writer.write(slot, frame)
                    slot += 1
                    if slot == len(numbers):
                        break
                count += 1
        except BaseException:
            self._contexts.pop(header, None)  # its state is unknown
            raise
        context.flush_buffers()
        if slot < len(numbers):
            raise ValueError(
                f"frames decoded must reach number {numbers[slot]} of the cut; it is damaged, make it again"
            )
        return writer.y, writer.uv

    def _context(self, header: bytes) -> tuple[Any, int]:
        kept = self._contexts.pop(header, None)
        if kept is None:
            codec, configuration, default_size = stream_header(header)
            context = av.CodecContext.create(codec, "r")
            if configuration:
                context.extradata = configuration
            context.thread_count, context.thread_type = 1, "SLICE"
            while len(self._contexts) >= _DECODERS_KEPT:
                self._contexts.popitem(last=False)
            kept = context, default_size
        self._contexts[header] = kept
        return kept


class CutDecoders(threading.local):
    """One `CutDecoder` for each thread that asks."""

    def __init__(self) -> None:
        self._decoder = CutDecoder()

    def of_this_thread(self) -> CutDecoder:
        """Return the decoder of the calling thread."""
        return self._decoder


def _frames(context: Any, found: Iterator[bytes | memoryview]) -> Iterator[Any]:
    for number, data in enumerate(found):
        packet = av.Packet(data)
        packet.pts = packet.dts = number
        yield from context.decode(packet)
    yield from context.decode(None)


def packets(data: memoryview, begin: int, default_size: int = 0) -> Iterator[memoryview]:
    """Yield the samples of the fragments from byte `begin` on, in decoding order, as views; see `fragments_of`."""
    for fragment in fragments_of(data, begin, default_size):
        for first, sizes in fragment.runs:
            at = first
            for size in sizes:
                yield data[at : at + size]
                at += size
