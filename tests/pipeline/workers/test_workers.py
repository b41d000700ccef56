"""Worker processes: the same batches as threads, whatever happens to the workers; nothing is left behind."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import Dataset
from pipeline.feed import MORE_BATCHES
from pipeline.folder.dataset import PlainFolder
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.media.reading import ReadStalled
from pipeline.nvdec.decoder import FFmpegDecoder
from pipeline.nvdec.pool import DecoderPool
from pipeline.nvdec.share import Share
from pipeline.nvdec.source import SplitSource
from pipeline.plan import NegativeSchedule, TrainPlan
from pipeline.source import ClipSource, HostClip, ThreadSource, Wanted
from pipeline.store.reader import Store, StoreSplit
from pipeline.workers.confined import Confinement, call_confined
from pipeline.workers.pool import PoolOptions, WorkerSource
from pipeline.workers.slots import SlotSpec, picture_bytes
from tests.pipeline.support import bare_readers
from tests.pipeline.support.odd_dataset import OddSplit
from tests.pipeline.support.plain_videos import write_video
from tests.pipeline.support.recorded import digest, picture
from tests.pipeline.support.stores import noise, write_store

pytestmark = pytest.mark.integration  # starts processes

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(
    crop_size_px=48, jitter_min_px=56, jitter_max_px=72, decoder="cpu", num_threads=2, max_quarantined_share=1.0
)
NEGATIVES = NegativeSchedule(enabled=True, hard_from_position=6, hard_share=0.5)


@pytest.fixture(scope="module", params=["h264", "vp9"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Eight media of two sizes, one of them silent."""
    sizes = [(128, 96), (96, 128)]
    media = [
        (f"m{i}", [picture(i, f, *sizes[i % 2]) for f in range(60)], noise(2, seed=i) if i < 7 else None)
        for i in range(8)
    ]
    return write_store(tmp_path_factory.mktemp("store") / "s", media, codec=request.param)


@pytest.fixture(scope="module")
def h264(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Six media."""
    media = [(f"m{i}", [picture(i, f) for f in range(40)], noise(1.5, seed=i)) for i in range(6)]
    return write_store(tmp_path_factory.mktemp("store") / "s", media, codec="h264")


def train(
    dataset: Dataset, workers: int, steps: int = 4, start: int = 0, **keys: object
) -> tuple[list[str], TrainLoader]:
    """Digests of batches of four clips, and the loader."""
    config = replace(CONFIG, num_workers=workers, **keys)  # type: ignore[arg-type]
    loader = TrainLoader(dataset, SPEC, config, LoaderOptions(4), seed=3, negatives=NEGATIVES)
    batches = loader.batches(start)
    found = [digest(batch) for batch in islice(batches, steps)]
    batches.close()
    return found, loader


def test_planes_and_sound_are_those_of_threads(split: StoreSplit, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mkv")
    for dataset in (split, PlainFolder.open(tmp_path).split("all")):
        plan = TrainPlan(dataset, SPEC, CONFIG, 5, NEGATIVES)
        wanted = Wanted(SPEC.num_audio_samples, "cpu")
        slots = SlotSpec(picture_bytes(dataset, SPEC.num_frames, wanted), SPEC.num_audio_samples, with_negative=True)
        threads = ThreadSource(dataset, plan, wanted, num_threads=1, num_batches=3)
        workers = WorkerSource(dataset, plan, wanted, slots, PoolOptions(2, 3, 6, 60.0))
        for batch in range(3):
            for source in (threads, workers):
                source.post(range(6 * batch, 6 * batch + 6))
        for _ in range(3):
            batches = [source.take() for source in (threads, workers)]
            assert batches[0] is not None
            assert batches[1] is not None
            for one, other in zip(batches[0].clips, batches[1].clips, strict=True):
                assert isinstance(one, HostClip)
                assert isinstance(other, HostClip)
                assert (one.plan, one.has_audio) == (other.plan, other.has_audio)
                for name in ("luma", "chroma", "audio", "negative", "frames"):
                    ours, theirs = getattr(one, name), getattr(other, name)
                    assert (ours is None) == (theirs is None)
                    assert ours is None or np.array_equal(ours, theirs)
        threads.close()
        workers.close()


@pytest.mark.parametrize("kind", ["threads", "processes", "nvdec's stand-in beside threads"])
def test_batches_that_are_ready_are_counted(h264: StoreSplit, kind: str) -> None:
    plan, wanted = TrainPlan(h264, SPEC, CONFIG, seed=3), Wanted(SPEC.num_audio_samples, "cpu")
    slots = SlotSpec(picture_bytes(h264, SPEC.num_frames, wanted), SPEC.num_audio_samples, with_negative=False)
    source: ClipSource = (
        WorkerSource(h264, plan, wanted, slots, PoolOptions(1, 3, 2, 60.0))
        if kind == "processes"
        else ThreadSource(h264, plan, wanted, num_threads=1, num_batches=3)
    )
    if kind.startswith("nvdec"):
        source = SplitSource(h264, plan, wanted, source, DecoderPool(FFmpegDecoder, 1), num_batches=3, share=Share(0.5))
    try:
        assert source.ready() == 0
        for first in (0, 2, 4):
            source.post(range(first, first + 2))
        deadline = time.monotonic() + 120
        while source.ready() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            os.sched_yield()
        assert source.ready() == 3
        taken = source.take()
        assert taken is not None
        assert source.ready() == 2
        source.release(taken.number)
        assert source.ready() == 2
    finally:
        source.close()
    if kind == "processes":
        assert source.ready() == 0


def test_batches_are_those_of_threads_for_any_number_of_workers(split: StoreSplit) -> None:
    wanted, _ = train(split, 0, steps=6)
    assert len(set(wanted)) == 6
    for workers in (1, 2, 4):
        assert train(split, workers, steps=6)[0] == wanted
    assert train(split, 2, steps=2, start=4)[0] == wanted[4:]


@pytest.mark.needs_cuda
def test_batches_on_a_gpu_are_those_of_threads(h264: StoreSplit) -> None:
    def frames(workers: int) -> list[torch.Tensor]:
        config = replace(CONFIG, num_workers=workers)
        loader = TrainLoader(h264, SPEC, config, LoaderOptions(4, device="cuda:0"), seed=3)
        return [batch.frames.cpu() for batch in islice(loader.batches(), 12) if batch.frames is not None]

    threads, workers = frames(0), frames(2)
    assert len(threads) == len(workers) == 12
    assert all(torch.equal(one, other) for one, other in zip(threads, workers, strict=True))


def test_evaluations_are_those_of_threads(split: StoreSplit) -> None:
    for views in (ViewConfig(2, 3, 48), ViewConfig(1, 0, 48)):
        found = [
            [
                digest(batch)
                for batch in EvalLoader(split, SPEC, replace(CONFIG, num_workers=n), LoaderOptions(3), views=views)
            ]
            for n in (0, 2)
        ]
        loader = EvalLoader(split, SPEC, CONFIG, LoaderOptions(3), views=views)
        assert found[0] == found[1]
        assert len(loader) == len(found[0])


@pytest.mark.parametrize("fault", ["kill once", "segv once", "hang once", "stop once", "read once"])
def test_a_worker_that_is_lost_changes_no_batch(h264: StoreSplit, tmp_path: Path, fault: str) -> None:
    media = (1, 2, 5) if fault == "read once" else (2,)  # storage goes for several clips
    odd = OddSplit(h264.store, "train", dict.fromkeys(media, fault), tmp_path)
    wanted, _ = train(h264, 0, steps=5)
    found, loader = train(odd, 2, steps=5, clip_deadline_s=60.0 if fault in ("kill once", "segv once") else 2.0)
    assert all((tmp_path / f"{each}-{fault.split()[0]}").exists() for each in media)
    assert found == wanted
    assert loader.stats.quarantined == 0


REASONS = {
    "kill": r"its decoder crashed \(signal SIGKILL\), twice; transcode it",
    "segv": r"its decoder crashed \(signal SIGSEGV\), twice; transcode it",
    "hang": r"decoding took longer than data.clip_deadline_s \(2 s\), twice; transcode it",
    "leak": r"decoding needs more memory than data.clip_memory_mib allows \(64\)",
    "bad": r"damaged",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_clip_that_breaks_its_decoder_costs_that_clip(h264: StoreSplit, tmp_path: Path, fault: str) -> None:
    bad = OddSplit(h264.store, "train", {2: "bad"}, tmp_path)
    wanted, threads = train(bad, 0, steps=4)
    odd = OddSplit(h264.store, "train", {2: fault}, tmp_path)
    found, loader = train(odd, 2, steps=4, clip_deadline_s=2.0 if fault == "hang" else 60.0, clip_memory_mib=64)
    assert found == wanted  # the same substitutes
    assert [name for name, _ in loader.quarantine] == ["m2"]
    assert re.search(REASONS[fault], loader.quarantine[0][1])
    assert (loader.stats.yielded, loader.stats.substituted) == (threads.stats.yielded, threads.stats.substituted)
    assert loader.stats.yielded + loader.stats.substituted == 16
    assert loader.stats.substituted >= 1


def test_a_read_that_never_returns_ends_the_run_and_quarantines_nothing(h264: StoreSplit, tmp_path: Path) -> None:
    odd = OddSplit(h264.store, "train", {2: "read"}, tmp_path)
    line = (
        r"read of \S+/shards/\S+ at byte \d+ has not returned within data.clip_deadline_s \(2 s\), and a second "
        r"process waits for it in vain; is its storage there\?"
    )
    with pytest.raises(ReadStalled, match=line) as caught:
        train(odd, 2, clip_deadline_s=2.0)
    assert caught.value.ends_process


def test_a_wait_in_the_kernel_is_no_fault_of_the_clip(
    h264: StoreSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = OddSplit(h264.store, "train", {2: "hang"}, tmp_path)  # hangs where no read is told: as FFmpeg's own reads
    monkeypatch.setattr("pipeline.workers.pool.waits_in_kernel", lambda pid: True)
    with pytest.raises(ReadStalled, match=r"read of clip m2\S* has not returned within .* a second process"):
        train(odd, 2, clip_deadline_s=1.0)


def test_a_worker_that_cannot_be_ended_ends_the_run(
    h264: StoreSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = OddSplit(h264.store, "train", {2: "read"}, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen.kill", lambda process: None)  # as one that the kernel holds in its read
        patch.setattr("pipeline.workers.pool.KILL_WAIT_S", 0.1)
        loader = TrainLoader(odd, SPEC, replace(CONFIG, num_workers=2, clip_deadline_s=1.0), LoaderOptions(4), seed=3)
        with pytest.raises(ReadStalled, match=r"at byte \d+ has .* its process is held by the system"):
            list(islice(loader.batches(0), 4))


def test_a_substitute_that_cannot_be_ended_is_named_itself(
    h264: StoreSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the clip in whose place it is decoded."""

    def media(seed: int, position: int, attempt: int) -> int:
        """Medium of a clip of a training with this seed."""
        return TrainLoader(h264, SPEC, CONFIG, LoaderOptions(1), seed=seed).plan.at(position, attempt).media

    ahead = 2 + MORE_BATCHES  # positions that are read before the first batch is taken
    seed = next(s for s in range(100) if media(s, 0, 1) not in {media(s, place, 0) for place in range(ahead)})
    bad, other = media(seed, 0, 0), media(seed, 0, 1)
    odd = OddSplit(h264.store, "train", {bad: "bad", other: "hang"}, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen.kill", lambda process: None)
        patch.setattr("pipeline.workers.pool.KILL_WAIT_S", 0.1)
        config = replace(CONFIG, num_workers=1, clip_deadline_s=1.0)
        loader = TrainLoader(odd, SPEC, config, LoaderOptions(1), seed=seed)
        with pytest.raises(ReadStalled, match=rf"read of clip m{other} has .* its process is held by the system"):
            next(loader.batches(0))


def test_an_evaluation_leaves_out_what_breaks_a_decoder(h264: StoreSplit, tmp_path: Path) -> None:
    odd = OddSplit(h264.store, "val", {0: "segv", 1: "kill", 4: "bad"}, tmp_path)
    config = replace(CONFIG, num_workers=2)
    loader = EvalLoader(odd, SPEC, config, LoaderOptions(2), views=ViewConfig(2, 1, 48))
    scored = [name for batch in loader for name in batch.ids]
    assert scored == ["m2", "m2", "m3", "m3", "m5", "m5"]
    assert (loader.stats.yielded, loader.stats.quarantined) == (6, 6)
    assert [name for name, _ in loader.quarantine] == ["m0", "m1", "m4"]


@pytest.mark.parametrize("frames", ["graph", "auto"])
def test_many_batches_that_are_left_out_end_no_evaluation(h264: StoreSplit, tmp_path: Path, frames: str) -> None:
    """More of them in a row than there is memory for, behind a batch that the graph still holds."""
    odd = OddSplit(h264.store, "val", dict.fromkeys((1, 2, 3), "bad"), tmp_path)
    config = replace(CONFIG, num_workers=1, frames=frames)
    loader = EvalLoader(odd, SPEC, config, LoaderOptions(1), views=ViewConfig(3, 1, 48))
    assert [name for batch in loader for name in batch.ids] == [name for name in ("m0", "m4", "m5") for _ in range(3)]
    assert (loader.stats.yielded, loader.stats.quarantined) == (9, 9)


def test_mistakes_of_the_program_are_raised(h264: StoreSplit, tmp_path: Path) -> None:
    odd = OddSplit(h264.store, "train", {2: "bug"}, tmp_path)
    with pytest.raises(KeyError, match="of our own"):
        train(odd, 2, steps=4)


def test_a_store_that_changes_is_refused_by_the_workers(tmp_path: Path) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    split = write_store(path, [("m", [picture(0, f) for f in range(40)], None)], codec="h264")
    write_store(other, [("m", [picture(1, f) for f in range(40)], None)], codec="h264")
    loader = TrainLoader(split, SPEC, replace(CONFIG, num_workers=1), LoaderOptions(1))
    path.rename(tmp_path / "former")
    other.rename(path)
    with pytest.raises(ValueError, match=r"data \(\w{16}\) changed while it is read \(was \w{16}\)"):
        next(loader.batches())


def test_clips_that_are_too_large_are_quarantined_before_anything_is_allocated(
    h264: StoreSplit, tmp_path: Path
) -> None:
    frames = [np.zeros((1600, 1600, 3), np.uint8)] * 20
    media = [("large", frames, None), ("small", [picture(0, f) for f in range(40)], None)]
    split = write_store(tmp_path / "s", media, codec="h264")
    reason = r"large: video: a clip \(8 frames of 1600x1600 px, 29 MiB\) must be at most data.clip_memory_mib \(16\)"
    for workers in (0, 1):
        found, loader = train(split, workers, steps=2, clip_memory_mib=16)
        assert len(found) == 2
        ((name, why),) = loader.quarantine
        assert name == "large"
        assert re.match(reason, why)


def open_descriptors() -> set[str]:
    """What this process holds open, without what the test runner holds."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            continue
    return found


def children() -> set[int]:
    """Child processes of this one."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_a_closed_loader_leaves_nothing(h264: StoreSplit) -> None:
    gc.collect()  # what other tests left in circles
    before, running = open_descriptors(), children()
    for _ in range(3):
        train(h264, 2)
    assert open_descriptors() == before
    assert children() == running
    assert "clips" not in Path("/proc/self/maps").read_text()


def test_idle_workers_that_are_killed_are_replaced(h264: StoreSplit) -> None:
    wanted, _ = train(h264, 0, steps=8)
    config = replace(CONFIG, num_workers=2)
    before = children()
    batches = TrainLoader(h264, SPEC, config, LoaderOptions(4), seed=3, negatives=NEGATIVES).batches()
    found = []
    for batch in islice(batches, 8):
        found.append(digest(batch))
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
    batches.close()
    assert found == wanted
    assert children() == before


def held_signals(status: str) -> set[int]:
    """Signals that a process blocks, of its /proc/PID/status."""
    mask = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.M)[1], 16)  # type: ignore[index]
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_workers_hold_signals_from_their_first_moment(h264: StoreSplit) -> None:
    """A Ctrl-C reaches them too, also while they import, when they have no handler yet."""
    wanted, before = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}, children()
    batches = TrainLoader(h264, SPEC, replace(CONFIG, num_workers=2), LoaderOptions(4), seed=3).batches()
    next(batches)
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in children() - before]
    batches.close()
    texts += call_confined(Path.read_text, [Path("/proc/self/status")], Confinement(), 1)
    assert len(texts) == 3
    assert all(wanted <= held_signals(text) for text in texts)
    assert not wanted & signal.pthread_sigmask(signal.SIG_BLOCK, [])  # and the training process none


def test_workers_serve_a_process_without_standard_streams(h264: StoreSplit, tmp_path: Path) -> None:
    """What is opened first gets the numbers of input and outputs, which a child has for itself."""
    result = tmp_path / "result.txt"
    command = [sys.executable, "-m", "tests.pipeline.support.bare_readers", str(h264.store.path), str(result)]
    subprocess.run(command, timeout=600, check=False)
    assert result.read_text() == bare_readers.digest(h264, 0)


def test_workers_leave_when_their_parent_is_killed(h264: StoreSplit, tmp_path: Path) -> None:
    text = (
        "import sys; from tests.pipeline.workers.test_workers import serve_for_ever; "
        f"serve_for_ever({str(h264.store.path)!r})"
    )
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(number)
        parent.wait(30)
        end = time.monotonic() + 10
        while any(is_running(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in pids)
        parent.stdout.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def serve_for_ever(store: str) -> None:
    """Print the workers' process ids and go on reading; run in a process that is killed."""
    split = Store.open(store).split("train")
    loader = TrainLoader(split, SPEC, replace(CONFIG, num_workers=2), LoaderOptions(4), seed=3)
    batches: Iterator[object] = loader.batches()
    next(batches)
    print(*children(), flush=True)
    while True:
        next(batches)
