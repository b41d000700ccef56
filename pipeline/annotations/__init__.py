"""Readers of the official annotation files of each data set: files as downloaded -> rows with labels, and a report."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pipeline.annotations.ava import read_ava
from pipeline.annotations.charades import read_charades
from pipeline.annotations.epic_kitchens import read_epic55, read_epic100
from pipeline.annotations.folder import read_folder
from pipeline.annotations.hmdb51 import read_hmdb51
from pipeline.annotations.kinetics import read_kinetics
from pipeline.annotations.kinetics_sounds import read_kinetics_sounds
from pipeline.annotations.rows import AnnotationError, Annotations, Box, Report, Row, TimedLabel, confine
from pipeline.annotations.ucf101 import read_ucf101

__all__ = [
    "READERS",
    "AnnotationError",
    "Annotations",
    "Box",
    "Report",
    "Row",
    "TimedLabel",
    "confine",
    "options_of",
    "read",
]

#: Name on the command line -> reader, called as ``reader(annotations, videos, **options)``.
READERS: dict[str, Callable[..., Annotations]] = {
    "kinetics400": partial(read_kinetics, num_classes=400, dataset="kinetics400"),
    "kinetics600": partial(read_kinetics, num_classes=600, dataset="kinetics600"),
    "kinetics700": partial(read_kinetics, num_classes=700, dataset="kinetics700"),
    "kinetics_sounds": read_kinetics_sounds,
    "epic_kitchens55": read_epic55,
    "epic_kitchens100": read_epic100,
    "charades": read_charades,
    "ava": read_ava,
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
    "folder": read_folder,
}


def options_of(dataset: str) -> dict[str, str]:
    """Return option -> type and default of a data set's reader, as text (``min_score`` -> ``float = 0.8``).

    Raises:
        AnnotationError: unknown data set.
    """
    return {name: f"{p.annotation} = {p.default}" for name, p in _parameters(dataset).items()}


def read(dataset: str, annotations: Path | None, videos: Path, options: Mapping[str, str] | None = None) -> Annotations:
    """Run the reader of a data set with options as the command line gives them.

    Args:
        dataset: a name in ``READERS``.
        annotations: official file or folder; None for ``folder`` without a CSV.
        videos: folder of the videos.
        options: option -> value as text; see ``options_of``.
    Returns:
        Rows, class lists and report.
    Raises:
        AnnotationError: unknown data set or option, a value of the wrong type, or malformed annotations.
    """
    parameters = _parameters(dataset)
    values: dict[str, object] = {}
    for name, text in (options or {}).items():
        if name not in parameters:
            raise AnnotationError(
                f"option ({name}) must be one of {', '.join(parameters) or 'none at all'} for {dataset}"
                f"{_suggest(name, parameters)}"
            )
        values[name] = _convert(name, text, str(parameters[name].annotation))
    return READERS[dataset](annotations, videos, **values)


def _parameters(dataset: str) -> dict[str, inspect.Parameter]:
    if dataset not in READERS:
        raise AnnotationError(f"data set ({dataset}) must be one of {', '.join(READERS)}{_suggest(dataset, READERS)}")
    reader = READERS[dataset]
    bound = reader.keywords if isinstance(reader, partial) else {}
    found = inspect.signature(reader).parameters.items()
    return {name: p for name, p in found if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in bound}


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else "; see the page of the data set in docs/datasets"


def _convert(name: str, text: str, kind: str) -> object:
    kind = kind.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.strip().lower()]
        return {"int": int, "float": float, "str": str, "Path": Path}[kind](text)
    except (KeyError, ValueError) as problem:
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind, kind)
        raise AnnotationError(f"option {name} ({text}) must be {wanted}; correct it") from problem
