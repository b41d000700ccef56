"""The clip that an exported model's clip.py cuts of files as telephones, recorders and tuners write them."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.folder.standalone import clip_of
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support import odd_media as odd

INPUTS: dict[str, Any] = {
    "frames": {
        "shape": [1, 3, 4, 32, 32],
        "frames_per_second": 10,
        "clip_s": 0.4,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
    "log_mel": {"shape": [1, 1, 24, 16], "clip_s": 0.4, "mean": 0.0, "std": 1.0},
}


@pytest.mark.parametrize(("degrees", "across", "down"), [(0, 1, 0), (90, 0, -1), (180, -1, 0), (270, 0, 1)])
def test_pictures_stand_upright(degrees: int, across: int, down: int, tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", audio=None, seconds=0.4, rotation=degrees, size=(64, 64))
    picture = clip_of(tmp_path / "a.mp4", INPUTS)["frames"][0, 0, 0].numpy()  # the ramp rises to the right at 0
    slope = picture[:, -4:].mean() - picture[:, :4].mean(), picture[-4:].mean() - picture[:4].mean()
    assert [round(float(part) * 255 / 60) for part in slope] == [across, down]


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        small: Any = container.add_stream("mpeg4", rate=25)
        small.width, small.height, small.pix_fmt = 64, 48, "yuv420p"
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, grey, count in ((cover, 250, 1), (small, 30, 25)):
            for number in range(count):
                array = np.full((stream.height, stream.width, 3), grey, np.uint8)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert float(clip_of(tmp_path / "a.mp4", INPUTS)["frames"].mean()) == pytest.approx(30 / 255, abs=0.02)


@pytest.mark.parametrize(("name", "empty"), [("a.ts", "mp2"), ("a.mkv", "libopus"), ("a.flv", "aac")])
def test_a_track_without_packets_is_passed_over(name: str, empty: str, tmp_path: Path) -> None:
    path = tmp_path / name
    odd.with_tracks(path, empty=empty, format="mpegts" if name.endswith("ts") else None)
    assert clip_of(path, INPUTS)["log_mel"].std() > 0.5  # the click at 1.4 s, near the middle
    odd.with_tracks(path, empty=empty, audio=None, format="mpegts" if name.endswith("ts") else None)
    assert not clip_of(path, INPUTS)["log_mel"].any()


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_pictures_of_a_variable_rate_go_by_their_times(name: str, tmp_path: Path) -> None:
    """Ten dark pictures a second, then fifty white ones: the middle of the time is where they begin to be white."""
    times_s = [*(n / 10 for n in range(10)), *(1 + n / 50 for n in range(50))]
    with av.open(str(tmp_path / name), "w", format="mpegts" if name.endswith("ts") else None) as container:
        stream: Any = container.add_stream("libx264", rate=50, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time_s in times_s:
            array = np.full((48, 64, 3), 30 if time_s < 1 else 230, np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time_s), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    light = clip_of(tmp_path / name, {"frames": INPUTS["frames"]})["frames"].mean((0, 1, 3, 4)).tolist()
    assert [value > 0.5 for value in light] == [False, False, True, True]
