"""Submissions to the EPIC-Kitchens action recognition challenge from score files of a verb and a noun model.

EPIC-Kitchens-55 takes a flat zip of seen.json (S1) and unseen.json (S2), EPIC-Kitchens-100 one of test.json. Each gives
for every segment a score of every verb and noun, and exactly 100 actions. The server turns verb and noun scores into
probabilities by a softmax, so they are written as logarithms of ours.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.score_files import ScoreFile, ScoreFileError, aligned
from experiments.tasks.combining import best_actions
from pipeline.store.durable import write_file

ACTIONS = 100
LEAST = 1e-12  # of a probability, whose logarithm is written
MEMBERS = {"55": ("seen.json", "unseen.json"), "100": ("test.json",)}
CLASSES = {"55": (125, 352), "100": (97, 300)}


def submission(verb: ScoreFile, noun: ScoreFile, edition: str, levels: tuple[int, int, int] = (0, 0, 0)) -> Any:
    """Return one file of a submission as JSON's types.

    Args:
        verb, noun: about the same samples, whose ids are the segments' (uid, or narration_id for 100).
        edition: "55" or "100".
        levels: EPIC-Kitchens-100: supervision by pretraining, training labels, training data, 0 to 5 each.

    Raises:
        ScoreFileError: other samples in the two files, or another number of classes than the edition's.
    """
    for file, classes, kind in zip((verb, noun), CLASSES[edition], ("verb", "noun"), strict=True):
        if len(file.class_names) != classes or file.facts["label_set"] != kind:
            raise ScoreFileError(
                f"score file ({file.name}) holds {len(file.class_names)} classes of label set "
                f"{file.facts['label_set']!r} and must hold the {classes} of {kind!r} of EPIC-Kitchens-{edition}; "
                "give the verb file, then the noun file"
            )
    (verb, noun), _ = aligned([verb, noun])
    results = {}
    for row, name in enumerate(verb.ids):
        actions = best_actions(verb.scores[row], noun.scores[row], ACTIONS)
        results[name] = {
            "verb": _by_class(verb.scores[row]),
            "noun": _by_class(noun.scores[row]),
            "action": {f"{v},{n}": score for v, n, score in actions},
        }
    head: dict[str, Any] = {"version": "0.1" if edition == "55" else "0.2", "challenge": "action_recognition"}
    if edition == "100":
        head |= dict(zip(("sls_pt", "sls_tl", "sls_td"), levels, strict=True))
    return head | {"results": results}


def _by_class(scores: Any) -> dict[str, float]:
    return {str(label): float(value) for label, value in enumerate(np.log(np.maximum(scores, LEAST)))}


def write_submission(path: Path, members: Mapping[str, Any]) -> None:
    """Write the archive, whole or not at all; equal content gives equal bytes.

    Args:
        path: of the .zip file, replaced if there.
        members: name -> what `submission` gave.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, json.dumps(content, allow_nan=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getbuffer())
