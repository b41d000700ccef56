"""Fragmented MP4 with one fragment per closed GOP: encode it, take it apart.

A clip of such a file is the init segment plus the fragments that cover it, cut by byte range: no index has to be
read and no decoder has to seek, so the cost of a clip does not depend on where it starts.
"""

import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import PictureType
from av.video.reformatter import ColorRange

MOVFLAGS = "frag_keyframe+empty_moov+default_base_moof"
ENCODERS = {"vp9": "libvpx-vp9", "h264": "libx264", "mjpeg": "mjpeg"}
SIZE_MULTIPLE_PX = 16  # NVDEC's decoder cache compares coded with display size: only multiples of 16 ever hit


@dataclass(frozen=True)
class FragmentedVideo:
    """A video stream as an init segment and independently decodable fragments.

    `first_frames[i]` is the number of the frame, in display order from 0, that `fragments[i]` starts with; it comes
    from the sample counts of the `trun` boxes, because encoders insert key frames that nobody asked for.
    """

    init: bytes
    fragments: tuple[bytes, ...]
    first_frames: tuple[int, ...]
    num_frames: int
    fps_num: int
    fps_den: int
    width: int
    height: int

    def __post_init__(self) -> None:
        assert len(self.fragments) == len(self.first_frames)
        assert self.num_frames > (self.first_frames[-1] if self.first_frames else -1)

    @property
    def fps(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.fps_num, self.fps_den)


def encoder_options(
    codec: str, gop: int, quality: int, *, fastdecode: bool = True, b_frames: int = 0
) -> dict[str, str]:
    """Return encoder settings that give closed GOPs of `gop` frames and the same bytes on every run.

    One thread per stream: x264's and libvpx's output depends on the thread count; many streams run side by side.
    No macroblock tree: where a width is no multiple of 128 px, x264's AVX-512 form of it reads past the last row of
    macroblocks, so what was in memory before decides on the quantisers; its reciprocals also differ from CPU to CPU.
    No B-frames and x264's `fastdecode`: decoding is what training pays for.

    Args:
        codec: "h264", "vp9" or "mjpeg". gop: frames from key frame to key frame; MJPEG has key frames only.
        quality: rate factor (x264, VP9) or quantiser scale (MJPEG); lower is better.
        fastdecode: x264 without CABAC and deblocking. b_frames: of x264; a store has none.
    """
    if codec == "vp9":
        realtime = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0"}
        return realtime | {
            "g": str(gop),
            "keyint_min": str(gop),
            "crf": str(quality),
            "b": "0",
            "threads": "1",
            "row-mt": "0",
        }
    if codec == "h264":
        tune = {"tune": "fastdecode"} if fastdecode else {}
        gops = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:open-gop=0"
        return {"preset": "veryfast", **tune, "crf": str(quality), "threads": "1", "x264-params": f"{gops}:mbtree=0"}
    if codec == "mjpeg":
        # limited range, which the pictures say in a comment (CS=ITU601): no conversion when they are read
        return {"qmin": str(quality), "qmax": str(quality), "threads": "1", "strict": "unofficial"}
    raise ValueError(f"video codec ({codec!r}) must be one of {sorted(ENCODERS)}")


def encode_fragments(
    frames: Iterable[npt.NDArray[np.uint8] | av.VideoFrame],
    *,
    fps: Fraction,
    width: int,
    height: int,
    codec: str = "vp9",
    gop: int = 12,
    quality: int = 24,
) -> FragmentedVideo:
    """Encode frames of one size at a constant rate into fragmented MP4, one fragment per GOP.

    Args:
        frames: RGB arrays (height, width, 3) uint8, or PyAV frames of that size; times are the frame numbers.
        fps: Frames per second.
        width: Pixels, a multiple of 16.
        height: Pixels, a multiple of 16.
        codec: "h264" (CPUs and NVDEC), "vp9" (DALI decodes it on a CPU as well) or "mjpeg" (`gop` has no effect).
        gop: Frames from key frame to key frame.
        quality: The encoder's constant rate factor; lower is better and larger.

    Raises:
        ValueError: a size that is not a multiple of 16, an unknown codec, or no frame at all.
    """
    if width % SIZE_MULTIPLE_PX or height % SIZE_MULTIPLE_PX:
        raise ValueError(f"stored size ({width}x{height}) must be a multiple of {SIZE_MULTIPLE_PX} in both directions")
    buffer = io.BytesIO()
    options = encoder_options(codec, gop, quality)
    with av.open(buffer, "w", format="mp4", options={"movflags": MOVFLAGS}) as container:
        stream = container.add_stream(ENCODERS[codec], rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "mjpeg":
            stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.time_base = 1 / fps
        for number, frame in enumerate(frames):
            picture = frame if isinstance(frame, av.VideoFrame) else av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, 1 / fps
            picture.pict_type = PictureType.NONE  # else the source's key frames are forced on the encoder
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return parse_fragments(buffer.getvalue(), fps=fps, width=width, height=height)


def parse_fragments(data: bytes, *, fps: Fraction, width: int, height: int) -> FragmentedVideo:
    """Take a fragmented MP4 with one video track apart; a trailing `mfra` index is dropped.

    Args:
        data: The whole file.
        fps: Its frame rate, kept in the result.
        width: Pixels, kept in the result.
        height: Pixels, kept in the result.

    Raises:
        ValueError: the bytes are not fragmented MP4, or hold no frame.
    """
    init, fragments, first_frames, frames = bytearray(), [], [], 0
    pending: bytes | None = None
    for kind, begin, end in mp4_boxes(data, 0, len(data)):
        if kind == b"moof":
            pending = data[begin:end]
        elif kind == b"mdat" and pending is not None:
            fragments.append(pending + data[begin:end])
            first_frames.append(frames)
            frames += _samples_in(pending)
            pending = None
        elif not fragments and kind != b"mfra":
            init += data[begin:end]
    if not fragments or not frames:
        raise ValueError(f"fragmented MP4 ({len(data)} bytes) must hold at least one moof + mdat pair with frames")
    return FragmentedVideo(
        bytes(init), tuple(fragments), tuple(first_frames), frames, fps.numerator, fps.denominator, width, height
    )


def mp4_boxes(data: bytes | memoryview, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, first byte and end of each MP4 box in a range; raises ValueError for one that reaches past it."""
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        if size == 1:
            size = struct.unpack_from(">Q", data, begin + 8)[0]
        if size < 8 or begin + size > end:
            raise ValueError(
                f"MP4 box {kind!r} at byte {begin} ({size} bytes) must end inside its parent ({end} bytes)"
            )
        yield kind, begin, begin + size
        begin += size


def _samples_in(moof: bytes) -> int:
    """Count the samples of all `trun` boxes of a `moof` box."""
    count = 0
    for kind, begin, end in mp4_boxes(moof, 8, len(moof)):
        if kind == b"traf":
            for inner, inner_begin, _ in mp4_boxes(moof, begin + 8, end):
                if inner == b"trun":
                    count += int(struct.unpack_from(">I", moof, inner_begin + 12)[0])
    return count
