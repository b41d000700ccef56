"""Boxes of a cut: the samples that FFmpeg's demuxer gives, where sizes are said once, and what is refused."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.media.annexb import to_annex_b
from pipeline.media.cut_boxes import Fragment, fragments_of, init_bytes, stream_header
from pipeline.media.cut_decoder import packets
from pipeline.media.fragments import encode_fragments


def box(kind: bytes, *content: bytes) -> bytes:
    """An MP4 box."""
    data = b"".join(content)
    return struct.pack(">I4s", len(data) + 8, kind) + data


def words(*values: int) -> bytes:
    """Numbers of four bytes."""
    return struct.pack(f">{len(values)}I", *values)


def fragment(
    samples: list[bytes], trun_flags: int = 1, tfhd: bytes = words(0, 1), fields: tuple[int, ...] = ()
) -> bytes:
    """A moof + mdat pair whose `trun` has these flags and fields."""

    def moof(offset: int) -> bytes:
        run = box(b"trun", words(trun_flags, len(samples)), words(offset) if trun_flags & 1 else b"", words(*fields))
        return box(b"moof", box(b"mfhd", words(0, 1)), box(b"traf", box(b"tfhd", tfhd), run))

    return moof(len(moof(0)) + 8) + box(b"mdat", *samples)


SAMPLES = [b"one!", b"two!", b"four"]


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_samples_and_header_are_those_of_ffmpeg(codec: str) -> None:
    frames = [np.full((64, 96, 3), 8 * i, np.uint8) for i in range(30)]
    video = encode_fragments(frames, fps=Fraction(25), width=96, height=64, codec=codec)
    data = video.init + b"".join(video.fragments)
    assert init_bytes(data) == len(video.init)
    header = stream_header(video.init)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        theirs = [bytes(packet) for packet in container.demux(stream) if packet.size]
        configuration = (stream.codec_context.extradata or b"") if codec == "h264" else b""
        assert (header.codec, header.configuration) == (stream.codec_context.name.removeprefix("lib"), configuration)
    ours = [bytes(piece) for piece in packets(memoryview(data), len(video.init), header.default_size)]
    assert ours == theirs
    assert len(ours) == 30


def test_sizes_may_be_said_of_all_samples_at_once() -> None:
    once = fragment(SAMPLES, tfhd=words(0x10, 1, 4))
    nowhere = fragment(SAMPLES)
    each = fragment(SAMPLES, 0x301, fields=(7, 4, 7, 4, 7, 4))
    for data, default_size in ((once, 0), (once, 9), (nowhere, 4), (each, 9)):
        assert [bytes(piece) for piece in packets(memoryview(data), 0, default_size)] == SAMPLES
    begin = once.index(b"one!")
    assert list(fragments_of(once, 0)) == [Fragment(begin, begin + 12, [(begin, [4, 4, 4])])]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (fragment(SAMPLES), r"3 samples of 0 bytes must lie in their cut"),
        (fragment(SAMPLES, tfhd=words(0x10, 1, 1 << 30)), r"3 samples of 1073741824 bytes must lie in their cut"),
        (fragment(SAMPLES, tfhd=words(0x11, 1, 0, 0, 4)), r"must count its offsets from its moof box"),
        (fragment(SAMPLES, 0, tfhd=words(0x10, 1, 4)), r"trun box must give where its samples begin"),
        (fragment(SAMPLES, 0x201, fields=(4,)), r"trun box of 3 samples must hold their fields"),
        (fragment(SAMPLES, 0x201, fields=(4, 4, 5)), r"\(13 bytes\) must lie in their fragment, which ends at"),
        (fragment(SAMPLES, tfhd=words(0x10)), r"MP4 box must reach byte"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(packets(memoryview(data), 0))


def test_a_gap_between_samples_has_no_annex_b() -> None:
    """A start code can only be written over a length: what lies between samples must not get into the stream."""
    frames = [np.full((64, 96, 3), 9 * i, np.uint8) for i in range(4)]
    init = encode_fragments(frames, fps=Fraction(25), width=96, height=64, codec="h264").init
    whole = [words(2) + b"ab", words(1) + b"c"]
    assert to_annex_b(init + fragment(whole, 0x201, fields=(6, 5))).num_frames == 2
    with pytest.raises(ValueError, match=r"must fill it without a gap"):
        to_annex_b(init + fragment([*whole, b""], 0x201, fields=(6, 4, 0)))
