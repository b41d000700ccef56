"""H.264 with a packet for each field: what counts are frames, in every container, also where pictures alternate."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.ingest.report import class_of
from pipeline.media.h264_fields import FieldFinder
from pipeline.media.packets import look
from tests.pipeline.support import interlaced
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support.both_ways import check_both

FIELDS, MIXED, FRAMES = "f" * 24, "fFFFfF" * 4, "F" * 24
WHITE = (7, 20)


@pytest.mark.parametrize(
    ("name", "kinds", "fps"),
    [
        ("a.ts", FIELDS, Fraction(25)),
        ("b.ts", MIXED, Fraction(25)),
        ("a.mp4", FIELDS, Fraction(30000, 1001)),
        ("b.mp4", MIXED, Fraction(25)),
        ("a.mov", FIELDS, Fraction(25)),
        ("a.mkv", FIELDS, Fraction(24)),
        ("b.mkv", MIXED, Fraction(30)),
        ("a.flv", FIELDS, Fraction(25)),
        ("a.avi", FIELDS, Fraction(25)),
        ("c.mp4", FRAMES, Fraction(25)),
    ],
    ids=lambda value: value if "." in str(value) else "",
)
def test_frames_are_what_the_decoder_gives(name: str, kinds: str, fps: Fraction, tmp_path: Path) -> None:
    path = tmp_path / name
    interlaced.write(path, kinds, fps=fps, white=WHITE, format="mpegts" if name.endswith("ts") else None)
    flashes = tuple(float(number / fps) for number in WHITE)
    item = check_both(path, frames=24, fps=fps, flashes=flashes, clicks=())
    assert (class_of(item), item.repairs) == ("short", ())
    assert look(path)[1].has_fields == (kinds != FRAMES)
    assert item.copied == (kinds == FRAMES)


@pytest.mark.parametrize("lost", [21, 40, 57])
def test_a_field_that_is_lost_costs_at_most_its_frame(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    interlaced.write(path, FIELDS, format="mpegts")
    data = path.read_bytes()
    path.write_bytes(data[: 188 * lost] + data[188 * (lost + 1) :])
    _, scan = look(path)
    assert len(scan.video_times) in (23, 24)


def test_headers_tell_fields_from_frames_without_decoding() -> None:
    finder = FieldFinder(b"")
    assert finder.may_have_fields
    told = [finder.is_field(data) for data, _, _ in interlaced.packets_of("FfF", ())]
    assert told == [False, True, True, False]
    assert finder.may_have_fields


@pytest.mark.parametrize(
    ("params", "may"),
    [("interlaced=1:cqm=jvt", True), ("cqm=jvt", False), ("bframes=3:weightp=2", False)],
)
def test_streams_of_an_encoder_have_no_field(params: str, may: bool, tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", audio=None, seconds=0.4, video_options={"x264-params": params})
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        finder = FieldFinder(stream.codec_context.extradata or b"")
        assert finder.may_have_fields == may
        assert not any(finder.is_field(bytes(packet)) for packet in container.demux(stream))


@pytest.mark.parametrize("size", [0, 5, 8, 20, 31])
def test_headers_that_are_cut_off_tell_nothing(size: int) -> None:
    data = interlaced.packets_of("f", ())[0][0]
    finder = FieldFinder(data[:size])
    assert not finder.is_field(data[40:60])
    assert not FieldFinder(b"\x01" + data[:size]).is_field(data[:size])


def test_headers_of_random_bytes_end_without_an_error() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    whole = interlaced.packets_of("f", ())[0][0][:200]
    told = []
    for _ in range(300):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 6):
            data[place] = int(generator.integers(256))
        told.append(FieldFinder(bytes(data)).is_field(bytes(data)))
    assert 0 < sum(told) < 300
