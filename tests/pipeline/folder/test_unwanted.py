"""Pictures that nobody asked for: which packets are left out, and that the others come out the same."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.folder import opened, read
from pipeline.folder.dataset import FolderSplit, PlainFolder
from pipeline.folder.unwanted import LeftOut, LeftOutError
from pipeline.media import yuv
from tests.pipeline.support.plain_videos import write_video

B_FRAMES = {"g": "250", "bf": "3", "b-pyramid": "none", "x264-params": "b-adapt=0:scenecut=0"}  # of four, three are B


@dataclass
class Packet:
    """What is looked at of a packet."""

    pts: int | None
    dts: int | None
    size: int = 1


@dataclass
class Decoder:
    """What is told to a decoder."""

    name: str = "h264"
    skip_frame: str = "DEFAULT"


def told(left_out: LeftOut, packets: list[Packet], name: str = "h264") -> Iterator[tuple[int | None, bool]]:
    """Time of each packet, and whether the decoder was told to decode it."""
    decoder = Decoder(name)
    for packet in left_out.told(packets, decoder):
        yield packet.pts, decoder.skip_frame == "DEFAULT"


# I P B B P B B as displayed 0 3 1 2 6 4 5, each decoded two pictures before it is shown at the earliest
ORDER = [Packet(pts, number - 2) for number, pts in enumerate([0, 3, 1, 2, 6, 4, 5, 9, 7, 8])] + [Packet(None, None, 0)]


def test_every_second_picture_is_wanted_and_packets_keep_their_order() -> None:
    found = list(told(LeftOut([0, 2, 4]), ORDER))
    assert found == [
        (0, True), (3, False), (1, False), (2, True), (6, False), (4, True), (5, False), (9, False), (7, False),
        (8, False), (None, True),
    ]  # fmt: skip


def test_a_target_between_two_pictures_wants_the_one_before_it() -> None:
    wanted = [time for time, is_told in told(LeftOut([1, 5]), [Packet(0, -1), Packet(4, 1), Packet(8, 6)]) if is_told]
    assert wanted == [0, 4]


def test_other_codecs_and_times_that_nobody_knows_are_decoded() -> None:
    assert all(is_told for _, is_told in told(LeftOut([0]), ORDER, "hevc"))
    assert all(is_told for _, is_told in told(LeftOut([0, 9]), [Packet(None, None), Packet(0, None), Packet(9, None)]))


def test_a_picture_is_settled_when_nothing_can_come_between_it_and_its_target() -> None:
    left_out = LeftOut([2, 6])
    packets = told(left_out, [Packet(0, -2), Packet(2, 0), Packet(6, 2), Packet(4, 3), Packet(8, 7)])
    assert next(packets) == (0, False)
    assert not left_out.is_last(2, 2)  # another picture at 2 might come
    assert not left_out.is_last(0, 2)
    list(packets)
    assert left_out.is_last(2, 2)
    assert left_out.is_last(6, 6)


def test_a_picture_that_was_left_out_and_is_missed_is_an_error() -> None:
    left_out = LeftOut([0, 2])
    assert [time for time, is_told in told(left_out, ORDER) if not is_told][:2] == [3, 1]
    left_out.check(2, 2)
    left_out.check(0, 0)
    with pytest.raises(LeftOutError, match="picture at 1 ticks was left out, 2 wants it"):
        left_out.check(0, 2)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> FolderSplit:
    folder = tmp_path_factory.mktemp("b-frames")
    write_video(folder / "a.mp4", options=B_FRAMES)
    return PlainFolder.open(folder).split("all")


def decoded(split: FolderSplit, numbers: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """Luma of frames, and the time stamps of all frames that came out of the decoder."""
    seen: list[int] = []

    def spy(container: object, stream: object, *, told: read.ToldPackets | None) -> Iterator[tuple[int, object]]:
        for ticks, frame in read_decoded(container, stream, told=told):
            seen.append(ticks)
            yield ticks, frame

    with monkeypatch.context() as patch:
        read_decoded = read._decoded
        patch.setattr(read, "_decoded", spy)
        return split.read_frames(0, numbers)[0], seen


def test_pictures_are_the_same_without_the_unwanted_ones(split: FolderSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(13, 61, 2)
    fewer, seen = decoded(split, numbers, monkeypatch)
    monkeypatch.setattr("pipeline.folder.unwanted._CODECS", frozenset())
    whole, all_seen = decoded(split, numbers, monkeypatch)
    assert np.array_equal(fewer, whole)
    assert len(seen) <= 0.65 * len(all_seen)  # of four pictures one P, and of three B-frames half: 0.62


def test_what_was_left_out_and_is_missed_is_decoded_after_all(
    split: FolderSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.arange(13, 61, 2)
    expected = split.read_frames(0, numbers)[0]
    monkeypatch.setattr(LeftOut, "_is_wanted", lambda self, time: False)
    monkeypatch.setattr(LeftOut, "is_last", lambda self, time, target: False)
    found, seen = decoded(split, numbers, monkeypatch)
    assert np.array_equal(found, expected)
    assert len(seen) > len(set(seen))  # twice


def test_a_clip_opens_its_file_once_and_sound_does_not_depend_on_that(
    split: FolderSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = split.read_audio(0, 16_000, 8000)
    opens: list[object] = []
    real = yuv.av.open
    monkeypatch.setattr(yuv.av, "open", lambda *given, **more: opens.append(given[0]) or real(*given, **more))
    for _ in range(2):
        split.read_frames(0, np.arange(25, 45))
        assert np.array_equal(split.read_audio(0, 16_000, 8000), alone)
    assert len(opens) == 2
    assert opened._KEPT._kept is None
    assert np.array_equal(split.read_audio(0, 16_000, 8000), alone)
    assert len(opens) == 3
