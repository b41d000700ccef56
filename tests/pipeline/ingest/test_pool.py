"""Children that crash, hang or take too much memory cost one file each; the batch goes on."""

import os
import resource
from pathlib import Path

import pytest

from pipeline.ingest.item import IngestError, TranscodeSettings
from pipeline.ingest.pool import Job, Pool
from tests.pipeline.support import media_zoo as zoo

pytestmark = pytest.mark.integration
NAMES = ("good0.mp4", "segv.mp4", "good1.mp4", "hang.mp4", "abort.mp4", "exit.mp4", "leak.mp4", "bug.mp4", "good2.mp4")


def jobs(folder: Path, names: tuple[str, ...], deadline_s: float) -> list[Job]:
    zoo.make(folder / "good.mp4", seconds=0.2, audio=None)
    for name in names:
        os.link(folder / "good.mp4", folder / name)
    return [Job(n, folder / name, folder / f"{name}.item", deadline_s) for n, name in enumerate(names)]


def test_each_failure_costs_one_file(tmp_path: Path) -> None:
    pool = Pool(2, TranscodeSettings(), 2**30, module="tests.pipeline.support.odd_worker")
    done = {result.job.path.name: result for result in pool.run(jobs(tmp_path, NAMES, 3.0))}
    assert len(done) == len(NAMES)
    reasons = {name: result.item.refused for name, result in done.items()}
    assert reasons == {
        "good0.mp4": "",
        "good1.mp4": "",
        "good2.mp4": "",
        "segv.mp4": "decoder crashed (signal SIGSEGV)",
        "abort.mp4": "decoder crashed (signal SIGABRT)",
        "exit.mp4": "decoder crashed (exit code 7)",
        "bug.mp4": "decoder crashed (exit code 1: KeyError: 'of our own')",
        "hang.mp4": "decoding took longer than the deadline of 3 s",
        "leak.mp4": "decoding needs more memory than the limit allows",
    }
    assert {name for name, result in done.items() if result.item.for_resources} == set(NAMES) - {
        f"good{n}.mp4" for n in range(3)
    }
    assert 3.0 <= done["hang.mp4"].wall_s < 6.0
    assert not list(tmp_path.glob("*.partial"))
    assert sorted(p.name for p in tmp_path.glob("*.item")) == ["good0.mp4.item", "good1.mp4.item", "good2.mp4.item"]


def test_full_disk_stops_with_a_remedy(tmp_path: Path) -> None:
    pool = Pool(1, TranscodeSettings(), 2**30, module="tests.pipeline.support.odd_worker")
    with pytest.raises(IngestError, match="No space left on device; make room there and run again"):
        list(pool.run(jobs(tmp_path, ("full.mp4", "good1.mp4"), 30.0)))


def test_memory_limit_and_workers_are_checked() -> None:
    with pytest.raises(IngestError, match=r"memory \(50000000 bytes\) must be at least 134217728"):
        Pool(1, TranscodeSettings(), 50_000_000)
    with pytest.raises(IngestError, match=r"workers \(0\) must be at least 1"):
        Pool(0, TranscodeSettings(), 2**30)


def test_large_pictures_meet_the_memory_limit_not_the_machine(tmp_path: Path) -> None:
    zoo.make(tmp_path / "large.mp4", audio=None, seconds=0.16, size=(4096, 2304), video_options={"preset": "ultrafast"})
    job = Job(0, tmp_path / "large.mp4", tmp_path / "large.item", 60.0)
    small, large = (next(iter(Pool(1, TranscodeSettings(), limit).run([job]))).item for limit in (190 << 20, 2 << 30))
    assert small.refused, "must not fit in 190 MiB"
    assert large.refused == ""
    assert large.num_frames == 4


def test_slow_file_meets_its_deadline(tmp_path: Path) -> None:
    zoo.make(tmp_path / "long.mp4", audio=None, seconds=40, size=(320, 240), video_options={"preset": "ultrafast"})
    job = Job(0, tmp_path / "long.mp4", tmp_path / "long.item", 0.2)
    result = next(iter(Pool(1, TranscodeSettings(), 2 << 30).run([job])))
    assert result.item.refused == "decoding took longer than the deadline of 0.2 s"
    assert result.wall_s < 5
    assert not list(tmp_path.glob("long.item*"))


def test_descriptors_beyond_1024_are_waited_for(tmp_path: Path) -> None:
    """As those of a few hundred workers are: `select` takes none of them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 1200:
        pytest.skip(f"at most {before[1]} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 1200), before[1]))
    held = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while held[-1] < 1030:
            held.append(os.open("/dev/null", os.O_RDONLY))
        pool = Pool(1, TranscodeSettings(), 2**30)
        (done,) = pool.run(jobs(tmp_path, ("good0.mp4",), 60.0))
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (done.item.refused, done.item.num_frames) == ("", 5)
