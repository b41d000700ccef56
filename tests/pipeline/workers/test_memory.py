"""Memory of parent and workers stays as it is over thousands of clips of mixed sizes."""

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from pipeline.loader import LoaderOptions, TrainLoader
from tests.pipeline.support.recorded import picture
from tests.pipeline.support.stores import noise, write_store
from tests.pipeline.workers.test_workers import CONFIG, SPEC, children

CLIPS, BATCH = 10_000, 8
SIZES = [(128, 96), (96, 128), (64, 64), (256, 192), (320, 240), (144, 112)]


def resident_bytes(pids: set[int]) -> int:
    """Proportional set size of processes, shared memory counted once."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.mark.slow
def test_ten_thousand_clips_of_mixed_sizes_take_no_more_memory_than_two_thousand(tmp_path: Path) -> None:
    media = [(f"m{i}", [picture(i, f, *SIZES[i % 6]) for f in range(48)], noise(1.6, seed=i)) for i in range(24)]
    split = write_store(tmp_path / "s", media, codec="h264")
    before = children()
    batches = TrainLoader(split, SPEC, replace(CONFIG, num_workers=2), LoaderOptions(BATCH), seed=1).batches()
    seen: list[int] = []
    for number, _ in enumerate(islice(batches, CLIPS // BATCH + 1)):
        if number * BATCH % 1000 == 0:
            seen.append(resident_bytes({*(children() - before), os.getpid()}))
    batches.close()
    print([value >> 20 for value in seen])
    assert len(seen) == 11
    assert max(seen[2:]) <= 1.02 * seen[2]
