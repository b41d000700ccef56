"""The door to data: a store, a folder of plain videos, or a synthetic set made on first use, opened by its path."""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline import synthetic
from pipeline.config import DataConfig, data_path_problem
from pipeline.dataset import Dataset
from pipeline.folder.dataset import DescribeFiles, PlainFolder
from pipeline.folder.describe import describe
from pipeline.store.reader import Store
from pipeline.workers.confined import Confinement, call_confined
from pipeline.workers.machine import usable_cpus

log = logging.getLogger(__name__)
MOST_TOLD = 10  # files that are not used, each with its reason


class DataPathError(ValueError):
    """A path at which there is no data."""


def open_dataset(path: str | Path, split: str, *, num_threads: int = 4) -> Dataset:
    """Open one split of a data set.

    Args:
        path: A store (made by `python -m experiments.prepare`), a folder of plain videos, or `synthetic:quickstart`,
            which is made on first use in the folder `data`.
        split: Name of the split, such as train or val.
        num_threads: Plain videos that are looked at at a time.

    Raises:
        ValueError: no such data, damaged data, or no such split.
    """
    return open_source(resolve_path(path), num_threads=num_threads).split(split)


def open_source(path: str | Path, *, num_threads: int = 4, limits: Confinement | None = None) -> Store | PlainFolder:
    """Open a store, or a folder of plain videos, whose unusable and doubtful files are logged with the reason.

    Plain videos are looked at in child processes, so that one that crashes or hangs a decoder is refused alone.

    Args:
        path: As `resolve_path` returns it.
        num_threads: Plain videos that are looked at at a time.
        limits: What one of them may take; None: a minute, 1 GiB.

    Raises:
        ValueError: damaged data, or a folder without a usable video.
    """
    if (Path(path) / "store.json").exists():
        return Store.open(path)
    log.info("%s has no store.json: reading it as a folder of plain videos", path)
    folder = PlainFolder.open(path, describe_files=describe_confined(num_threads, limits))
    _warn_once(folder.path, folder.refused, " is not used")
    _warn_once(folder.path, folder.warnings, "")
    return folder


@functools.cache
def _warn_once(folder: Path, files: tuple[tuple[str, str], ...], what: str) -> None:
    """Say what is to be said of files of a folder, once: a folder is opened again for evaluations."""
    for name, reason in files[:MOST_TOLD]:
        log.warning("%s%s: %s", name, what, reason)
    if len(files) > MOST_TOLD:
        kinds = Counter(reason for _, reason in files[MOST_TOLD:])
        counts = ", ".join(f"{count} x {reason}" for reason, count in kinds.most_common(3))
        log.warning("%d more of %s%s: %s", len(files) - MOST_TOLD, folder, what and " are not used", counts)


def describe_confined(num_processes: int, limits: Confinement | None = None) -> DescribeFiles:
    """Return what looks at plain videos in child processes.

    Args:
        num_processes: At once, at most.
        limits: What one file may take; None: a minute, 1 GiB.
    """
    chosen = limits or Confinement()
    return lambda paths: call_confined(describe, paths, chosen, min(num_processes, usable_cpus()))


def limits_of(config: DataConfig) -> Confinement:
    """Return what a configuration allows one plain video."""
    return Confinement(memory_bytes=config.clip_memory_mib << 20, deadline_s=config.clip_deadline_s)


def resolve_path(path: str | Path) -> Path:
    """Return the folder of the data; a synthetic set is made if it is not there yet, with its progress in the log.

    Raises:
        DataPathError: nothing is named, or what is named is no folder.
        ValueError: an unknown synthetic set.
    """
    if problem := data_path_problem(str(path)):
        raise DataPathError(problem)
    return Path(synthetic.resolve(str(path), progress=_log_progress()))


def _log_progress() -> Callable[[int, int], None]:
    """Return a callback that logs every tenth of the way."""
    tenth = 0

    def progress(done: int, total: int) -> None:
        """Log when another tenth is done."""
        nonlocal tenth
        if done * 10 // max(1, total) > tenth:
            tenth = done * 10 // max(1, total)
            log.info("making the synthetic data set: %d of %d", done, total)

    return progress
