"""How NVIDIA's library is called: with a library of the same signatures that decodes on the CPU, as NVDEC might.

Its pictures lie in memory that the next call overwrites, and its parser may keep pictures back until the stream ends.
"""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.media.annexb import AnnexB, to_annex_b
from pipeline.media.fragments import FragmentedVideo
from pipeline.media.yuv import decode_cut
from pipeline.nvdec.decoder import DecodeError, StreamKind
from pipeline.nvdec.hardware import HardwareDecoder
from tests.pipeline.media.test_annexb import HEIGHT, WIDTH, encode

STREAM = 4711
END, OTHER_END = 1, 8  # VideoPacketFlag.ENDOFSTREAM and ENDOFPICTURE of the real one


class PacketData:
    """As the library's: addresses and sizes are integers, and so are flags."""

    bsl_data, bsl, pts, decode_flag = 0, 0, 0, 0


class Picture:
    """A decoded picture, handed over as the library does: with a stream, and no newer argument."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory

    def __dlpack__(self, stream: object = 0) -> object:
        assert stream == STREAM
        return self.memory.__dlpack__()


class Session:
    """A decoder as the library's: `Decode` gives pictures, NV12 (H * 3 / 2, W), in memory that the next call reuses.

    Args:
        kept_back: Pictures that come only with a call that is empty and ends the stream.
    """

    def __init__(self, kept_back: int = 0) -> None:
        self.context: Any = av.CodecContext.create("h264", "r")
        self.kept_back, self.waiting = kept_back, list[NDArray[np.uint8]]()
        self.memory: list[NDArray[np.uint8]] = []
        self.calls = 0

    def Decode(self, packet: PacketData) -> list[Picture]:
        """Pictures in display order."""
        self.calls += 1
        assert packet.decode_flag == END
        for picture in self.memory:
            picture[:] = 77  # whoever did not copy it sees this
        if packet.bsl:
            data = ctypes.string_at(packet.bsl_data, packet.bsl)
            packets = [*self.context.parse(data), *self.context.parse(None), None]
            found = [nv12(frame) for one in packets for frame in self.context.decode(one)]
            self.context.flush_buffers()
            cut = len(found) - self.kept_back
            found, self.waiting = found[:cut], found[cut:]
        else:
            found, self.waiting = self.waiting, []
        self.memory = found
        return [Picture(memory) for memory in found]


def nv12(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """Luma above interleaved chroma."""
    planes = frame.to_ndarray()
    chroma = planes[frame.height :].reshape(2, -1)
    return np.concatenate([planes[: frame.height], chroma.T.reshape(-1, frame.width)])


def opened(session: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (WIDTH, HEIGHT)) -> HardwareDecoder:
    """A decoder on the CPU whose session is `session`."""
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    decoder = object.__new__(HardwareDecoder)
    flags = SimpleNamespace(ENDOFSTREAM=END, ENDOFPICTURE=OTHER_END)
    decoder._kind, decoder._device = StreamKind("h264", *size), torch.device("cpu")
    decoder._stream = SimpleNamespace(cuda_stream=STREAM)  # type: ignore[assignment]
    decoder._library = SimpleNamespace(PacketData=PacketData, VideoPacketFlag=flags)
    decoder._decoder = session
    return decoder


@pytest.fixture(scope="module")
def video() -> FragmentedVideo:
    """40 pictures with B-frames in four GOPs."""
    return encode(bframes=3, b_pyramid="normal")


def cut(video: FragmentedVideo, first: int, last: int) -> bytes:
    """Init segment and fragments first..last - 1."""
    return video.init + b"".join(video.fragments[first:last])


NUMBERS = [np.arange(0, 24, 2), np.array([23]), np.array([0, 0, 5, 5, 18, 22]), np.arange(24), np.array([3])]


@pytest.mark.parametrize("kept_back", [0, 1, 4, 23])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_wanted_pictures_are_copied_before_their_memory_is_reused(
    video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch, kept_back: int, numbers: NDArray[Any]
) -> None:
    session = Session(kept_back)
    decoder = opened(session, monkeypatch)
    clips = [cut(video, first, first + 2) for first in (0, 1, 0)]
    found = [decoder.decode(to_annex_b(data), numbers) for data in clips]
    assert session.calls == (2 if kept_back else 1) * len(clips)
    for planes, data in zip(found, clips, strict=True):
        distinct, inverse = np.unique(numbers, return_inverse=True)
        y, uv = decode_cut(data, distinct, WIDTH, HEIGHT)
        assert planes.luma.is_contiguous()
        assert planes.chroma.is_contiguous()
        assert np.array_equal(planes.luma.numpy(), y[inverse])
        assert np.array_equal(planes.chroma.numpy(), uv[inverse])
        assert planes.ready is not None


def test_too_few_pictures_are_an_error(video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = to_annex_b(cut(video, 0, 2))
    more = AnnexB(stream.data, stream.num_frames + 1)
    with pytest.raises(DecodeError, match=r"pictures decoded \(24\) must be those of the clip \(25\)"):
        opened(Session(), monkeypatch).decode(more, np.arange(3))
    with pytest.raises(DecodeError, match=r"hold numbers 0\.\.24"):
        opened(Session(), monkeypatch).decode(stream, np.array([0, 24]))


def test_pictures_of_another_size_are_an_error(video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = opened(Session(), monkeypatch, (WIDTH + 16, HEIGHT))
    with pytest.raises(DecodeError, match=r"picture \(96, 96\) must be NV12 of StreamKind"):
        decoder.decode(to_annex_b(cut(video, 0, 1)), np.arange(3))


def test_whatever_the_library_raises_is_a_failure_of_the_decoder(
    video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Session):
        def Decode(self, packet: PacketData) -> list[Picture]:
            raise OverflowError("bad packet")

    with pytest.raises(DecodeError, match="OverflowError: bad packet"):
        opened(Failing(), monkeypatch).decode(to_annex_b(cut(video, 0, 1)), np.arange(3))
