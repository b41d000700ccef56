"""Data sets with known answers, made on first use, really encoded; `factorial` and `events` say what they show."""

from pathlib import Path

from pipeline.synthetic.events import EventSpec, ensure_event_store
from pipeline.synthetic.factorial import SyntheticSpec, ensure_store, make_store
from pipeline.synthetic.parts import Progress

__all__ = ["SPECS", "EventSpec", "SyntheticSpec", "ensure_event_store", "ensure_store", "make_store", "resolve"]

ROOT = Path("data")  # of all synthetic data sets
_MISLEADING = SyntheticSpec(
    num_classes=2, train_streams=200, val_streams=40, size_px=32, codec="h264", rule="sight", agreement=(0.8, 0.5)
)
SPECS: dict[str, SyntheticSpec | EventSpec] = {
    "synthetic:quickstart": SyntheticSpec(),
    "synthetic:quickstart-h264": SyntheticSpec(codec="h264"),
    "synthetic:events": EventSpec(),
    "synthetic:events-apart": EventSpec(together=False),  # its control
    "synthetic:misleading-sound": _MISLEADING,
}


def resolve(path: str, progress: Progress | None = None) -> str:
    """Turn the name of a synthetic data set (`SPECS`) into a store's folder below `ROOT`, made if absent.

    Args:
        path: `data.path`; one that is no such name stays.
        progress: Called with streams done and streams in all.

    Raises:
        ValueError: an unknown synthetic data set.
    """
    if not path.startswith("synthetic:"):
        return path
    spec = SPECS.get(path)
    if spec is None:
        raise ValueError(f"data.path ({path}) must be one of {', '.join(SPECS)} or the folder of a store")
    if isinstance(spec, EventSpec):
        return str(ensure_event_store(ROOT, spec, progress))
    return str(ensure_store(ROOT, spec, progress))
