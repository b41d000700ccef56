"""Which packets of an H.264 stream hold one field of a picture instead of a frame (ISO 14496-10, 7.3).

Camcorders and broadcasts code a picture as a frame or as two fields, and each field may be a packet of its own. The
headers alone tell them apart: nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

_SLICES, _SPS = (1, 5), 7  # types of NAL units
_HEAD_BYTES = 64  # of a NAL unit, more than its header takes up to field_pic_flag
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles that tell the chroma format
_AVCC_LENGTH_BYTE, _AVCC_SETS_BYTE = 4, 5


class FieldFinder:
    """Tells field packets of one stream; parameter sets are taken from the header, and from packets as they come.

    Args:
        extradata: of the stream: `avcC`, or NAL units behind start codes; empty where the packets have all.
    """

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = 0  # of the length before each NAL unit; 0: start codes
        self._frame_num_bits = 0  # 0: no parameter set with fields was seen
        self._has_planes = False
        self._knows = False
        if extradata[:1] == b"\x01" and len(extradata) > _AVCC_SETS_BYTE:
            self._length_bytes = (extradata[_AVCC_LENGTH_BYTE] & 3) + 1
            size = int.from_bytes(extradata[_AVCC_SETS_BYTE + 1 : _AVCC_SETS_BYTE + 3], "big")
            self._take_parameters(extradata[_AVCC_SETS_BYTE + 3 : _AVCC_SETS_BYTE + 3 + size])
        else:
            self._look(extradata)

    @property
    def may_have_fields(self) -> bool:
        """Whether the stream may code a picture as fields, as far as is known."""
        return not self._knows or self._frame_num_bits > 0

    def is_field(self, packet: bytes) -> bool:
        """Whether the first slice of a packet is of a field; False for a packet without a slice that can be read."""
        return self._look(packet)

    def _look(self, data: bytes) -> bool:
        """Take parameter sets up to the first slice, and say whether that is of a field."""
        for begin in self._units(data):
            kind = data[begin] & 31
            if kind == _SPS:
                self._take_parameters(data[begin : begin + 1024])
            elif kind in _SLICES:
                return self._frame_num_bits > 0 and self._is_field_slice(data[begin : begin + _HEAD_BYTES])
        return False

    def _units(self, data: bytes) -> Iterator[int]:
        """First byte of each NAL unit."""
        if self._length_bytes:
            place = self._length_bytes
            while place < len(data):
                yield place
                place += int.from_bytes(data[place - self._length_bytes : place], "big") + self._length_bytes
            return
        place = data.find(b"\x00\x00\x01")
        while 0 <= place < len(data) - 3:
            yield place + 3
            place = data.find(b"\x00\x00\x01", place + 3)

    def _take_parameters(self, unit: bytes) -> None:
        try:
            frame_num_bits, self._has_planes, only_frames = _read_sps(_Bits(unit[1:]))
        except IndexError:
            return
        self._knows, self._frame_num_bits = True, 0 if only_frames else frame_num_bits

    def _is_field_slice(self, unit: bytes) -> bool:
        bits = _Bits(unit[1:])
        try:
            bits.skip_numbers(3)  # first_mb_in_slice, slice_type, pic_parameter_set_id
            bits.take(2 * self._has_planes + self._frame_num_bits)
            return bits.take(1) == 1
        except IndexError:
            return False


class _Bits:
    """Bits of a NAL unit, without the bytes that keep start codes out of it; reading behind the end: IndexError."""

    def __init__(self, unit: bytes) -> None:
        data = unit.replace(b"\x00\x00\x03", b"\x00\x00")
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        """The next bits as a number."""
        if count > self._left:
            raise IndexError(count)
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def number(self) -> int:
        """The next Exp-Golomb number, unsigned."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def skip_numbers(self, count: int) -> None:
        """Pass over Exp-Golomb numbers."""
        for _ in range(count):
            self.number()


def _read_sps(bits: _Bits) -> tuple[int, bool, bool]:
    """Bits of frame_num, separate_colour_plane_flag and frame_mbs_only_flag of a sequence parameter set."""
    profile, has_planes = bits.take(8), False
    bits.take(16)
    bits.number()
    if profile in _WITH_CHROMA:
        chroma = bits.number()
        has_planes = chroma == 3 and bits.take(1) == 1
        bits.skip_numbers(2)
        bits.take(1)
        if bits.take(1):
            for index in range(8 if chroma != 3 else 12):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_num_bits = bits.number() + 4
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits.take(1)
        bits.skip_numbers(2)
        bits.skip_numbers(bits.number())
    bits.number()
    bits.take(1)
    bits.skip_numbers(2)
    return frame_num_bits, has_planes, bits.take(1) == 1


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.number()
            following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
        last = following or last
