"""Colour planes: every source matrix and range arrives as BT.601, limited range."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from pipeline.media.yuv import PlaneWriter, even_size

KR_KB = {Colorspace.ITU601: (0.299, 0.114), Colorspace.ITU709: (0.2126, 0.0722)}


def expected_planes(y: int, u: int, v: int, space: Colorspace, *, full: bool) -> list[float]:
    """The colour that (y, u, v) stands for, written as BT.601 limited range (ITU-R BT.601-7 and BT.709-6, clause 3)."""
    kr, kb = KR_KB[space]
    low, luma_span, chroma_span = (0, 255, 255) if full else (16, 219, 224)
    luma, cb, cr = (y - low) / luma_span, (u - 128) / chroma_span, (v - 128) / chroma_span
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    kr, kb = KR_KB[Colorspace.ITU601]
    luma = kr * red + kb * blue + (1 - kr - kb) * green
    return [16 + 219 * luma, 128 + 112 * (blue - luma) / (1 - kb), 128 + 112 * (red - luma) / (1 - kr)]


def frame_of(planes: list[np.ndarray], form: str) -> av.VideoFrame:
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, form)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", list(KR_KB))
@pytest.mark.parametrize("colour", [(100, 90, 180), (60, 200, 100), (180, 128, 128)])
def test_matrix_and_range_follow_the_formula(colour: tuple[int, int, int], space: Colorspace, full: bool) -> None:
    y, u, v = colour
    frame = frame_of([np.full((32, 48), y), np.full((16, 24), u), np.full((16, 24), v)], "yuv420p")
    frame.colorspace = space
    frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    out = PlaneWriter(2, 48, 32)
    out.write(0, frame)
    out.copy(0, 1)
    found = [out.y[1].mean(), out.uv[1, ..., 0].mean(), out.uv[1, ..., 1].mean()]
    assert found == pytest.approx(expected_planes(y, u, v, space, full=full), abs=1.3)


def test_stored_planes_pass_untouched_whatever_their_tag() -> None:
    rng = np.random.default_rng(0)
    planes = [rng.integers(16, 236, shape).astype(np.uint8) for shape in ((32, 48), (16, 24), (16, 24))]
    frame = frame_of(planes, "yuv420p")
    frame.colorspace = Colorspace.ITU709
    out = PlaneWriter(1, 48, 32, convert_matrix=False)
    out.write(0, frame)
    assert np.array_equal(out.y[0, :, :, 0], planes[0])
    assert np.array_equal(out.uv[0], np.stack(planes[1:], -1))


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_turns_come_before_the_mirror(quarters: int, mirror: bool) -> None:
    rng = np.random.default_rng(1)
    planes = [rng.integers(16, 236, shape).astype(np.uint8) for shape in ((32, 48), (16, 24), (16, 24))]
    width, height = (48, 32) if quarters % 2 == 0 else (32, 48)
    out = PlaneWriter(1, width, height, quarter_turns=quarters, mirror=mirror)
    out.write(0, frame_of(planes, "yuv420p"))
    upright = [np.rot90(plane, quarters) for plane in planes]
    upright = [plane[:, ::-1] if mirror else plane for plane in upright]
    assert np.array_equal(out.y[0, :, :, 0], upright[0])
    assert np.array_equal(out.uv[0, ..., 1], upright[2])


def test_even_sizes() -> None:
    assert [even_size(97, 65), even_size(96, 64), even_size(1, 3)] == [(96, 64), (96, 64), (2, 2)]
    with pytest.raises(ValueError, match=r"size \(97x64\) must be even"):
        PlaneWriter(1, 97, 64)
