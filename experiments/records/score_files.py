"""Score files: what a model said about every sample of a split, to be combined later (`experiments.combine`).

A numpy archive (.npz) of arrays without pickles, the same bytes for the same content. V samples, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.tasks.metrics import FloatArray, IntArray
from pipeline.ingest.target import unwritable_parent
from pipeline.store.durable import new_file

if TYPE_CHECKING:  # with torch behind it
    from experiments.tasks import SampleScores

SUFFIX, FORMAT, VERSION = ".npz", "avslowfast-scores", 1
_ARRAYS = ("ids", "labels", "scores", "views", "silent", "class_names")
_FACTS = ("task", "label_set", "split", "data_fingerprint", "reduction")


class ScoreFileError(ValueError):
    """A score file that cannot be read, written, or used together with another."""


@dataclass(frozen=True)
class ScoreFile:
    """Content of a score file.

    Args:
        name: for messages, the path.
        ids: V unique names of samples, in the order of the split; unreadable samples are absent.
        labels: (V,) int64, -1 where there is none; or (V, K) float64 multi-hot.
        scores: (V, K) float64 in 0..1, finite.
        views: (V,) int64, scored views.
        silent: (V,) int64, those without sound.
        class_names: K.
        facts: task, label_set, split, data_fingerprint, reduction, and whatever the writer adds.
    """

    name: str
    ids: tuple[str, ...]
    labels: IntArray | FloatArray
    scores: FloatArray
    views: IntArray
    silent: IntArray
    class_names: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, chosen: IntArray) -> ScoreFile:
        """Return the same with the samples at `chosen` (W,) in that order."""
        arrays = {name: getattr(self, name)[chosen] for name in ("labels", "scores", "views", "silent")}
        return dataclasses.replace(self, ids=tuple(self.ids[i] for i in chosen.tolist()), **arrays)


def score_file(samples: SampleScores, ids: Sequence[str], class_names: tuple[str, ...], **facts: Any) -> ScoreFile:
    """Return what an evaluation found as the content of a file.

    Args:
        samples: of its report.
        ids: of all samples of the split, by row.
        class_names: K.
        facts: task, label_set, split, data_fingerprint, and more.
    """
    names = tuple(ids[row] for row in samples.rows.tolist())
    facts = {**facts, "reduction": samples.reduction}
    return ScoreFile("", names, samples.labels, samples.scores, samples.views, samples.silent, class_names, facts)


def check_score_path(path: Path, fingerprint: str = "") -> None:
    """Check that a score file can be written: a .npz in a writable folder, absent or a score file about the same data.

    Args:
        path: of the file to come.
        fingerprint: of the split; empty = any earlier score file may be replaced.

    Raises:
        ScoreFileError: naming path and remedy.
    """
    if path.suffix != SUFFIX:
        raise ScoreFileError(f"score file ({path}) must end in {SUFFIX}; choose such a name")
    if parent := unwritable_parent(path):
        raise ScoreFileError(
            f"score file ({path}) must lie in a writable folder, {parent} is not; choose another place"
        )
    if not path.exists():
        return
    try:
        found = str(read_scores(path).facts["data_fingerprint"])
    except ScoreFileError as error:
        raise ScoreFileError(
            f"score file ({path}) must be absent or an earlier score file, and is neither; choose another name"
        ) from error
    if fingerprint and found != fingerprint:
        raise ScoreFileError(
            f"score file ({path}) must not be one about other data (fingerprint {found[:16]}, now "
            f"{fingerprint[:16]}); choose another name, or remove it"
        )


def write_scores(path: Path, content: ScoreFile) -> None:
    """Write a score file, whole or not at all, flushed to the disk.

    Args:
        path: replaced if there; its folder is made.
        content: equal content gives equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(getattr(content, name)) for name in _ARRAYS}
    header = json.dumps({"format": FORMAT, "version": VERSION, **content.facts}, sort_keys=True)
    with new_file(path) as file:
        np.savez(file, header=np.asarray(header), **arrays)  # type: ignore[arg-type]


def read_scores(path: Path) -> ScoreFile:
    """Read and check a score file.

    Raises:
        ScoreFileError: no such file, another format or version, arrays that do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            arrays = {name: archive[name] for name in _ARRAYS}
    except FileNotFoundError:
        raise ScoreFileError(f"score file ({path}) must exist; evaluate --scores writes one") from None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = (
            f"{type(error).__name__}: {error}" if path.is_file() and zipfile.is_zipfile(path) else "it is no archive"
        )
        raise ScoreFileError(f"score file ({path}) must be one that evaluate --scores wrote ({reason})") from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ScoreFileError(
            f"score file ({path}) has format {found[0]} version {found[1]}; it must be {FORMAT} version {VERSION}: "
            "make it anew with evaluate --scores"
        )
    ids, names = tuple(arrays.pop("ids").tolist()), tuple(arrays.pop("class_names").tolist())
    facts = {key: value for key, value in header.items() if key not in ("format", "version")}
    content = ScoreFile(str(path), ids, class_names=names, facts=facts, **arrays)
    _check(content)
    return content


def _check(content: ScoreFile) -> None:
    """Raise unless the arrays fit each other."""
    count, classes, name = len(content.ids), len(content.class_names), content.name
    scores, labels = content.scores, content.labels
    rules = {
        f"scores {scores.shape} {scores.dtype}": (
            scores.shape == (count, classes) and scores.dtype == np.float64,
            f"be ({count}, {classes}) float64",
        ),
        "scores": (bool(np.isfinite(scores).all()), "be finite"),
        f"labels {labels.shape} {labels.dtype}": (
            (labels.shape == (count,) and labels.dtype == np.int64 and bool((labels < classes).all()))
            or (labels.shape == (count, classes) and labels.dtype == np.float64),
            f"be ({count},) int64 below {classes} or ({count}, {classes}) float64",
        ),
        f"views {content.views.shape}": (content.views.shape == (count,), f"be ({count},)"),
        f"silent {content.silent.shape}": (content.silent.shape == (count,), f"be ({count},)"),
        f"ids ({count})": (len(set(content.ids)) == count, "be unique"),
        f"facts {sorted(content.facts)}": (set(_FACTS) <= set(content.facts), f"hold {', '.join(_FACTS)}"),
    }
    for what, (holds, rule) in rules.items():
        if not holds:
            raise ScoreFileError(f"score file ({name}): {what} must {rule}; make it anew with evaluate --scores")


def aligned(files: Sequence[ScoreFile], *, common: bool = False) -> tuple[list[ScoreFile], str]:
    """Return files about the same samples, in the order of the first one.

    Args:
        files: at least one.
        common: keep the samples that all of them have; else they must all have the same.

    Returns:
        the files, and a sentence about what was left out, empty if nothing was.

    Raises:
        ScoreFileError: the samples differ, or are none.
    """
    sets = [set(file.ids) for file in files]
    shared, every = set.intersection(*sets), set.union(*sets)
    note = ""
    if shared != every:
        missing = {file.name: sorted(every - own) for file, own in zip(files, sets, strict=True) if every - own}
        shown = "; ".join(f"{name} lacks {len(ids)}, the first is {ids[0]}" for name, ids in missing.items())
        if not common or not shared:
            raise ScoreFileError(
                f"score files must be about the same samples ({shown}); evaluate the same split, or pass --common to "
                "leave out what one of them lacks"
            )
        note = f"{len(every) - len(shared)} of {len(every)} samples are left out: {shown}"
    if not shared:
        raise ScoreFileError(f"score files ({', '.join(f.name for f in files)}) must hold samples, and hold none")
    order = [name for name in files[0].ids if name in shared]
    result = []
    for file in files:
        place = {name: row for row, name in enumerate(file.ids)}
        result.append(file.rows(np.array([place[name] for name in order], np.int64)))
    return result, note


def require_same_answers(files: Sequence[ScoreFile]) -> None:
    """Check that aligned files hold the same classes and labels, so that their scores may be added or compared.

    Raises:
        ScoreFileError: naming two of them and what differs.
    """
    first = files[0]
    for other in files[1:]:
        if other.class_names != first.class_names:
            raise ScoreFileError(
                f"score files {first.name} ({len(first.class_names)} classes) and {other.name} "
                f"({len(other.class_names)}) must have the same classes in the same order; use models of one label set"
            )
        if other.labels.shape != first.labels.shape or (other.labels != first.labels).any():
            raise ScoreFileError(
                f"score files {first.name} and {other.name} must have the same labels for the same samples; "
                "evaluate both on the same data"
            )
