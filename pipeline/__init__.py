"""Media on disk -> `Batch` on the device: `TrainLoader(open_dataset("store", "train"), ClipSpec.for_model(config))`.

Names are imported when they are used: `import pipeline` alone loads nothing, so that a worker that writes a store has
neither torch nor DALI in its memory.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.batch import Batch
    from pipeline.clip import ClipSpec
    from pipeline.config import DataConfig, ViewConfig
    from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
    from pipeline.open import open_dataset

__all__ = [
    "Batch",
    "ClipSpec",
    "DataConfig",
    "EvalLoader",
    "LoaderOptions",
    "TrainLoader",
    "ViewConfig",
    "open_dataset",
]

if not TYPE_CHECKING:  # a checker shall find wrong names
    _PLACES = {
        "Batch": "batch",
        "ClipSpec": "clip",
        "DataConfig": "config",
        "EvalLoader": "loader",
        "LoaderOptions": "loader",
        "TrainLoader": "loader",
        "ViewConfig": "config",
        "open_dataset": "open",
    }

    def __getattr__(name):
        """Import a public name on first use (PEP 562)."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return value

    def __dir__():
        """The public names as well."""
        return sorted({*globals(), *__all__})
