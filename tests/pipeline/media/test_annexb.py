"""Annex-B streams of cuts, NAL unit for NAL unit against FFmpeg's own filter, and their pictures against PyAV's."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray

from pipeline.media.annexb import START_CODE, to_annex_b
from pipeline.media.fragments import ENCODERS, MOVFLAGS, FragmentedVideo, encode_fragments, parse_fragments
from pipeline.media.yuv import decode_cut
from pipeline.nvdec.hardware import CODECS

WIDTH, HEIGHT = 96, 64
PARAMETER_SETS = (7, 8)  # nal_unit_type of sequence and picture parameter sets


def pictures(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Noise that drifts, so that no two pictures are equal and every one has residuals."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [np.roll(noise, (number, 2 * number), (0, 1)) // 2 + number for number in range(count)]


def encode(count: int = 40, **x264: object) -> FragmentedVideo:
    """Fragmented MP4 by x264 with any parameters (the store's own are in `encoder_options`)."""
    parameters = {"keyint": 12, "min-keyint": 12, "scenecut": 0, "open-gop": 0} | {
        name.replace("_", "-"): value for name, value in x264.items()
    }
    options = {"preset": "medium", "threads": "1", "x264-params": ":".join(f"{k}={v}" for k, v in parameters.items())}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": MOVFLAGS}) as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return parse_fragments(buffer.getvalue(), fps=Fraction(25), width=WIDTH, height=HEIGHT)


STREAMS = {
    "as a store has it": None,
    "B-frames": {"bframes": 3, "b_pyramid": "normal"},
    "slices": {"bframes": 0, "slices": 4},
    "delimiters, sets in the stream": {"bframes": 2, "aud": 1, "repeat_headers": 1},
}


@pytest.fixture(scope="module", params=STREAMS)
def video(request: pytest.FixtureRequest) -> FragmentedVideo:
    """One video of 40 frames in four GOPs."""
    own = STREAMS[request.param]
    if own is not None:
        return encode(**own)
    return encode_fragments(pictures(40), fps=Fraction(25), width=WIDTH, height=HEIGHT, codec="h264")


def cut(video: FragmentedVideo, first: int, last: int) -> bytes:
    """Init segment and fragments first..last - 1."""
    return video.init + b"".join(video.fragments[first:last])


def nal_units(data: bytes) -> list[bytes]:
    """NAL units of an Annex-B stream, without start codes (of three bytes or four)."""
    pieces = data.split(b"\x00\x00\x01")
    assert pieces[0].strip(b"\x00") == b""
    return [piece.rstrip(b"\x00") for piece in pieces[1:]]


def filtered(data: bytes) -> list[bytes]:
    """Packets of a cut as FFmpeg's h264_mp4toannexb gives them."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        context = BitStreamFilterContext("h264_mp4toannexb", stream)
        packets = [out for packet in container.demux(stream) for out in context.filter(packet)]
    return [bytes(packet) for packet in packets if packet.size]


def without_sets(units: Sequence[bytes]) -> list[bytes]:
    """Everything but parameter sets, which the filter repeats before each key frame."""
    return [unit for unit in units if unit[0] & 31 not in PARAMETER_SETS]


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (0, 4), (3, 4)])
def test_nal_unit_for_nal_unit_as_ffmpegs_filter(video: FragmentedVideo, first: int, last: int) -> None:
    """Same NAL units in the same order, byte for byte; parameter sets once, where the filter repeats them."""
    data = cut(video, first, last)
    ours, packets = to_annex_b(data), filtered(data)
    units, theirs = nal_units(ours.data.tobytes()), nal_units(b"".join(packets))
    assert ours.num_frames == len(packets) == {4: 40}.get(last, 12 * last) - 12 * first
    assert len(without_sets(units)) >= ours.num_frames
    assert without_sets(units) == without_sets(theirs)
    sets = [unit for unit in theirs if unit[0] & 31 in PARAMETER_SETS]
    assert units[:2] == sets[:2]
    assert [unit[0] & 31 for unit in units[:2]] == list(PARAMETER_SETS)


def test_every_codec_of_a_store_that_has_an_annex_b() -> None:
    """VP9 and MJPEG have no start codes; a new codec of the store must be decided on here."""
    assert set(ENCODERS) == {"vp9", "h264", "mjpeg"}
    assert CODECS == ("h264",)


def test_start_codes_take_the_place_of_lengths(video: FragmentedVideo) -> None:
    """The stream is the parameter sets and every sample, no byte more."""
    data, units = cut(video, 0, 4), nal_units(to_annex_b(cut(video, 0, 4)).data.tobytes())
    with av.open(io.BytesIO(data)) as container:
        sizes = [packet.size for packet in container.demux(video=0)]
    parameters = sum(len(START_CODE) + len(unit) for unit in units[:2])
    assert len(to_annex_b(data).data) == parameters + sum(sizes)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 3), (3, 4)])
def test_pictures_are_those_of_the_cut(video: FragmentedVideo, first: int, last: int) -> None:
    """A decoder that is given the whole stream at once, without a container, shows the same planes."""
    data = cut(video, first, last)
    stream = to_annex_b(np.frombuffer(data, np.uint8))
    y, uv = decode_cut(data, np.arange(stream.num_frames), WIDTH, HEIGHT)
    codec = av.CodecContext.create("h264", "r")
    frames = [frame for packet in codec.parse(stream.data.tobytes()) for frame in codec.decode(packet)]
    frames += [frame for packet in codec.parse(None) for frame in codec.decode(packet)]
    frames += codec.decode(None)
    assert len(frames) == stream.num_frames
    for number, frame in enumerate(frames):
        planes = frame.to_ndarray()  # (3 * H / 2, W): luma, then both chroma planes
        assert np.array_equal(planes[:HEIGHT], y[number, :, :, 0])
        chroma = planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        assert np.array_equal(chroma, uv[number].transpose(2, 0, 1))


def test_the_cut_is_not_changed() -> None:
    """Bytes of a mapped store are shared with everybody."""
    data = np.frombuffer(bytearray(cut(encode(12, bframes=0), 0, 1)), np.uint8)
    before = data.copy()
    to_annex_b(data)
    assert np.array_equal(data, before)


def _length_place(data: bytes) -> int:
    return data.index(b"mdat") + 4


@pytest.mark.parametrize("value", [0, 1 << 31, 0xFFFFFFFF, 3_000_000])
def test_a_wrong_length_is_an_error(value: int) -> None:
    """A NAL unit must end with its sample: nothing is decoded from a guess."""
    data = bytearray(cut(encode(24, bframes=0), 0, 2))
    struct.pack_into(">I", data, _length_place(data), value)
    with pytest.raises(ValueError, match=r"must be at least 1 and end with its sample"):
        to_annex_b(bytes(data))


def test_a_sample_that_ends_within_a_length_is_an_error() -> None:
    """Three bytes left over are no NAL unit."""
    data = bytearray(cut(encode(12, bframes=0), 0, 1))
    (size,) = struct.unpack_from(">I", data, place := _length_place(data))
    struct.pack_into(">I", data, place, size - 3)  # the first sample holds a message and a picture, or only a picture
    with pytest.raises(ValueError, match=r"NAL unit at byte \d+ of the stream"):
        to_annex_b(bytes(data))


def test_a_cut_that_ends_early_is_an_error() -> None:
    """Every shorter form of a cut says so; none is converted to less."""
    data = cut(encode(12, bframes=0), 0, 1)
    for length in range(0, len(data), 37):
        with pytest.raises(ValueError, match=r"must"):
            to_annex_b(data[:length])


def test_vp9_has_no_annex_b() -> None:
    """The message says what was looked for."""
    vp9 = encode_fragments(pictures(12), fps=Fraction(25), width=WIDTH, height=HEIGHT, codec="vp9")
    with pytest.raises(ValueError, match=r"avcC box with parameter sets; only H.264 has an Annex B"):
        to_annex_b(cut(vp9, 0, 1))


def test_lengths_of_two_bytes_are_refused() -> None:
    """A store never has them; a start code would not fit in their place."""
    data = bytearray(cut(encode(12, bframes=0), 0, 1))
    data[data.index(b"avcC") + 8] &= 0xFD  # lengthSizeMinusOne 3 -> 1
    with pytest.raises(ValueError, match=r"NAL lengths \(2 bytes\) must be of four bytes"):
        to_annex_b(bytes(data))


def test_damaged_cuts_raise_nothing_else() -> None:
    """Whatever the bytes are: a stream whose start codes stand where the lengths say, or a ValueError."""
    whole = cut(encode(24, bframes=2), 0, 2)
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 900, 3):
            data[place] = rng.integers(256)
        try:
            stream = to_annex_b(bytes(data))
        except ValueError:
            refused += 1
            continue
        assert stream.num_frames >= 1
        assert stream.data[:4].tobytes() == START_CODE
    assert 50 < refused < 400
