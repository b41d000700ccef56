"""Cuts of stored videos to YUV planes with decoders that live on: no container is opened, packets come from `trun`.

Opening a container and a decoder for each clip costs more than decoding light pictures. A `CutDecoder` keeps one
decoder for each stream header that it has seen lately, and gives the planes that `yuv.decode_cut` gives.
Layout of the boxes: ISO 14496-12, 8.8 (fragments), and 14496-15 (avcC).
"""

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.media.fragments import mp4_boxes
from pipeline.media.yuv import Planes, PlaneWriter

UInt8 = NDArray[np.uint8]
_DECODERS_KEPT = 8  # by stream header: a store has one for each picture size and rate that it holds
_CODECS = {b"avc1": "h264", b"vp09": "vp9", b"mp4v": "mjpeg"}
_SAMPLE_ENTRY_BYTES = 86  # box header and VisualSampleEntry, before the boxes inside it


class CutDecoder:
    """Decodes cuts of H.264, VP9 and MJPEG stores; belongs to one thread."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[bytes, Any] = OrderedDict()

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
        init_bytes = _init_bytes(view)
        header = bytes(view[:init_bytes])
        writer = PlaneWriter(len(wanted), width, height, convert_matrix=False, out=out)
        numbers = wanted.tolist()
        slot, count = 0, 0
        context = self._context(header)
        try:
            for frame in _frames(context, packets(view, init_bytes)):
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

    def _context(self, header: bytes) -> Any:
        context = self._contexts.pop(header, None)
        if context is None:
            codec, extradata = stream_header(header)
            context = av.CodecContext.create(codec, "r")
            if extradata:
                context.extradata = extradata
            context.thread_count, context.thread_type = 1, "SLICE"
            while len(self._contexts) >= _DECODERS_KEPT:
                self._contexts.popitem(last=False)
        self._contexts[header] = context
        return context


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


def _init_bytes(data: memoryview) -> int:
    """Length of the init segment: everything before the first `moof`."""
    for kind, begin, _ in mp4_boxes(data, 0, len(data)):
        if kind == b"moof":
            return begin
    raise ValueError(f"cut ({len(data)} bytes) must hold a fragment; it is damaged, make it again")


def stream_header(init: bytes) -> tuple[str, bytes]:
    """Return codec ("h264", "vp9", "mjpeg") and decoder configuration (avcC, for H.264 only) of an init segment.

    Raises:
        ValueError: another layout or codec.
    """
    begin, end = 0, len(init)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        begin, end = _child(init, begin, end, name)
        begin += 8
    for kind, entry, entry_end in mp4_boxes(init, begin + 8, end):
        if kind in _CODECS:
            if kind == b"vp09":
                return "vp9", b""
            if kind == b"mp4v":
                return _mpeg4_header(init, entry, entry_end)
            inner, inner_end = _child(init, entry + _SAMPLE_ENTRY_BYTES, entry_end, b"avcC")
            return "h264", init[inner + 8 : inner_end]
    raise ValueError(f"sample description must hold one of {sorted(k.decode() for k in _CODECS)}; make the store again")


def _mpeg4_header(init: bytes, entry: int, end: int) -> tuple[str, bytes]:
    """Header of an `mp4v` entry, which is MJPEG where its descriptor says object type 0x6C (ISO 14496-1, 7.2.6.6)."""
    inner, inner_end = _child(init, entry + _SAMPLE_ENTRY_BYTES, end, b"esds")
    at = inner + 12  # box header, version and flags
    for tag, skipped in ((3, 3), (4, 0)):  # ES descriptor: its number and flags; decoder configuration
        if at >= inner_end or init[at] != tag:
            raise ValueError(f"MP4 box b'esds' must hold descriptor {tag}; make the store again")
        at += 1
        while at < inner_end and init[at] & 0x80:
            at += 1
        at += 1 + skipped
    if at >= inner_end or init[at] != 0x6C:
        raise ValueError("MPEG-4 stream must be of JPEG pictures; make the store again")
    return "mjpeg", b""


def _child(data: bytes, begin: int, end: int, name: bytes) -> tuple[int, int]:
    for kind, inner, inner_end in mp4_boxes(data, begin, end):
        if kind == name:
            return inner, inner_end
    raise ValueError(f"MP4 box {name!r} (missing) must be in the init segment; make the store again")


def packets(data: memoryview, begin: int) -> Iterator[memoryview]:
    """Yield the samples of the fragments from byte `begin` on, in decoding order, as views.

    Raises:
        ValueError: boxes or samples that do not lie inside their fragment.
    """
    sizes: list[tuple[int, int]] = []  # of the last moof: where each sample begins, its bytes
    for kind, box, end in mp4_boxes(data, begin, len(data)):
        if kind == b"moof":
            sizes = list(_samples(data, box, end))
        elif kind == b"mdat":
            for first, size in sizes:
                if not box + 8 <= first <= first + size <= end:
                    raise ValueError(f"sample at byte {first} ({size} bytes) must lie in its fragment; make it again")
                yield data[first : first + size]
            sizes = []


def _samples(data: memoryview, moof: int, end: int) -> Iterator[tuple[int, int]]:
    """First byte and size of each sample of a `moof` box; offsets count from its beginning (default-base-is-moof)."""
    for kind, traf, traf_end in mp4_boxes(data, moof + 8, end):
        if kind != b"traf":
            continue
        default_size = 0
        for inner, box, box_end in mp4_boxes(data, traf + 8, traf_end):
            if inner == b"tfhd":
                default_size = _default_size(data, box, box_end)
            elif inner == b"trun":
                yield from _run(data, box, box_end, moof, default_size)


def _default_size(data: memoryview, box: int, end: int) -> int:
    """Size that samples have where their `trun` gives none."""
    flags = _u32(data, box + 8, end) & 0xFFFFFF
    if flags & 0x000001:
        raise ValueError("fragment must count its offsets from its moof box, not from the file; make the store again")
    at = box + 16  # after the track's number
    for flag, length in ((0x000002, 4), (0x000008, 4)):  # sample description, duration
        at += length if flags & flag else 0
    return _u32(data, at, end) if flags & 0x000010 else 0


def _run(data: memoryview, box: int, end: int, moof: int, default_size: int) -> Iterator[tuple[int, int]]:
    flags, count = _u32(data, box + 8, end) & 0xFFFFFF, _u32(data, box + 12, end)
    at = box + 16
    if not flags & 0x000001:
        raise ValueError("trun box must give where its samples begin; make the store again")
    first = moof + _u32(data, at, end)
    at += 4 + (4 if flags & 0x000004 else 0)
    fields = [flag for flag in (0x000100, 0x000200, 0x000400, 0x000800) if flags & flag]
    if at + 4 * len(fields) * count > end:
        raise ValueError(f"trun box of {count} samples must hold their fields; make the store again")
    sizes = [default_size] * count
    if 0x000200 in fields:
        words = np.frombuffer(data, ">u4", len(fields) * count, at)
        sizes = words[fields.index(0x000200) :: len(fields)].tolist()
    for size in sizes:
        yield first, size
        first += size


def _u32(data: memoryview, at: int, end: int) -> int:
    if at + 4 > end:
        raise ValueError(f"MP4 box must reach byte {at + 4}, ends at {end}; make the store again")
    return int(struct.unpack_from(">I", data, at)[0])
