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
from av.video.reformatter import ColorRange

from pipeline.ingest.findings import Tally
from pipeline.ingest.item import TranscodeSettings
from pipeline.media.fragments import ENCODERS, MOVFLAGS, SIZE_MULTIPLE_PX, encoder_options
from pipeline.media.packets import PacketScan
from pipeline.media.picture import BT601_MATRICES, PictureConverter, Size, Turn
from pipeline.media.probe import MediaInfo, RefusedError
from pipeline.media.retime import Rate

MAX_COPIED_GOP = 16
# Names of a codec that a stream may be copied of; JPEG pictures of a source have any tables, ranges and subsampling.
_SAME_CODEC = {"h264": ("h264", "libx264"), "vp9": ("vp9", "libvpx-vp9"), "mjpeg": ()}


class VideoOutput:
    """A fragmented MP4 of constant rate, written frame by frame; memory does not grow with the length.

    Leaving it as a context closes the file as it is; `finish` makes it whole. Frames that are shown and packets of the
    source are both offered; each kind of output takes one of them.

    Args:
        path: file to write. fps: its rate; frame n begins at n / fps.
    """

    is_copied = False

    def __init__(self, path: Path, fps: Fraction) -> None:
        self._path, self._step = path, 1 / fps
        self._container: Any = None
        self.num_frames = 0

    def begin(self, size: Size, turn: Turn) -> None:
        """Take the size of the stored picture and the turn that brings a frame upright, before the first frame."""

    def show(self, frame: Any, times: int) -> None:
        """Take a decoded frame (PyAV) that is shown `times` times; raises RefusedError."""

    def take(self, packet: Any, tally: Tally) -> bool:
        """Take a packet after its frames; returns False where the stream turns out not to be fit for this output."""
        return True

    def is_fit(self, num_frames: int, tally: Tally) -> bool:
        """Whether the output holds what it should, at the end: `num_frames` frames."""
        return True

    def finish(self) -> None:
        """End the file."""
        self._close()

    def _open(self) -> Any:
        self._container = av.open(str(self._path), "w", format="mp4", options={"movflags": MOVFLAGS})
        return self._container

    def _close(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


class EncodedVideo(VideoOutput):
    """Frames turned upright, scaled and encoded.

    Args:
        settings: codec, frames a fragment, quality, and how long it may become.
    """

    def __init__(self, path: Path, fps: Fraction, settings: TranscodeSettings) -> None:
        super().__init__(path, fps)
        self._settings = settings
        self._max_frames = settings.limits.max_duration_s * fps
        self._stream: Any = None
        self._converter: PictureConverter | None = None

    def begin(self, size: Size, turn: Turn) -> None:
        """Open the file."""
        codec, settings = self._settings.codec, self._settings
        options = encoder_options(
            codec, settings.frames_per_fragment, settings.rate_factor, fastdecode=settings.fastdecode
        )
        self._converter = PictureConverter(size, turn)
        self._stream = self._open().add_stream(ENCODERS[codec], rate=1 / self._step, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = size.width, size.height, "yuv420p"
        self._stream.codec_context.time_base = self._step
        if codec == "mjpeg":
            self._stream.codec_context.color_range = ColorRange.MPEG

    def show(self, frame: Any, times: int) -> None:
        """Convert and encode a frame."""
        if self.num_frames + times > self._max_frames:
            raise RefusedError(f"video is longer than {self._settings.limits.max_duration_s:g} s")
        assert self._converter is not None
        picture = self._converter.convert(frame)
        picture.pict_type = PictureType.NONE  # else the source's key frames are forced upon the encoder
        for _ in range(times):
            picture.pts, picture.time_base = self.num_frames, self._step
            self._container.mux(self._stream.encode(picture))
            self.num_frames += 1

    def finish(self) -> None:
        """Empty the encoder and end the file."""
        self._container.mux(self._stream.encode(None))
        super().finish()


class CopiedVideo(VideoOutput):
    """Packets of a stream that is fit already, numbered anew from 0, as long as decoding finds no fault with them.

    Args:
        codec: "h264" or "vp9". video: PyAV stream that the packets come from.
    """

    is_copied = True

    def __init__(self, path: Path, fps: Fraction, codec: str, video: Any) -> None:
        super().__init__(path, fps)
        self._stream = self._open().add_stream_from_template(video)
        self._stream.time_base = self._step
        self._is_closed_gop = closed_gop_check(codec, video.codec_context.extradata)

    def take(self, packet: Any, tally: Tally) -> bool:
        """Write a packet, which must not be used afterwards."""
        if tally.video_errors or tally.corrupt or tally.turn:
            return False
        if not packet.size:
            return True
        if packet.is_keyframe and not self._is_closed_gop(bytes(packet)):
            return False
        packet.stream = self._stream
        packet.time_base = self._step
        packet.pts = packet.dts = self.num_frames
        packet.duration = 1
        self._container.mux_one(packet)
        self.num_frames += 1
        return True

    def is_fit(self, num_frames: int, tally: Tally) -> bool:
        """Whether every packet became one frame, in its own place."""
        return tally.decoded == self.num_frames == num_frames and not tally.not_rising


def why_not_copied(info: MediaInfo, scan: PacketScan, rate: Rate, *, codec: str, short_side_px: int) -> str:
    """Say what keeps a stream from being copied as it is; empty if nothing does.

    Fit is: the store's codec, 4:2:0 with 8 bit, sides multiples of 16 and small enough, constant rate, no B-frames
    (their time stamps would need an edit list), no fields, no gap and a key frame at least every 16 frames.
    """
    video, frames = info.video, len(scan.video_times)
    lengths = [b - a for a, b in itertools.pairwise((*scan.keys, frames))]
    side = short_side_px
    rules: list[tuple[bool, str]] = [
        (video.codec in _SAME_CODEC[codec], "codec"),
        (info.container.startswith(("mov", "matroska")), "container"),
        (video.pixel_format == "yuv420p", "pixel format"),
        (video.colour_matrix in BT601_MATRICES, "colour matrix"),
        (video.width % SIZE_MULTIPLE_PX == 0 and video.height % SIZE_MULTIPLE_PX == 0, "size"),
        (bool(min(video.width * video.pixel_aspect, Fraction(video.height)) <= side), "short side"),
        (rate.is_constant and scan.cut_before == 0 and not scan.error, "time stamps"),
        (scan.in_order, "B-frames"),
        (not scan.has_fields, "fields"),
        (bool(lengths) and scan.keys[0] == 0 and max(lengths) <= MAX_COPIED_GOP, "key frames"),
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
