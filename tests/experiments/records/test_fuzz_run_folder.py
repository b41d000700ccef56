"""Damaged run folders and checkpoints: what is read of them is what was written, or a line says that it is not."""

import logging
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.experiments.support.damage import make_run, tiny, trial, whole_run

LONG_RUN = int(os.environ.get("AVSF_FUZZ_RUNS", "2000"))
FIRST_SEED = int(os.environ.get("AVSF_FUZZ_SEED", "0"))


def fuzz(tmp_path: Path, seeds: range, caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """Damage copies of a run folder, one way a seed; returns how often each thing came of it."""
    caplog.set_level(logging.WARNING)
    config, pristine = tiny(tmp_path), tmp_path / "pristine"
    make_run(pristine, config)
    expected = whole_run(pristine, config.run_dir, config)
    counts, silent = Counter[str](), []
    for seed in seeds:
        caplog.clear()
        what, outcome = trial(pristine, config.run_dir, config, seed, expected)
        if outcome == "silent" and caplog.records:
            outcome = "found"  # a warning says what is passed over
        if outcome == "silent":
            silent.append((seed, what))
        counts[outcome] += 1
    assert silent == []
    return counts


def test_damaged_run_folders_are_found_or_read_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = fuzz(tmp_path, range(24), caplog)
    assert counts["found"] > 8


@pytest.mark.slow
def test_many_damaged_run_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = fuzz(tmp_path, range(FIRST_SEED, FIRST_SEED + LONG_RUN), caplog)
    print(dict(counts))
    assert counts["found"] > LONG_RUN // 4
