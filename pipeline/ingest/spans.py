"""The part of a source that annotations need: only that is decoded and stored (15 minutes of a film, say)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.media.packets import PacketScan
from pipeline.media.probe import MediaInfo

if TYPE_CHECKING:  # the child processes need no readers of annotations
    from pipeline.annotations.rows import Row

Span = tuple[float, float]  # seconds as annotations count them
MIN_LEFT_OUT = 0.1  # share of the frames: less is not worth it
AUDIO_LEAD_S, REORDER_S = 1, 2  # decoders warm up before the part; packets may be out of step by that much


def annotated_spans(rows: Iterable[Row], margin_s: float) -> dict[str, Span | None]:
    """Return for each video the span of all its rows, widened by `margin_s`; None where a row needs the whole video."""
    spans: dict[str, Span | None] = {}
    for row in rows:
        known = spans.get(row.video, (math.inf, 0.0))
        if known is None or row.end_s is None:
            spans[row.video] = None
            continue
        key_time = row.start_s if row.key_time_s is None else row.key_time_s
        begin, end = min(row.start_s, key_time) - margin_s, max(row.end_s, key_time) + margin_s
        spans[row.video] = (min(known[0], max(begin, 0.0)), max(known[1], end))
    return spans


@dataclass(frozen=True)
class Part:
    """The frames with time stamps `low` <= ticks < `high` of a source.

    Args:
        low: stamp of the first one, which may be on screen since before the span.
        first_key: ticks of the key frame where decoding begins; None = with the first packet.
        time_base: seconds per tick.
    """

    low: int
    high: int
    first_key: int | None
    time_base: Fraction

    def needs(self, packet: Any, lead_s: int) -> bool:
        """Whether a packet may hold something of the part; packets without time stamps may."""
        ticks = packet.dts if packet.pts is None else packet.pts
        if ticks is None:
            return True
        return self.low * self.time_base - lead_s <= ticks * Fraction(packet.time_base) and not self.is_over(packet)

    def is_over(self, packet: Any) -> bool:
        """Whether this packet and all later ones of its stream lie behind the part."""
        if packet.dts is None:
            return False
        return bool(packet.dts * Fraction(packet.time_base) > self.high * self.time_base + REORDER_S)

    def of(self, scan: PacketScan) -> PacketScan:
        """The scan with the video packets of the part alone."""
        times = scan.video_times
        return replace(scan, video_times=times[(times >= self.low) & (times < self.high)])


def part_of(info: MediaInfo, scan: PacketScan, span: Span | None) -> Part | None:
    """Return the part of a source that a span needs; None = all of it.

    All it is where less than a tenth would be left out, where the span holds no frame, and in containers whose time
    stamps or key frames cannot be relied upon (all but MP4, MOV, Matroska and WebM).
    """
    if span is None or not info.container.startswith(("mov", "matroska")):
        return None
    begin, end = (math.floor((Fraction(time_s) + info.start_s) / scan.video_time_base) for time_s in span)
    times = scan.video_times
    first, stop = max(int(np.searchsorted(times, begin, "right")) - 1, 0), int(np.searchsorted(times, end))
    if begin > times[-1] or not 0 < stop - first <= (1 - MIN_LEFT_OUT) * len(times):
        return None
    low = int(times[first])
    first_key = max((ticks for ticks in scan.key_ticks if ticks <= low), default=None)  # an edit list may hide it
    return Part(low, end, first_key, scan.video_time_base)
