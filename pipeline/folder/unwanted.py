"""Pictures that nobody asked for: which ones they are, told before they are decoded.

A clip of every second frame, and what lies between its key frame and its first frame, are pictures that are not shown.
Those that no other picture is made from (most B-frames) need not be decoded; the others come out bit for bit the same.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import Any

_CODECS = frozenset({"h264"})  # whose streams say of each picture whether others are made from it (nal_ref_idc)
_MOST_WAITING = 64  # packets held back until their picture is known to be wanted or not


class LeftOutError(ValueError):
    """A picture that was wanted after all was left out."""


class LeftOut:
    """Tells a decoder which packets hold unwanted pictures, and whether that was right in the end.

    Args:
        targets: rising, ticks; each wants the last picture that is not later.
    """

    def __init__(self, targets: Sequence[int]) -> None:
        self._targets = list(targets)
        self._times: list[int] = []  # of all packets so far, sorted
        self._until: int | None = None  # ticks: every picture that is shown before that has come
        self._left_out: list[int] = []  # times of the packets that the decoder was told to leave out, sorted

    def told(self, packets: Iterable[Any], decoder: Any) -> Iterator[Any]:
        """Yield packets in their order, each when the decoder has been told whether its picture is wanted."""
        if decoder.name not in _CODECS:
            yield from packets
            return
        waiting: deque[Any] = deque()
        for packet in packets:
            waiting.append(packet)
            if packet.pts is not None:
                insort(self._times, packet.pts)
            self._until = packet.dts
            while waiting:
                wanted = self._is_wanted(waiting[0].pts)
                if wanted is None and len(waiting) < _MOST_WAITING and packet.size:
                    break
                yield self._tell(waiting.popleft(), decoder, wanted is not False)
        while waiting:
            yield self._tell(waiting.popleft(), decoder, wanted=True)

    def is_last(self, time: int | Fraction, target: int | Fraction) -> bool:
        """Whether a picture is known to be the last one that is not later than a target (which it is not itself)."""
        return time <= target and self._is_last(time, floor(target)) is True

    def check(self, shown: int | Fraction, target: int | Fraction) -> None:
        """Raise LeftOutError where a picture later than the one shown, but not later than the target, was left out."""
        place = bisect_right(self._left_out, target)
        if place and self._left_out[place - 1] > shown:
            raise LeftOutError(f"picture at {self._left_out[place - 1]} ticks was left out, {target} wants it")

    def _is_wanted(self, time: int | None) -> bool | None:
        """Whether a target wants the picture of a time; None where that is not known yet."""
        if time is None:
            return True
        place = bisect_left(self._targets, time)
        return place < len(self._targets) and self._is_last(time, self._targets[place])

    def _is_last(self, time: int | Fraction, target: int) -> bool | None:
        after = bisect_right(self._times, time)
        if after < len(self._times) and self._times[after] <= target:
            return False
        return True if self._until is not None and self._until > target else None

    def _tell(self, packet: Any, decoder: Any, wanted: bool) -> Any:
        decoder.skip_frame = "DEFAULT" if wanted else "NONREF"
        if not wanted:
            insort(self._left_out, packet.pts)
        return packet
