"""Pictures or packets -> fragmented MP4 on disk: encode frame by frame, or copy a stream that is fit already."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
from av.video.frame import PictureType

from pipeline.media.fragments import ENCODERS, MOVFLAGS, SIZE_MULTIPLE_PX, encoder_options
from pipeline.media.picture import BT601_MATRICES, Size
from pipeline.media.probe import MediaInfo, PacketScan
from pipeline.media.retime import Rate

MAX_COPIED_GOP = 16


class _Sink:
    """A fragmented MP4 that is written frame by frame; when an exception leaves it, the file is closed as it is.

    Args:
        path: file to write. fps: its constant rate; frame n begins at n / fps.
    """

    def __init__(self, path: Path, fps: Fraction) -> None:
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": MOVFLAGS})
        self._step = 1 / fps
        self.num_frames = 0

    def finish(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._container.close()


class EncodeSink(_Sink):
    """Encodes pictures to a file as they come; memory does not grow with the length.

    Args:
        path: file to write. size: of the pictures. codec, gop, quality: as in `encode_fragments`.
    """

    def __init__(self, path: Path, *, size: Size, fps: Fraction, codec: str, gop: int, quality: int) -> None:
        super().__init__(path, fps)
        options = encoder_options(codec, gop, quality)
        self._stream: Any = self._container.add_stream(ENCODERS[codec], rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = size.width, size.height, "yuv420p"
        self._stream.codec_context.time_base = self._step

    def push(self, picture: Any, times: int = 1) -> None:
        """Encode a picture `times` times."""
        picture.pict_type = PictureType.NONE  # else the source's key frames are forced upon the encoder
        for _ in range(times):
            picture.pts, picture.time_base = self.num_frames, self._step
            self._container.mux(self._stream.encode(picture))
            self.num_frames += 1

    def finish(self) -> None:
        """Flush the encoder and close the file."""
        self._container.mux(self._stream.encode(None))
        super().finish()


class CopySink(_Sink):
    """Copies packets of a fit stream into fragments, numbered anew from 0.

    Args:
        path: file to write. source: PyAV video stream that the packets come from. fps: its constant rate.
    """

    def __init__(self, path: Path, *, source: Any, fps: Fraction) -> None:
        super().__init__(path, fps)
        self._stream: Any = self._container.add_stream_from_template(source)
        self._stream.time_base = self._step

    def push(self, packet: Any) -> None:
        """Write one packet; it must not be used afterwards."""
        packet.stream = self._stream
        packet.time_base = self._step
        packet.pts = packet.dts = self.num_frames
        packet.duration = 1
        self._container.mux_one(packet)
        self.num_frames += 1


def why_not_copied(
    info: MediaInfo, scan: PacketScan, rate: Rate, *, codec: str, short_side_px: int, max_gop: int = MAX_COPIED_GOP
) -> str:
    """Say what keeps a stream from being copied as it is; empty if nothing does.

    Fit is: the store's codec, 4:2:0 with 8 bit, sides multiples of 16 and small enough, constant rate, no B-frames
    (their time stamps would need an edit list), no gap and a key frame at least every 16 frames.
    """
    video, frames = info.video, len(scan.video_times)
    lengths = [b - a for a, b in itertools.pairwise((*scan.keys, frames))]
    side = short_side_px
    rules: list[tuple[bool, str]] = [
        (video.codec in ("h264", "libx264") if codec == "h264" else video.codec in ("vp9", "libvpx-vp9"), "codec"),
        (info.container.startswith(("mov", "matroska")), "container"),
        (video.pixel_format == "yuv420p", "pixel format"),
        (video.colour_matrix in BT601_MATRICES, "colour matrix"),
        (video.width % SIZE_MULTIPLE_PX == 0 and video.height % SIZE_MULTIPLE_PX == 0, "size"),
        (bool(min(video.width * video.pixel_aspect, Fraction(video.height)) <= side), "short side"),
        (rate.is_constant and scan.cut_before == 0 and not scan.error, "time stamps"),
        (scan.in_order, "B-frames"),
        (bool(lengths) and scan.keys[0] == 0 and max(lengths) <= max_gop, "key frames"),
    ]
    return ", ".join(name for holds, name in rules if not holds)


def closed_gop_check(codec: str, extradata: bytes | None) -> Callable[[bytes], bool]:
    """Return a function that tells whether a key packet starts a closed GOP.

    VP9 key frames always do; H.264 ones if their first slice is an IDR slice (NAL type 5; avcC length prefixes).
    """
    if codec != "h264":
        return lambda _packet: True
    if not extradata or extradata[0] != 1 or len(extradata) < 7:
        return lambda _packet: False
    prefix = (extradata[4] & 3) + 1

    def is_idr(packet: bytes) -> bool:
        """Whether the first slice of a packet in AVC form is of an IDR picture."""
        position = 0
        while position + prefix < len(packet):
            size = int.from_bytes(packet[position : position + prefix], "big")
            kind = packet[position + prefix] & 31
            if 1 <= kind <= 5:
                return kind == 5
            position += prefix + size
        return False

    return is_idr
