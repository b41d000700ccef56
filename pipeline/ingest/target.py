"""What may stand where a store goes: claims of interrupted runs, and leftovers of killed ones beside the target."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pipeline.annotations.rows import Annotations
from pipeline.ingest.item import IngestError, StoreShape, TranscodeSettings
from pipeline.ingest.journal import has_journal
from pipeline.store.durable import beside, move_folder, write_file
from pipeline.store.format import INFO_NAME
from pipeline.store.writer import check_target

CLAIM_NAME = "claim.json"


def inputs_digest(
    annotations: Annotations, keys: Mapping[str, str], settings: TranscodeSettings, shape: StoreShape
) -> str:
    """SHA-256 (hex) of all that a store is made of: data set, rows, classes, media (by their keys), settings, shape."""
    digest = hashlib.sha256()
    layout = {name: value for name, value in asdict(shape).items() if name != "overwrite"}
    classes = {name: list(values) for name, values in annotations.classes.items()}
    digest.update(json.dumps([annotations.dataset, classes, dict(keys), settings.to_json(), layout]).encode())
    for row in annotations.rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def write_claim(work: Path, store_sha256: str, inputs: str) -> None:
    """Note in a work folder, flushed, that the store with this store.json is about to get its name.

    Args:
        work: the work folder. store_sha256: of store.json. inputs: what `inputs_digest` gave.
    """
    write_file(work / CLAIM_NAME, json.dumps({"store": store_sha256, "inputs": inputs}))


def is_own(out: Path, work: Path, inputs: str) -> bool:
    """Whether the store at `out` is the one that a run of the same inputs finished just before it was killed."""
    try:
        claim = json.loads((work / CLAIM_NAME).read_text())
        found = hashlib.sha256((out / INFO_NAME).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return claim == {"store": found, "inputs": inputs}


def work_folder(out: Path) -> Path:
    """Return where a run keeps what it has finished: beside the store. Raises IngestError for a path without a name."""
    out = Path(os.path.abspath(out))  # "." has a name as well
    if not out.name:
        raise IngestError(f"target ({out}) must be a folder that can be made; name a new one, for example stores/x")
    return out.with_name(f"{out.name}.work")


def unwritable_parent(path: Path) -> Path | None:
    """Return what is in the way of making `path`: its nearest parent that exists, if that is no writable folder."""
    path = path.absolute()
    parent = next((parent for parent in path.parents if os.path.exists(parent)), path)  # False where it may not look
    return None if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) else parent


def check_free(out: Path, work: Path, overwrite: bool) -> None:
    """Raise before any work if the store could not get its name in the end.

    Raises:
        IngestError: nothing can be written there, or a store is there and overwriting was not asked for.
        StoreError: something else is there.
    """
    if parent := unwritable_parent(work):
        raise IngestError(f"{work}: the folder beside the target must be writable, {parent} is not; choose another")
    if (out / INFO_NAME).is_file() and not overwrite:
        kept = f"; what is finished stays in {work}" if has_journal(work) else ""
        raise IngestError(f"{out}: target must not exist; choose another path or pass --overwrite{kept}")
    check_target(out, overwrite)


def check_room(out: Path, size_bytes: int, work: Path) -> None:
    """Raise before the store is written if the disk has no room for it.

    Args:
        out: the target. size_bytes: of the media that go into it. work: where they lie till then.
    Raises:
        IngestError: too little is free.
    """
    free = shutil.disk_usage(out.parent).free
    if free < size_bytes:
        raise IngestError(
            f"{out.parent}: free space ({free / 2**20:,.0f} MiB) must be at least {size_bytes / 2**20:,.0f} MiB, the "
            f"store's size; make room there and run the same command again: finished files stay in {work}"
        )


def tidy(out: Path) -> None:
    """Clear what killed runs left beside a target; call it only with the lock of the target's work folder.

    A store that was moved aside to be replaced comes back if nothing has taken its place.
    """
    for old in _left_over(out, "old"):
        if not out.exists() and (old / INFO_NAME).is_file():
            move_folder(old, out)
        else:
            shutil.rmtree(old)
    for partial in _left_over(out, "partial"):
        shutil.rmtree(partial)
    beside(out.with_name(f"{out.name}.report.json"), "partial").unlink(missing_ok=True)


def _left_over(out: Path, kind: str) -> list[Path]:
    rule = re.compile(rf"\.{re.escape(out.name)}\.\d+-\d+\.{kind}")
    found = [path for path in out.parent.iterdir() if rule.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())
