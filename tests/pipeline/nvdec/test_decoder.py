"""Decoders that live on: the CPU twin against the ordinary way, and the pool around decoders that fail.

The twin stands in for NVDEC: it is fed with the same bytes in the same way. Tests marked needs_cuda hold the real one
to the same.
"""

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.media.annexb import AnnexB, to_annex_b
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.media.yuv import decode_cut
from pipeline.nvdec.decoder import ClipPlanes, DecodeError, FFmpegDecoder, StreamDecoder, StreamKind, on_host
from pipeline.nvdec.hardware import HardwareDecoder, why_not
from pipeline.nvdec.pool import KINDS_KEPT, MOST_FAILURES, DecoderPool, Decoders
from tests.pipeline.media.test_annexb import encode
from tests.pipeline.support.stores import numbered_frames

SMALL = StreamKind("h264", 96, 64)


@pytest.fixture(scope="module")
def videos() -> dict[str, FragmentedVideo]:
    """Three videos of four GOPs: as a store has it, with B-frames, of another size."""
    plain, wide = (
        encode_fragments(numbered_frames(40, *size), fps=Fraction(25), width=size[0], height=size[1], codec="h264")
        for size in ((96, 64), (128, 80))
    )
    return {"plain": plain, "B-frames": encode(bframes=3, b_pyramid="normal"), "wide": wide}


def cut(video: FragmentedVideo, first: int = 0, last: int = 4) -> bytes:
    """Init segment and fragments first..last - 1."""
    return video.init + b"".join(video.fragments[first:last])


def kind_of(video: FragmentedVideo) -> StreamKind:
    """What a decoder for it is made for."""
    return StreamKind("h264", video.width, video.height)


def expected(video: FragmentedVideo, data: bytes, numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same pictures through a container, as the CPU decodes a store."""
    distinct, inverse = np.unique(numbers, return_inverse=True)
    y, uv = decode_cut(data, distinct, video.width, video.height)
    return y[inverse], uv[inverse]


def assert_planes(planes: ClipPlanes, video: FragmentedVideo, data: bytes, numbers: NDArray[Any]) -> None:
    """Byte for byte, in the shapes that the graph takes."""
    y, uv = expected(video, data, numbers)
    assert on_host(planes.luma).shape == y.shape
    assert np.array_equal(on_host(planes.luma), y)
    assert np.array_equal(on_host(planes.chroma), uv)


NUMBERS = [np.arange(0, 24, 2), np.array([23]), np.array([0, 0, 5, 5, 5, 17]), np.arange(24)]


@pytest.mark.parametrize("name", ["plain", "B-frames", "wide"])
def test_one_decoder_for_many_clips(videos: dict[str, FragmentedVideo], name: str) -> None:
    """Each clip is decoded as if it were the first: whatever was wanted of the one before."""
    video = videos[name]
    decoder = FFmpegDecoder(kind_of(video))
    for first in (0, 1, 0):
        data = cut(video, first, first + 2)
        for numbers in NUMBERS:
            assert_planes(decoder.decode(to_annex_b(data), numbers), video, data, numbers)
    decoder.close()


def test_numbers_that_a_clip_does_not_hold_are_an_error(videos: dict[str, FragmentedVideo]) -> None:
    stream = to_annex_b(cut(videos["plain"], 0, 1))
    with pytest.raises(DecodeError, match=r"pictures decoded \(12\) must be those of the clip \(12\).*5\.\.12"):
        FFmpegDecoder(SMALL).decode(stream, np.array([5, 12]))


def test_another_size_is_an_error(videos: dict[str, FragmentedVideo]) -> None:
    with pytest.raises(DecodeError, match=r"picture \(128x80 px\) must be of StreamKind"):
        FFmpegDecoder(SMALL).decode(to_annex_b(cut(videos["wide"])), np.arange(3))


def damaged(stream: AnnexB) -> AnnexB:
    """A stream whose every slice is zeros."""
    data = stream.data.copy()
    data[60:] = 0
    return AnnexB(data, stream.num_frames)


def test_after_a_damaged_clip_the_next_one_is_right(videos: dict[str, FragmentedVideo]) -> None:
    """The decoder that failed is replaced: what it holds is unknown."""
    made: list[StreamKind] = []

    def make(kind: StreamKind) -> StreamDecoder:
        made.append(kind)
        return FFmpegDecoder(kind)

    decoders, data = Decoders(make), cut(videos["B-frames"])
    stream, numbers = to_annex_b(data), np.arange(0, 40, 3)
    assert_planes(decoders.decode(SMALL, stream, numbers), videos["B-frames"], data, numbers)
    with pytest.raises(DecodeError, match=r"."):
        decoders.decode(SMALL, damaged(stream), numbers)
    for _ in range(2):
        assert_planes(decoders.decode(SMALL, stream, numbers), videos["B-frames"], data, numbers)
    assert made == [SMALL, SMALL]
    decoders.close()


class Counted:
    """A decoder that tells when it is made, used and closed; it decodes nothing."""

    log: list[tuple[str, StreamKind]]

    def __init__(self, kind: StreamKind, log: list[tuple[str, StreamKind]]) -> None:
        self.kind, self.log = kind, log
        log.append(("make", kind))

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        self.log.append(("use", self.kind))
        return ClipPlanes(None, None)

    def close(self) -> None:
        self.log.append(("close", self.kind))


def test_sizes_change_from_clip_to_clip(videos: dict[str, FragmentedVideo]) -> None:
    decoders = Decoders(FFmpegDecoder)
    for name in ("plain", "wide", "B-frames", "wide", "plain"):
        data, numbers = cut(videos[name]), np.arange(0, 40, 7)
        planes = decoders.decode(kind_of(videos[name]), to_annex_b(data), numbers)
        assert_planes(planes, videos[name], data, numbers)
    decoders.close()


def test_the_least_used_decoder_gives_way() -> None:
    log: list[tuple[str, StreamKind]] = []
    decoders = Decoders(lambda kind: Counted(kind, log))
    kinds = [StreamKind("h264", 128 + 16 * number, 128) for number in range(KINDS_KEPT + 1)]
    nothing = AnnexB(np.zeros(1, np.uint8), 1)
    for kind in [*kinds[:KINDS_KEPT], kinds[0], kinds[KINDS_KEPT], kinds[0]]:
        decoders.decode(kind, nothing, np.zeros(1))
    assert [kind for what, kind in log if what == "make"] == kinds
    assert [kind for what, kind in log if what == "close"] == [kinds[1]]
    decoders.close()
    assert sorted(kind for what, kind in log if what == "close") == sorted(kinds)


# The pool ---------------------------------------------------------------------------------------------------------


def pool_of(act: Callable[[int], object], threads: int = 2, deadline_s: float = 60.0) -> tuple[DecoderPool, list[Any]]:
    """A pool of decoders that call `act` with the number of the clip, and what they logged."""
    log: list[tuple[str, StreamKind]] = []

    class Acting(Counted):
        def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
            act(stream.num_frames)
            return ClipPlanes(stream.num_frames, None)

    return DecoderPool(lambda kind: Acting(kind, log), threads, deadline_s=deadline_s), log


def submit(pool: DecoderPool, number: int) -> "Future[ClipPlanes]":
    """Have clip `number` decoded."""
    stream = AnnexB(np.zeros(1, np.uint8), number)
    return pool.submit(lambda decoders: decoders.decode(SMALL, stream, np.zeros(1)))


def test_answers_belong_to_their_clips_in_whatever_order_they_end() -> None:
    gates = [threading.Event() for _ in range(4)]
    ended: list[int] = []

    def act(number: int) -> None:
        gates[number].wait(30)
        ended.append(number)

    pool, log = pool_of(act, threads=4)
    futures = [submit(pool, number) for number in range(4)]
    for number in (3, 1, 0, 2):
        gates[number].set()
        futures[number].result(30)
    assert [pool.result(future).luma for future in futures] == [0, 1, 2, 3]
    assert ended == [3, 1, 0, 2]
    pool.close()
    assert sorted(what for what, _ in log) == ["close"] * 4 + ["make"] * 4


def test_a_clip_that_fails_costs_its_decoder_and_nothing_else() -> None:
    def act(number: int) -> None:
        if number % 2:
            raise DecodeError(f"clip {number}")

    pool, log = pool_of(act, threads=1)
    futures = [submit(pool, number) for number in range(6)]
    for number, future in enumerate(futures):
        if number % 2:
            with pytest.raises(DecodeError, match=f"clip {number}"):
                pool.result(future)
        else:
            assert pool.result(future).luma == number
    assert pool.is_usable
    assert sum(what == "make" for what, _ in log) == 3
    pool.close()


def test_failures_of_the_first_clips_end_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the reason, a decoder that never works is not asked again for each clip of a run."""

    def act(number: int) -> None:
        raise DecodeError("no engine")

    pool, _ = pool_of(act, threads=1)
    for number in range(MOST_FAILURES):
        with pytest.raises(DecodeError, match="no engine"):
            pool.result(submit(pool, number))
    assert not pool.is_usable
    assert [record.getMessage() for record in caplog.records] == [
        "NVDEC is not used any more: the first 3 clips failed, the last one: no engine; the CPU decodes all clips from "
        "here on"
    ]
    with pytest.raises(DecodeError, match="the first 3 clips failed"):
        pool.result(submit(pool, 9))
    pool.close()


def failing(bad: set[int]) -> DecoderPool:
    """A pool that fails with the clips of some numbers."""

    def act(number: int) -> None:
        if number in bad:
            raise DecodeError(f"clip {number}")

    return pool_of(act, threads=1)[0]


def answered(pool: DecoderPool, numbers: range) -> list[bool]:
    """Which of some clips were decoded, one after the other."""
    found = []
    for number in numbers:
        try:
            pool.result(submit(pool, number))
            found.append(True)
        except DecodeError:
            found.append(False)
    return found


def test_ten_bad_clips_in_a_row_do_not_end_a_pool_that_works(caplog: pytest.LogCaptureFixture) -> None:
    """An evaluation reads the ten clips of one video one after the other."""
    pool = failing(set(range(20, 30)))
    assert answered(pool, range(100)) == [number not in range(20, 30) for number in range(100)]
    assert pool.is_usable
    assert not caplog.records
    pool.close()


def test_a_pool_ends_when_more_than_half_of_its_last_clips_failed(caplog: pytest.LogCaptureFixture) -> None:
    pool = failing(set(range(100, 200)))
    decoded = answered(pool, range(200))
    assert decoded == [number < 100 for number in range(200)]
    assert [record.getMessage() for record in caplog.records] == [
        "NVDEC is not used any more: 33 of the last 64 clips failed, the last one: clip 132; the CPU decodes all clips "
        "from here on"
    ]
    pool.close()


def test_a_decoder_that_hangs_ends_the_pool_and_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    hang = threading.Event()
    pool, _ = pool_of(lambda number: (hang.wait(60) and None) or None, threads=1, deadline_s=0.2)
    first, second = submit(pool, 0), submit(pool, 1)
    with pytest.raises(DecodeError, match=r"no answer within 0.2 s"):
        pool.result(first)
    with pytest.raises(DecodeError, match=r"no answer within 0.2 s"):
        pool.result(second)  # it was queued behind, and is dropped
    assert not pool.is_usable
    assert len(caplog.records) == 1
    hang.set()
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvdec-")]


def test_decoders_that_all_hang_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first clip costs a deadline; of the others those that are done by then are taken."""
    monkeypatch.setattr("pipeline.nvdec.pool.AFTER_END_S", 0.0)
    hang = threading.Event()
    pool, log = pool_of(lambda number: number < 3 and hang.wait(60), threads=4, deadline_s=0.3)
    futures = [submit(pool, number) for number in range(4)]
    futures[3].result(30)
    with pytest.raises(DecodeError, match="no answer within"):
        pool.result(futures[0])
    assert pool.result(futures[3]).luma == 3
    for future in futures[1:3]:
        with pytest.raises(DecodeError, match="no answer within"):
            pool.result(future)
    hang.set()
    pool.close()
    assert sum(what == "close" for what, _ in log) == 4


def test_errors_of_the_program_reach_whoever_waits() -> None:
    pool, _ = pool_of(lambda number: None)

    def job(decoders: Decoders) -> None:
        raise KeyError("not a matter of decoding")

    with pytest.raises(KeyError, match="not a matter of decoding"):
        pool.result(pool.submit(job))
    assert pool.is_usable
    pool.close()


def test_storage_that_times_out_is_no_deadline_of_the_pool() -> None:
    """Both are a TimeoutError: what a network file system says is the reader's to tell."""
    pool, _ = pool_of(lambda number: None)

    def job(decoders: Decoders) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        pool.result(pool.submit(job))
    assert pool.is_usable
    pool.close()


def test_closing_drops_what_is_queued() -> None:
    gate = threading.Event()
    pool, log = pool_of(lambda number: (gate.wait(30) and None) or None, threads=1)
    futures = [submit(pool, number) for number in range(20)]
    while not log:
        time.sleep(0.001)
    threading.Timer(0.05, gate.set).start()
    pool.close()
    assert [future.cancelled() for future in futures[1:]] == [True] * 19
    with pytest.raises(DecodeError, match="the pool was closed"):
        pool.result(futures[5])
    assert log[-1][0] == "close"


# NVDEC itself -----------------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["plain", "B-frames"])
def test_nvdec_gives_the_planes_of_the_cpu(name: str) -> None:
    """H.264 decoding is exact: not one byte differs, clip after clip on one decoder."""
    import tests.pipeline.media.test_annexb as small

    if reason := why_not(0):
        pytest.skip(reason)
    side = 128
    old = small.WIDTH, small.HEIGHT
    small.WIDTH = small.HEIGHT = side
    try:
        video = encode(60, bframes=0 if name == "plain" else 3)
    finally:
        small.WIDTH, small.HEIGHT = old
    decoder = HardwareDecoder(StreamKind("h264", side, side))
    for first in (0, 2, 1):
        data = video.init + b"".join(video.fragments[first : first + 2])
        for numbers in NUMBERS:
            planes = decoder.decode(to_annex_b(data), numbers)
            y, uv = decode_cut(data, np.unique(numbers), side, side)
            inverse = np.unique(numbers, return_inverse=True)[1]
            assert np.array_equal(on_host(planes.luma), y[inverse])
            assert np.array_equal(on_host(planes.chroma), uv[inverse])
    decoder.close()


def test_nvdec_says_what_it_lacks() -> None:
    import torch

    if not torch.cuda.is_available():
        assert why_not(0) == "there is no CUDA device"
    with pytest.raises(DecodeError, match=r"must be of \('h264',\) and at least 128x128 px"):
        HardwareDecoder(StreamKind("h264", 128, 112))
