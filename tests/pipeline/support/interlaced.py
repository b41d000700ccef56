"""H.264 pictures coded as frames or as two fields, written bit by bit (raw samples, no prediction), in any container.

No encoder that PyAV brings codes fields. A picture is 32 x 32 px of one grey; a field is every other row of it.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

SIDE_PX, START = 32, b"\x00\x00\x00\x01"
DARK, WHITE = 40, 230


class _Writer:
    """Bits of a NAL unit."""

    def __init__(self) -> None:
        self.bits = ""

    def put(self, value: int, count: int) -> None:
        self.bits += format(value, f"0{count}b") if count else ""

    def number(self, *values: int) -> None:
        """Exp-Golomb, unsigned."""
        for value in values:
            self.put(value + 1, 2 * (value + 1).bit_length() - 1)

    def unit(self, kind: int) -> bytes:
        """The NAL unit with its end bit, and with bytes that keep start codes out of it."""
        bits = self.bits + "1"
        data = int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")
        out, zeros = bytearray([0x60 | kind]), 0
        for byte in data:
            if zeros >= 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return START + bytes(out)


def _parameters() -> bytes:
    """Sequence and picture parameter sets: Main profile, frames and fields, order of output = order of decoding."""
    sequence, picture = _Writer(), _Writer()
    sequence.put(77 << 16 | 30, 24)
    sequence.number(0, 0, 2, 1)  # id, 4 bits of frame_num, type of picture order, reference frames
    sequence.put(0, 1)
    sequence.number(SIDE_PX // 16 - 1, SIDE_PX // 32 - 1)
    sequence.put(0b00100, 5)  # frame_mbs_only = 0, no adaptive macroblocks, direct_8x8, no crop, no VUI
    picture.number(0, 0)
    picture.put(0, 2)
    picture.number(0, 0, 0)
    picture.put(0, 3)
    picture.number(0, 0, 0)
    picture.put(0, 3)
    return sequence.unit(7) + picture.unit(8)


def _slice(grey: int, field: int | None, number: int) -> bytes:
    """A picture, or a field of one (0 top, 1 bottom), as one slice of raw macroblocks."""
    bits = _Writer()
    bits.number(0, 7, 0)
    bits.put(0, 4)
    bits.put(field is not None, 1)
    is_first = field != 1
    if field is not None:
        bits.put(field, 1)
    if is_first:
        bits.number(number % 2)  # idr_pic_id
    bits.put(0, 2 if is_first else 1)
    bits.number(0)
    for _ in range((SIDE_PX // 16) ** 2 // (1 if field is None else 2)):
        bits.number(25)
        bits.bits += "0" * (-len(bits.bits) % 8)
        bits.bits += format(grey, "08b") * 256 + format(128, "08b") * 128
    return bits.unit(5 if is_first else 1)


def packets_of(kinds: str, white: Sequence[int]) -> list[tuple[bytes, Fraction, bool]]:
    """Data, place in frames and whether a field begins the picture, of each packet.

    Args:
        kinds: "F" a frame, "f" two fields, one letter a picture. white: numbers of white pictures.
    """
    found = []
    for number, kind in enumerate(kinds):
        grey = WHITE if number in white else DARK
        for field in (None,) if kind == "F" else (0, 1):
            head = _parameters() if field != 1 else b""
            found.append((head + _slice(grey, field, number), number + Fraction(field or 0, 2), field != 1))
    return found


def write(
    path: Path, kinds: str, *, fps: Fraction = Fraction(25), white: Sequence[int] = (), format: str | None = None
) -> None:
    """Write a file with a packet for each field; arguments as `packets_of`."""
    pieces = packets_of(kinds, white)
    raw = io.BytesIO(b"".join(data for data, _, _ in pieces))
    with av.open(raw, format="h264") as source, av.open(str(path), "w", format=format) as container:
        stream: Any = container.add_stream_from_template(source.streams.video[0])
        stream.time_base = 1 / (2 * fps)
        for data, place, is_first in pieces:
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, 1 / (2 * fps), is_first
            packet.pts = packet.dts = int(2 * place)
            packet.duration = 1 if len(pieces) > len(kinds) else 2
            container.mux(packet)
