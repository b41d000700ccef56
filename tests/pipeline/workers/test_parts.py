"""Parts of the workers without processes: CPUs, slots, claims."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import ClipPlan
from pipeline.source import HostClip, Unreadable
from pipeline.workers import machine
from pipeline.workers.child import whole_of
from pipeline.workers.machine import available_memory, cgroup_quotas, choose_num_workers
from pipeline.workers.ring import DONE, FREE, TAKEN, WANTED, Ring, RingMemoryError
from pipeline.workers.slots import REPLY_BYTES, Reply, SlotSpec, reply_of

PLAN = ClipPlan(7, 0, 1, "name", 1, 0.5, 1.0, (3, 5), 100, (), (32, 32), labels=(2,))
SPEC = SlotSpec(picture_bytes=2 * 16 * 8 * 3 // 2, num_audio_samples=50, with_negative=True)


class Again:
    """A planner that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def at(self, position: int, attempt: int) -> ClipPlan:
        """Return the plan."""
        self.asked.append((position, attempt))
        return PLAN


def test_quotas_of_control_groups_are_read(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    for folder, text in (("", "max 100000"), ("a", "150000 100000"), ("a/b", "400000 100000")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(text + "\n")
    assert sorted(cgroup_quotas(tmp_path, own)) == [1.5, 4.0]
    own.write_text("4:cpu,cpuacct:/c\n3:memory:/m\n")
    (tmp_path / "cpu" / "c").mkdir(parents=True)
    (tmp_path / "cpu" / "c" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quotas(tmp_path, own) == [2.5]
    assert cgroup_quotas(tmp_path, tmp_path / "none") == []


def test_memory_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    own, meminfo = tmp_path / "cgroup", tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert available_memory(tmp_path, tmp_path / "none", meminfo) == 500 * 1024
    own.write_text("0::/a\n")
    (tmp_path / "a").mkdir()
    for name, text in (("max", "400000"), ("current", "150000")):
        (tmp_path / "a" / f"memory.{name}").write_text(text)
    assert available_memory(tmp_path, own, meminfo) == 250_000
    (tmp_path / "a" / "memory.max").write_text("max")
    assert available_memory(tmp_path, own, meminfo) == 500 * 1024
    assert available_memory(tmp_path, own, tmp_path / "none") == 1 << 62


@pytest.mark.parametrize(
    ("line", "folder", "names", "stat"),
    [
        ("0::/a\n", "a", ("max", "current"), "anon 30000\ninactive_file 80000\nactive_file 20000\nshmem 20000\n"),
        ("3:memory:/a\n", "memory/a", ("limit_in_bytes", "usage_in_bytes"),
         "cache 1\ninactive_file 5\ntotal_cache 120000\ntotal_inactive_file 80000\ntotal_active_file 20000\n"),
    ],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_files_that_were_read_leave_their_memory_to_whoever_wants_it(
    line: str, folder: str, names: tuple[str, str], stat: str, tmp_path: Path
) -> None:
    """A control group counts them as used: after a day of reading there would be nothing left for the slots."""
    own, meminfo = tmp_path / "cgroup", tmp_path / "meminfo"
    own.write_text(line)
    meminfo.write_text("MemAvailable: 900 kB\n")
    (tmp_path / folder).mkdir(parents=True)
    for name, text in zip((*names, "stat"), ("200000", "150000", stat), strict=True):
        (tmp_path / folder / f"memory.{name}").write_text(text)
    assert available_memory(tmp_path, own, meminfo) == 150_000


@pytest.mark.parametrize(
    ("usable", "load", "ranks", "on_gpu", "workers"),
    [(16, 0.2, "1", True, 15), (16, 0.2, "4", True, 3), (16, 12.0, "1", True, 7), (16, 0.0, "1", False, 8),
     (2, 0.0, "1", False, 1), (2, 9.0, "1", False, 1), (2, 0.0, "1", True, 1), (1, 0.0, "1", True, 0),
     (200, 0.0, "1", True, 64)],
)  # fmt: skip
def test_workers_are_chosen_by_what_is_free(
    monkeypatch: pytest.MonkeyPatch, usable: int, load: float, ranks: str, on_gpu: bool, workers: int
) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: usable)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert choose_num_workers(-1, on_gpu=on_gpu, is_confined=False) == workers
    assert choose_num_workers(-1, on_gpu=on_gpu, is_confined=True) == max(1, workers)
    assert [choose_num_workers(n, on_gpu=on_gpu, is_confined=True) for n in (0, 3)] == [0, 3]


def test_a_clip_goes_through_a_slot() -> None:
    ring = Ring(SPEC, 3)
    slot, planner, rng = ring.slots[1], Again(), np.random.default_rng(0)
    luma, chroma = slot.planes(2, 8, 16)
    luma[:], chroma[:] = rng.integers(0, 256, luma.shape), rng.integers(0, 256, chroma.shape)
    audio, negative = (rng.integers(-99, 99, 50).astype(np.int16) for _ in range(2))
    clip = HostClip(
        PLAN, None, np.array([3, 5], np.int32), luma, chroma, slot.audio(audio), True, slot.negative(negative)
    )
    back = slot.read_reply(slot.write_reply(reply_of(clip)), planner, 7, 0)
    assert isinstance(back, HostClip)
    for name in ("frames", "luma", "chroma", "audio", "negative"):
        assert np.array_equal(getattr(back, name), getattr(clip, name))
    assert (back.plan, back.has_audio, back.encoded) == (PLAN, True, None)
    assert np.shares_memory(back.luma, ring.memory)
    clip = HostClip(PLAN, None, np.array([3, 5], np.int32), None, None, slot.audio(audio), False, None)
    back = slot.read_reply(slot.write_reply(reply_of(clip)), planner, 7, 0)
    assert isinstance(back, HostClip)
    assert (back.luma, back.chroma, back.negative) == (None, None, None)
    assert (back.frames.tolist(), back.has_audio) == ([3, 5], False)
    assert planner.asked == []
    ring.close()


def test_a_long_reply_leaves_out_the_plan() -> None:
    ring, planner = Ring(SPEC, 1), Again()
    slot = ring.slots[0]
    size = slot.write_reply(Reply(PLAN, reason="x" * 2 * REPLY_BYTES))
    assert size <= REPLY_BYTES
    found = slot.read_reply(size, planner, 7, 2)
    assert isinstance(found, Unreadable)
    assert (found.plan, found.reason, planner.asked) == (PLAN, "x" * 2000, [(7, 2)])
    size = slot.write_reply(Reply(None, error=KeyError("y" * 2 * REPLY_BYTES)))
    with pytest.raises(RuntimeError, match="KeyError: 'yyy"):
        slot.read_reply(size, planner, 7, 2)
    ring.close()


def test_the_lowest_wanted_job_is_claimed_first() -> None:
    ring = Ring(SPEC, 4)
    assert ring.claim(5) is None
    ring.jobs["state"] = [WANTED, FREE, WANTED, DONE]
    ring.jobs["sequence"] = [8, 1, 3, 2]
    assert [ring.claim(5), ring.claim(6), ring.claim(5)] == [2, 0, None]
    assert ring.jobs["state"].tolist() == [TAKEN, FREE, TAKEN, DONE]
    assert (ring.jobs["owner"][2], ring.jobs["owner"][0]) == (5, 6)
    ring.close()


def test_slots_beyond_all_memory_are_refused_in_words() -> None:
    spec = SlotSpec(picture_bytes=1 << 60, num_audio_samples=1, with_negative=False)
    with pytest.raises(RingMemoryError, match=r"shared memory for clips \(\d+ MiB\) cannot be had.*data.num_workers=0"):
        Ring(spec, 8)


def test_a_worker_of_other_code_says_so() -> None:
    """Workers are started anew during a run: with the code that is on the disk then."""
    ours = Ring(SPEC, 3)
    with pytest.raises(
        ValueError, match=r"slots for clips \(\d+ bytes\) must be those .*the code was changed while a run"
    ):
        Ring(SPEC, 4, ours.descriptor)
    assert Ring(SPEC, 3, ours.descriptor).memory.nbytes == ours.memory.nbytes
    ours.close()


def test_slots_keep_apart() -> None:
    ring = Ring(SPEC, 2)
    for number, slot in enumerate(ring.slots):
        for array in (
            *slot.planes(2, 8, 16),
            slot.audio(np.zeros(50, np.int16)),
            slot.negative(np.zeros(50, np.int16)),
        ):
            array[:] = number + 1
        slot.write_reply(Reply(PLAN))
    for number, slot in enumerate(ring.slots):
        luma, chroma = slot.planes(2, 8, 16)
        assert set(luma.flat) == set(chroma.flat) == {number + 1}
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC
    assert SPEC.slot_bytes % 4096 == 0
    ring.close()


def test_workers_that_start_together_read_the_set_up_each_for_itself() -> None:
    """They have one open file, with one position: whoever moves it takes bytes from another."""
    setup = os.memfd_create("setup")
    try:
        os.write(setup, pickle.dumps(bytes(100_000)))
        at = os.lseek(setup, 0, os.SEEK_CUR)
        assert pickle.loads(whole_of(setup)) == bytes(100_000)
        assert os.lseek(setup, 0, os.SEEK_CUR) == at > 100_000
    finally:
        os.close(setup)
