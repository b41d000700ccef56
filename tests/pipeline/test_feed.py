"""When the readers get their memory back on a GPU, with streams and events that stand in for CUDA's."""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.clip import ClipSpec
from pipeline.collate import BatchSpec, collate
from pipeline.config import DataConfig
from pipeline.feed import MOST_BEHIND, Feed, _pin, open_source
from pipeline.graph import GraphSpec
from pipeline.nvdec.decoder import FFmpegDecoder
from pipeline.nvdec.pool import DecoderPool
from pipeline.nvdec.source import SplitSource
from pipeline.plan import TrainPlan
from pipeline.source import ThreadSource, Wanted
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=20)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=80)
WANTED = Wanted(SPEC.num_audio_samples, "cpu")
BATCHES = 4


class Event:
    """Done when its stream has got there."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.number = stream, stream.recorded
        stream.recorded += 1

    def query(self) -> bool:
        """Whether it is done."""
        return self.number < self.stream.done

    def synchronize(self) -> None:
        """Wait: the device gets there."""
        self.stream.waits += 0 if self.query() else 1
        self.stream.done = max(self.stream.done, self.number + 1)


class Stream:
    """Counts what was recorded on it; `done` of it are over."""

    def __init__(self) -> None:
        self.recorded = self.done = self.waits = 0

    def record_event(self) -> Event:
        """Return an event behind all that was asked for."""
        return Event(self)

    def synchronize(self) -> None:
        """Wait for all."""
        self.done = self.recorded


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Three videos."""
    media = [(f"m{i}", numbered_frames(40, 144, 128), noise(2, seed=i)) for i in range(3)]
    return write_store(tmp_path_factory.mktemp("feed") / "s", media, codec="h264")


@pytest.fixture(autouse=True)
def no_cuda_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for on a stand-in is done at once."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def batches() -> Iterator[range]:
    """Positions of two clips each."""
    return (range(first, first + 2) for first in range(0, 1000, 2))


def feed_on(split: StoreSplit, copies: Stream, maker: Any = None) -> tuple[Feed, SplitSource]:
    """A feed whose planes go to a device by `copies`, where `maker` makes the frames of them."""
    planner = TrainPlan(split, SPEC, CONFIG, seed=1)
    cpu = ThreadSource(split, planner, WANTED, num_threads=1, num_batches=BATCHES)
    source = SplitSource(split, planner, WANTED, cpu, None, num_batches=BATCHES)
    source.stream = copies  # type: ignore[assignment]
    source._device = torch.device("cpu")
    spec = GraphSpec(SPEC, 2, device_id=0)
    return Feed(source, batches(), spec, lambda batch: list(batch.clips), maker), source  # type: ignore[arg-type]


@pytest.mark.parametrize("copies_done", [True, False])
def test_memory_goes_back_behind_the_copies_not_behind_the_step(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, copies_done: bool
) -> None:
    step, copies = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    feed, source = feed_on(split, copies)
    for _ in range(3):
        feed()
        copies.done = copies.recorded if copies_done else 0
    feed.leave()
    feed()
    # The step has not begun: all but the newest batch have given their memory back where their copies are done.
    assert len(source._in_use) == (1 if copies_done else 4)
    assert step.waits == copies.waits == 0
    feed.close()


def test_the_host_runs_no_further_ahead_than_two_batches(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    step, copies = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    feed, _ = feed_on(split, copies)
    for number in range(5):
        feed()
        copies.done = copies.recorded
        feed.leave()
        assert step.waits == max(0, number + 1 - MOST_BEHIND)
    assert feed.take_device_wait() > 0.0
    assert feed.take_device_wait() == 0.0
    feed.close()


def test_planes_live_until_the_kernel_has_read_them(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the readers goes back behind the kernel, and the clips are held until the step behind it is reached."""
    step, copies = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    begun, waited, planes = [], [], []

    class Maker:
        def begin(self, clips: Any) -> Any:
            begun.append(copies.record_event())
            planes.append(weakref.ref(clips[0].luma))
            return SimpleNamespace(result=lambda: waited.append(step.record_event()))

        def close(self) -> None:
            begun.append(None)

    monkeypatch.setattr(torch, "from_numpy", torch.tensor)  # a copy, as on a device
    feed, _ = feed_on(split, copies, Maker())
    for _ in range(2):
        feed()
    released = [event for event, _ in feed._behind_event]
    assert [event.number for event in released] == [event.number + 1 for event in begun]  # type: ignore[attr-defined]
    for number in range(2):
        clips, _ = feed.leave()
        del clips
        assert feed._behind_step[-1][0].number == waited[number].number + 1  # type: ignore[attr-defined]
    assert all(plane() is not None for plane in planes)
    copies.done = copies.recorded
    feed()
    feed.leave()
    assert [plane() is None for plane in planes] == [True, False, False]  # the first step was waited for
    feed.close()
    assert begun[-1] is None


def test_sound_and_planes_of_a_released_clip_are_its_own(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    copies = Stream()
    feed, source = feed_on(split, copies)
    batch = next(iter(batches()))
    source.post(batch)
    taken = source.take()
    assert taken is not None
    own: list[Any] = list(source._in_use[taken.number].taken[0].clips)
    for clip, read in zip(taken.clips, own, strict=True):
        assert not np.shares_memory(clip.audio, read.audio)  # type: ignore[union-attr]
        assert np.array_equal(clip.audio, read.audio)  # type: ignore[union-attr]
        assert isinstance(clip.luma, torch.Tensor)  # type: ignore[union-attr]
    feed.close()


def test_memory_of_a_substitute_is_held_until_its_copy_is_done(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else holds it: it is read for this clip alone, and CUDA may read it after the call."""
    monkeypatch.setattr(torch, "from_numpy", torch.tensor)  # a copy, as on a device
    feed, source = feed_on(split, Stream())
    source.post(range(2))
    taken = source.take()
    assert taken is not None
    read: list[weakref.ref[Any]] = []
    real = source._cpu.again

    def again(*arguments: Any) -> Any:
        clip: Any = real(*arguments)
        read.append(weakref.ref(clip.luma))
        return clip

    monkeypatch.setattr(source._cpu, "again", again)
    assert isinstance(source.again(taken, 1, 1).luma, torch.Tensor)  # type: ignore[union-attr]
    assert read[0]() is not None
    source.release(taken.number)
    assert read[0]() is None
    feed.close()


def test_readers_end_although_the_device_has_failed(split: StoreSplit) -> None:
    class Failed(Stream):
        def synchronize(self) -> None:
            raise RuntimeError("device-side assert")

    feed, source = feed_on(split, Failed())
    with pytest.raises(RuntimeError, match="device-side assert"):
        feed.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        source._cpu.post(range(2))


@pytest.mark.parametrize("opens", [True, False])
def test_behind_nvdec_the_cpu_has_all_its_threads(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    """What NVDEC leaves at its end is the CPU's alone; and no reader stays where NVDEC does not open."""
    made: list[ThreadSource] = []

    def open_pool(*_: Any) -> DecoderPool:
        if not opens:
            raise OSError("no driver")
        return DecoderPool(FFmpegDecoder, 1)

    def cpu_source(*arguments: Any, **options: Any) -> ThreadSource:
        made.append(ThreadSource(*arguments, **options))
        return made[0]

    monkeypatch.setattr("pipeline.feed.open_pool", open_pool)
    monkeypatch.setattr("pipeline.feed.ThreadSource", cpu_source)
    config = replace(CONFIG, num_threads=3)
    arguments = split, TrainPlan(split, SPEC, config, seed=1), WANTED, GraphSpec(SPEC, 2), config, "nvdec"
    if opens:
        source = open_source(*arguments)  # type: ignore[arg-type]
        assert made[0]._pool._max_workers == 3
        source.close()
    else:
        with pytest.raises(OSError, match="no driver"):
            open_source(*arguments)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shutdown"):
        made[0].post(range(2))


def test_slots_that_cannot_be_pinned_break_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal stays CUDA's last error, which whoever launches the next kernel is told."""
    last = [0]

    def register(*_: Any) -> int:
        last[0] = 1
        return 304

    class Launch:
        def add_(self, _: int) -> None:
            error, last[0] = last[0], 0
            if error:
                raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: Launch())
    _pin(SimpleNamespace(ring=SimpleNamespace(memory=np.zeros(8, np.uint8))), 0)  # type: ignore[arg-type]
    assert last == [0]
    assert "cannot be pinned (CUDA error 304)" in caplog.text


def test_labels_leave_from_pinned_memory(monkeypatch: pytest.MonkeyPatch, split: StoreSplit) -> None:
    """A copy from pageable memory waits for all that the device has in hand."""
    copied: list[tuple[bool, bool]] = []
    to = torch.Tensor.to
    pinned: set[int] = set()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        pinned.add(found.data_ptr())
        return found

    def to_device(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments and isinstance(arguments[0], SimpleNamespace):
            copied.append((tensor.data_ptr() in pinned, bool(options.get("non_blocking"))))
            return tensor
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to_device)
    planner = TrainPlan(split, SPEC, CONFIG, seed=1)
    source = ThreadSource(split, planner, WANTED, num_threads=1, num_batches=1)
    source.post(range(2))
    taken = source.take()
    assert taken is not None
    device: Any = SimpleNamespace(type="cuda")
    collate(list(taken.clips), {}, BatchSpec(device, "single", 2, rotation=True))  # type: ignore[arg-type]
    source.release(taken.number)
    source.close()
    assert len(copied) >= 5
    assert set(copied) == {(True, True)}
