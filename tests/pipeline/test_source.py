"""What the clip source calls sound: windows of nothing but zeros have none. Which reads it calls stalled."""

import concurrent.futures
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.media.reading import OPEN_READS, ReadStalled
from pipeline.source import STOPPED_S, HostClip, Unreadable, Wanted, read_sound, wait_for_clip
from tests.pipeline.support.stores import noise, numbered_frames, write_store


def test_windows_of_zeros_have_no_audio(tmp_path: Path) -> None:
    track = np.concatenate([np.zeros(16_000, np.int16), noise(0.5)])  # late sound that ends early
    split = write_store(tmp_path / "s", [("a", numbered_frames(3), track)])
    wanted = Wanted(8_000, "cpu")
    starts = {-9_000: False, 0: False, 8_000: False, 8_001: True, 16_000: True, 23_999: True, 24_000: False}
    for start, has_audio in starts.items():
        samples, found = read_sound(split, 0, start, wanted)
        assert (len(samples), found) == (8_000, has_audio)
        assert samples.any() == has_audio


@pytest.mark.parametrize("was_stopped", [True, False])
def test_a_read_is_not_judged_by_the_time_that_its_process_slept(
    monkeypatch: pytest.MonkeyPatch, was_stopped: bool
) -> None:
    """As by Ctrl-Z, or where a cluster suspends jobs: the wait itself lasts longer than it was to last."""
    clip: Future[HostClip | Unreadable] = Future()
    read = HostClip.__new__(HostClip)
    waits: list[float] = []

    def wait(futures: Sequence[Future[Any]], timeout: float) -> Any:
        waits.append(timeout)
        if len(waits) == 1:
            time.sleep(timeout + STOPPED_S + 0.1 if was_stopped else timeout)
        else:
            clip.set_result(read)
        return concurrent.futures.wait(futures, timeout=0.0)

    monkeypatch.setattr("pipeline.source.wait", wait)
    with OPEN_READS.of(Path("shard"), 7):
        time.sleep(0.05)
        if was_stopped:
            assert wait_for_clip(clip, 0.04) is read
        else:
            with pytest.raises(ReadStalled, match=r"read of shard at byte 7 has not returned"):
                wait_for_clip(clip, 0.04)
    assert waits == [0.01] * (2 if was_stopped else 1)
