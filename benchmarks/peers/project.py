"""This project's loader on a store or on plain files, with its defaults."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from benchmarks.peers.clips import CLIP_FRAMES, FRAME_STEP
from benchmarks.peers.common import Clip, Settings
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.open import open_source

WORKER_KEYS = ("num_workers", "num_processes", "workers")  # in the order of preference; not every release has one


def worker_key() -> str:
    """Name of the setting that says how many processes decode; empty where there is none."""
    names = {item.name for item in fields(DataConfig)}
    return next((key for key in WORKER_KEYS if key in names), "")


def loader_of(folder: str, settings: Settings, **keys: Any) -> TrainLoader:
    """The loader of a folder.

    Args:
        folder: a store or a folder of plain files. keys: of DataConfig, above the defaults.
    """
    split = "train" if "train" in (source := open_source(folder)).splits else "all"
    given = {"num_threads": settings.workers, "max_quarantined_share": 0.0} | keys
    config, spec = DataConfig(**given), ClipSpec(CLIP_FRAMES, FRAME_STEP)
    options = LoaderOptions(clips_per_batch=settings.clips)
    return TrainLoader(source.split(split), spec, config, options, seed=settings.seed)


def batches(folder: str, settings: Settings, **keys: Any) -> Iterator[Clip]:
    """Yield what the loader gives."""
    for batch in loader_of(folder, settings, **keys).batches():
        assert batch.frames is not None
        assert batch.log_mel is not None
        yield batch.frames, batch.log_mel
