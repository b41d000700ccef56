"""NVDEC and CPU as one source: whoever decodes, in whatever order they end, clips and pixels are the same.

The CPU twin stands in for NVDEC, slowed down, failing or hanging as asked.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.media.annexb import AnnexB
from pipeline.media.reading import ReadStalled
from pipeline.nvdec.decoder import ClipPlanes, DecodeError, FFmpegDecoder, StreamKind
from pipeline.nvdec.pool import DecoderPool
from pipeline.nvdec.share import Rates, Share
from pipeline.nvdec.source import SplitSource, nvdec_decodes_all, nvdec_media
from pipeline.nvdec.trial import Trial
from pipeline.plan import TrainPlan
from pipeline.source import ClipSource, HostClip, TakenBatch, ThreadSource, Unreadable, Wanted
from pipeline.store.reader import Store, StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=20)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80)
WANTED = Wanted(SPEC.num_audio_samples, "cpu")
CLIPS, BATCHES = 5, 4


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Six videos of three sizes, one of them too small for NVDEC."""
    sizes = [(144, 128), (160, 128), (144, 128), (144, 112), (160, 128), (144, 128)]
    media = [(f"m{i}", numbered_frames(60, *size), noise(2, seed=i)) for i, size in enumerate(sizes)]
    return write_store(tmp_path_factory.mktemp("nvdec") / "s", media, codec="h264")


class StandIn(FFmpegDecoder):
    """The CPU twin, with something done before each clip."""

    def __init__(self, kind: StreamKind, before: Callable[[AnnexB], Any]) -> None:
        super().__init__(kind)
        self._before = before

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        self._before(stream)
        return super().decode(stream, wanted)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test measured is not another's."""
    monkeypatch.setattr("pipeline.nvdec.trial._MEASURED", {})


def nothing(stream: AnnexB) -> None:
    """No fault."""


def open_split(
    split: StoreSplit,
    share: Share | None,
    *,
    before: Callable[[AnnexB], Any] = nothing,
    threads: int = 3,
    deadline_s: float = 60.0,
    wanted: Wanted = WANTED,
) -> SplitSource:
    """A source of both, with stand-ins."""
    planner = TrainPlan(split, SPEC, CONFIG, seed=5)
    cpu = ThreadSource(split, planner, wanted, num_threads=2, num_batches=BATCHES)
    pool = DecoderPool(lambda kind: StandIn(kind, before), threads, deadline_s=deadline_s)
    return SplitSource(split, planner, wanted, cpu, pool, num_batches=BATCHES, share=share)


def batches(source: Any, count: int = 6) -> Iterator[list[HostClip | Unreadable]]:
    """The first batches of five clips, as a loader asks for them."""
    posted = 0
    for _ in range(count):
        while posted < count and source.has_room():
            source.post(range(posted * CLIPS, posted * CLIPS + CLIPS))
            posted += 1
        taken = source.take()
        assert isinstance(taken, TakenBatch)
        yield taken.clips
        source.release(taken.number)
    assert source.take() is None
    source.close()


@pytest.fixture(scope="module")
def reference(split: StoreSplit) -> list[list[HostClip]]:
    """The same batches, decoded by CPU threads alone."""
    planner = TrainPlan(split, SPEC, CONFIG, seed=5)
    source = ThreadSource(split, planner, WANTED, num_threads=1, num_batches=BATCHES)
    return [[clip for clip in clips if isinstance(clip, HostClip)] for clips in batches(source)]


def assert_same(found: Iterator[list[HostClip | Unreadable]], reference: list[list[HostClip]]) -> None:
    """Same clips in the same order, with the same planes and sound, byte for byte."""
    number = 0
    for clips, wanted in zip(found, reference, strict=True):
        assert len(clips) == len(wanted) == CLIPS
        for clip, other in zip(clips, wanted, strict=True):
            assert isinstance(clip, HostClip)
            assert clip.plan == other.plan
            assert clip.encoded is None
            assert np.array_equal(clip.frames, other.frames)
            for name in ("luma", "chroma", "audio"):
                assert np.array_equal(getattr(clip, name), getattr(other, name)), (clip.plan.position, name)
            assert clip.has_audio == other.has_audio
            number += 1
    assert number == CLIPS * len(reference)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_changes_no_clip(split: StoreSplit, reference: list[list[HostClip]], share: float) -> None:
    source = open_split(split, Share(share))
    assert_same(batches(source), reference)
    counts = source.counts
    assert counts.nvdec + counts.cpu == 30
    assert counts.again == 0
    small = sum(clip.plan.media == 3 for clips in reference for clip in clips)
    assert small > 0
    assert counts.nvdec == {0.0: 0, 1.0: 30 - small}.get(share, counts.nvdec)
    assert abs(counts.nvdec - share * 30) <= (1 if share < 1 else small)


@pytest.mark.parametrize("slow", ["nvdec", "one in three"])
def test_who_ends_first_changes_no_clip(split: StoreSplit, reference: list[list[HostClip]], slow: str) -> None:
    turn = iter(range(1000))
    delay = {"nvdec": lambda: 0.02, "one in three": lambda: 0.05 * (next(turn) % 3 == 0)}[slow]
    source = open_split(split, Share(0.6), before=lambda stream: time.sleep(delay()))
    assert_same(batches(source), reference)
    assert source.counts.nvdec >= 15


def test_the_cpu_decodes_what_nvdec_fails_with(
    split: StoreSplit, reference: list[list[HostClip]], caplog: pytest.LogCaptureFixture
) -> None:
    """One clip in four fails inside the decoder; nothing of it is seen in the batches, and the log names the clips."""
    turn = iter(range(1000))

    def before(stream: AnnexB) -> None:
        if next(turn) % 4 == 1:
            raise DecodeError("engine error")

    source = open_split(split, Share(1.0), before=before, threads=1)
    assert_same(batches(source), reference)
    assert source.counts.again == len(caplog.records) >= 5
    assert all("engine error; decoded by the CPU" in record.getMessage() for record in caplog.records)


def test_a_decoder_that_hangs_costs_one_deadline(split: StoreSplit, reference: list[list[HostClip]]) -> None:
    release = threading.Event()
    began = time.monotonic()
    source = open_split(split, Share(1.0), before=lambda stream: release.wait(60), threads=2, deadline_s=0.3)
    found = batches(source)
    kept = [next(found) for _ in range(5)]
    assert time.monotonic() - began < 20
    release.set()
    assert_same(iter([*kept, *found]), reference)
    assert source.counts.nvdec == 0
    assert source.counts.again >= CLIPS - 1  # the batches that were posted by then; later ones go to the CPU


@pytest.mark.parametrize("reader", ["NVDEC's thread", "a substitute", "a substitute of threads"])
def test_storage_that_does_not_answer_is_told_by_file(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """It is no decoder's fault, and the main thread must not wait for it for ever."""
    source: ClipSource = open_split(split, Share(1.0), threads=1, deadline_s=0.2)
    if reader == "a substitute of threads":
        source.close()
        planner = TrainPlan(split, SPEC, CONFIG, seed=5)
        source = ThreadSource(split, planner, WANTED, num_threads=1, num_batches=BATCHES, deadline_s=0.2)
    source.post(range(1))
    taken = source.take()
    assert taken is not None
    release = threading.Event()
    real = os.preadv

    def hang(*arguments: Any) -> int:
        release.wait(10)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", hang)
    if reader == "NVDEC's thread":
        source.post(range(1, 2))
    try:
        with pytest.raises(ReadStalled, match=r"read of \S+ at byte \d+ has not returned"):
            source.take() if reader == "NVDEC's thread" else source.again(taken, 0, 1)
    finally:
        release.set()
        source.close()


def test_what_the_disk_damaged_is_unreadable_and_the_next_clip_is_right(
    split: StoreSplit, reference: list[list[HostClip]], tmp_path: Path
) -> None:
    """A checksum that does not hold is found before any decoder sees the bytes."""
    folder = tmp_path / "s"
    shutil.copytree(split.store.path, folder)
    columns = split.store.index_columns()
    place = int(columns["video_offset"][1]) + int(columns["init_bytes"][1]) + 200
    shard = sorted((folder / "shards").iterdir())[int(columns["video_shard"][1])]
    data = bytearray(shard.read_bytes())
    for at in range(place, place + 4000, 50):
        data[at] ^= 0xFF
    shard.write_bytes(bytes(data))
    broken = Store.open(folder).split("train")
    source = open_split(broken, Share(1.0))
    bad = 0
    for clips, wanted in zip(batches(source), reference, strict=True):
        for clip, other in zip(clips, wanted, strict=True):
            if isinstance(clip, Unreadable):
                assert clip.plan == other.plan
                assert "crc" in clip.reason.lower()
                bad += 1
            else:
                assert np.array_equal(clip.luma, other.luma)  # type: ignore[arg-type]
    assert 1 <= bad <= sum(clip.plan.media == 1 for clips in reference for clip in clips)
    assert source.counts.again == 0


def test_a_clip_that_is_too_large_is_unreadable_whoever_has_it(split: StoreSplit) -> None:
    """Else the speed of a machine would decide which clips a training sees."""
    wanted = replace(WANTED, max_clip_bytes=SPEC.num_frames * 160 * 128 * 3 // 2 - 1)  # two of the six videos have more

    def found(share: float) -> list[str]:
        source = open_split(split, Share(share), wanted=wanted)
        clips = [clip for clips in batches(source, 3) for clip in clips]
        assert source.splits
        return [clip.reason if isinstance(clip, Unreadable) else clip.plan.id for clip in clips]

    of_cpu = found(0.0)
    assert 0 < sum("data.clip_memory_mib" in text for text in of_cpu) < len(of_cpu)
    assert found(1.0) == of_cpu


def test_a_cut_that_cannot_be_converted_is_for_the_cpu_to_judge(
    split: StoreSplit, reference: list[list[HostClip]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoder is blamed for it: however many there are, NVDEC goes on."""
    turn = iter(range(1000))
    real = SplitSource._decode.__globals__["to_annex_b"]

    def convert(cut: Any) -> AnnexB:
        if next(turn) % 2:
            raise ValueError("no such cut")
        return real(cut)  # type: ignore[no-any-return]

    monkeypatch.setattr("pipeline.nvdec.source.to_annex_b", convert)
    source = open_split(split, Share(1.0), threads=1)
    assert_same(batches(source), reference)
    assert source.counts.again >= 10
    assert source.counts.nvdec >= 10


def test_substitutes_come_from_the_cpu_whoever_had_the_clip(split: StoreSplit) -> None:
    source = open_split(split, Share(0.5))
    planner = TrainPlan(split, SPEC, CONFIG, seed=5)
    source.post(range(CLIPS))
    taken = source.take()
    assert taken is not None
    for place in range(CLIPS):
        clip = source.again(taken, place, 2)
        assert isinstance(clip, HostClip)
        assert clip.plan == planner.at(place, 2)
        assert clip.luma is not None
    assert source.counts.nvdec >= 2
    source.release(taken.number)
    source.close()


def test_both_sides_are_measured_at_the_first_batch(
    split: StoreSplit,
    reference: list[list[HostClip]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in that takes 50 ms a clip in each of two threads gives at most 40 clips/s, and its share follows."""
    monkeypatch.setattr("pipeline.nvdec.trial.MEASURED_S", 0.1)
    caplog.set_level("INFO")
    source = open_split(split, None, before=lambda stream: time.sleep(0.05), threads=2)
    assert source.rates is None
    assert_same(batches(source), reference)
    assert source.rates is not None
    assert 0 < source.rates.nvdec_per_s <= 40
    assert source.rates.cpu_per_s > 0
    assert abs(source.counts.nvdec - 30 * source.rates.nvdec_share) <= 3
    assert caplog.records[0].getMessage().startswith("decoding: NVDEC ")
    again = open_split(split, None)  # the next evaluation does not measure again
    assert_same(batches(again), reference)
    assert again.rates == source.rates
    assert len([r for r in caplog.records if r.getMessage().startswith("decoding")]) == 1


@pytest.mark.parametrize("look_ahead", [0, 100])
def test_a_first_batch_that_is_not_for_nvdec_is_measured_with_later_clips(
    split: StoreSplit, look_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def measure(source: SplitSource, positions: Sequence[int]) -> Rates:
        seen.append(list(positions))
        return Rates(3.0, 1.0)

    monkeypatch.setattr("pipeline.nvdec.trial.LOOK_AHEAD", look_ahead)
    monkeypatch.setattr(Trial, "_measure", measure)
    planner = TrainPlan(split, SPEC, CONFIG, seed=5)
    last = planner.at(CLIPS, 0).media  # of six media five are in the first batch
    source = open_split(split, None)
    source._can, source._all_can = np.arange(6) == last, False
    source.post(range(CLIPS))
    assert source._share is not None
    if look_ahead:
        assert seen[0][0] == CLIPS
        assert [planner.at(position, 0).media for position in seen[0]] == [last] * CLIPS
        assert source._share.nvdec_share == 0.75
    else:
        assert not seen
        assert source._share.nvdec_share == 0.5
    source.close()


def test_without_video_nothing_is_decoded(split: StoreSplit) -> None:
    planner = TrainPlan(split, SPEC, CONFIG, seed=5)
    wanted = replace(WANTED, video=False)
    cpu = ThreadSource(split, planner, wanted, num_threads=1, num_batches=2)
    made: list[StreamKind] = []

    def make(kind: StreamKind) -> FFmpegDecoder:
        made.append(kind)
        return FFmpegDecoder(kind)

    source = SplitSource(split, planner, wanted, cpu, DecoderPool(make, 1), num_batches=2, share=Share(1.0))
    source.post(range(3))
    taken = source.take()
    assert taken is not None
    assert [isinstance(clip, HostClip) and clip.luma is None for clip in taken.clips] == [True] * 3
    assert made == []
    source.close()


def test_media_that_nvdec_takes(split: StoreSplit, tmp_path: Path) -> None:
    assert nvdec_media(split).tolist() == [True, True, True, False, True, True]
    assert not nvdec_decodes_all(split)
    vp9 = write_store(tmp_path / "s", [("m", numbered_frames(24, 144, 128), noise(1))])
    assert nvdec_media(vp9).tolist() == [False]
    large = write_store(tmp_path / "l", [("m", numbered_frames(24, 144, 128), noise(1))], codec="h264")
    assert nvdec_decodes_all(large)
