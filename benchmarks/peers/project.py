"""This project's loader on a store or on plain files, with as many decoding processes as every way has."""

from collections.abc import Iterator
from typing import Any

from benchmarks.peers.clips import CLIP_FRAMES, FRAME_STEP
from benchmarks.peers.common import Clip, Settings
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.open import open_source


def loader_of(folder: str, settings: Settings, **keys: Any) -> TrainLoader:
    """The loader of a folder.

    Args:
        folder: a store or a folder of plain files. keys: of DataConfig, above the defaults.
    """
    split = "train" if "train" in (source := open_source(folder)).splits else "all"
    given = {"num_workers": settings.workers, "num_threads": settings.workers, "max_quarantined_share": 0.0} | keys
    config, spec = DataConfig(**given), ClipSpec(CLIP_FRAMES, FRAME_STEP)
    options = LoaderOptions(clips_per_batch=settings.clips)
    return TrainLoader(source.split(split), spec, config, options, seed=settings.seed)


def batches(folder: str, settings: Settings, **keys: Any) -> Iterator[Clip]:
    """Yield what the loader gives."""
    for batch in loader_of(folder, settings, **keys).batches():
        assert batch.frames is not None
        assert batch.log_mel is not None
        yield batch.frames, batch.log_mel
