"""The boxes of a cut: what its decoder has to know, and where the samples of each fragment lie.

A cut is an init segment and whole fragments, one video track, offsets counted from each `moof` (default-base-is-moof).
Layout of the boxes: ISO 14496-12, 8.8 (fragments), 14496-15 (avcC), 14496-1, 7.2.6 (esds).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.media.fragments import mp4_boxes

Data = bytes | memoryview
_SAMPLE_ENTRY_BYTES = 86  # box header and VisualSampleEntry, before the boxes inside it
_JPEG_OBJECT_TYPE = 0x6C
_BASE_OFFSET, _DEFAULT_SIZE = 0x000001, 0x000010  # flags of tfhd
_TFHD_BEFORE_SIZE = ((0x000002, 4), (0x000008, 4))  # sample description, duration
_DATA_OFFSET, _FIRST_FLAGS = 0x000001, 0x000004  # flags of trun
_SIZE = 0x000200
_FIELDS = (0x000100, _SIZE, 0x000400, 0x000800)  # of each sample: duration, size, flags, composition offset


class StreamHeader(NamedTuple):
    """What an init segment says.

    Args:
        codec: "h264", "vp9" or "mjpeg".
        configuration: the decoder's (content of `avcC`), for H.264 only.
        default_size: Bytes of a sample of which no fragment says it; 0: not given.
    """

    codec: str
    configuration: bytes
    default_size: int


class Fragment(NamedTuple):
    """Where the samples of a fragment lie, in decoding order.

    Args:
        begin, end: of the content of its `mdat`.
        runs: first byte of the first sample, and the bytes of each, one behind the other.
    """

    begin: int
    end: int
    runs: list[tuple[int, list[int]]]


def init_bytes(data: Data) -> int:
    """Length of the init segment, everything before the first `moof`; raises ValueError where there is none."""
    for kind, begin, _ in mp4_boxes(data, 0, len(data)):
        if kind == b"moof":
            return begin
    raise ValueError(f"cut ({len(data)} bytes) must hold a fragment; it is damaged, make it again")


def stream_header(init: Data) -> StreamHeader:
    """Read an init segment.

    Raises:
        ValueError: another layout or codec.
    """
    begin, end = _child(init, 0, len(init), b"moov")
    default_size = 0
    for kind, extends, extends_end in mp4_boxes(init, begin + 8, end):
        if kind == b"mvex":
            inner, inner_end = _child(init, extends + 8, extends_end, b"trex")
            default_size = _u32(init, inner + 24, inner_end)
    for name in (b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        begin, end = _child(init, begin + 8, end, name)
    for kind, entry, entry_end in mp4_boxes(init, begin + 16, end):  # behind version, flags and count of entries
        if kind == b"vp09":
            return StreamHeader("vp9", b"", default_size)
        if kind == b"mp4v":
            _check_jpeg(init, entry, entry_end)
            return StreamHeader("mjpeg", b"", default_size)
        if kind == b"avc1":
            inner, inner_end = _child(init, entry + _SAMPLE_ENTRY_BYTES, entry_end, b"avcC")
            return StreamHeader("h264", bytes(init[inner + 8 : inner_end]), default_size)
    raise ValueError("sample description must hold one of avc1, mp4v, vp09; make the store again")


def _check_jpeg(init: Data, entry: int, end: int) -> None:
    """Check that an `mp4v` entry is MJPEG: its descriptor gives object type 0x6C (ISO 14496-1, 7.2.6.6)."""
    inner, inner_end = _child(init, entry + _SAMPLE_ENTRY_BYTES, end, b"esds")
    at = inner + 12  # box header, version and flags
    for tag, skipped in ((3, 3), (4, 0)):  # ES descriptor: its number and flags; decoder configuration
        if at >= inner_end or init[at] != tag:
            raise ValueError(f"MP4 box b'esds' must hold descriptor {tag}; make the store again")
        at += 1
        while at < inner_end and init[at] & 0x80:
            at += 1
        at += 1 + skipped
    if at >= inner_end or init[at] != _JPEG_OBJECT_TYPE:
        raise ValueError("MPEG-4 stream must be of JPEG pictures; make the store again")


def _child(data: Data, begin: int, end: int, name: bytes) -> tuple[int, int]:
    for kind, inner, inner_end in mp4_boxes(data, begin, end):
        if kind == name:
            return inner, inner_end
    raise ValueError(f"MP4 box {name!r} (missing) must be in the init segment; make the store again")


def fragments_of(data: Data, begin: int, default_size: int = 0) -> Iterator[Fragment]:
    """Yield where the samples of each fragment from byte `begin` on lie.

    Args:
        data: The cut.
        begin: Behind its init segment.
        default_size: Of the stream's header.

    Raises:
        ValueError: boxes or samples that do not lie inside their fragment.
    """
    runs: list[tuple[int, list[int]]] = []  # of the last moof
    for kind, box, end in mp4_boxes(data, begin, len(data)):
        if kind == b"moof":
            runs = list(_runs(data, box, end, default_size))
        elif kind == b"mdat" and runs:
            for first, sizes in runs:
                size = sum(sizes)
                if not box + 8 <= first <= first + size <= end:
                    raise ValueError(
                        f"samples at byte {first} ({size} bytes) must lie in their fragment, which ends at {end}; the "
                        "cut is damaged, make it again"
                    )
            yield Fragment(box + 8, end, runs)
            runs = []


def _runs(data: Data, moof: int, end: int, default_size: int) -> Iterator[tuple[int, list[int]]]:
    """First byte and sizes of the samples of each `trun` of a `moof` box."""
    for kind, traf, traf_end in mp4_boxes(data, moof + 8, end):
        if kind != b"traf":
            continue
        size = default_size
        for inner, box, box_end in mp4_boxes(data, traf + 8, traf_end):
            if inner == b"tfhd":
                size = _default_size(data, box, box_end, default_size)
            elif inner == b"trun":
                yield _run(data, box, box_end, moof, size)


def _default_size(data: Data, box: int, end: int, default_size: int) -> int:
    """Size that samples have where their `trun` gives none."""
    flags = _u32(data, box + 8, end) & 0xFFFFFF
    if flags & _BASE_OFFSET:
        raise ValueError("fragment must count its offsets from its moof box, not from the file; make the store again")
    at = box + 16 + sum(length for flag, length in _TFHD_BEFORE_SIZE if flags & flag)  # behind the track's number
    return _u32(data, at, end) if flags & _DEFAULT_SIZE else default_size


def _run(data: Data, box: int, end: int, moof: int, default_size: int) -> tuple[int, list[int]]:
    flags, count = _u32(data, box + 8, end) & 0xFFFFFF, _u32(data, box + 12, end)
    if not flags & _DATA_OFFSET:
        raise ValueError("trun box must give where its samples begin; make the store again")
    first = moof + _u32(data, box + 16, end)
    at = box + 20 + (4 if flags & _FIRST_FLAGS else 0)
    fields = [flag for flag in _FIELDS if flags & flag]
    if at + 4 * len(fields) * count > end:
        raise ValueError(f"trun box of {count} samples must hold their fields; make the store again")
    if _SIZE in fields:
        words = np.frombuffer(data, ">u4", len(fields) * count, at)
        return first, words[fields.index(_SIZE) :: len(fields)].tolist()
    if count and not 0 < default_size * count <= len(data):  # before memory is taken for them
        raise ValueError(f"{count} samples of {default_size} bytes must lie in their cut; make the store again")
    return first, [default_size] * count


def _u32(data: Data, at: int, end: int) -> int:
    if at + 4 > end:
        raise ValueError(f"MP4 box must reach byte {at + 4}, ends at {end}; make the store again")
    return int(struct.unpack_from(">I", data, at)[0])
