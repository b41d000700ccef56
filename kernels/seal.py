"""What is known of a built library, in a JSON file beside it, so that damage shows before the library is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["SealError", "notes_path", "read_seal", "seal"]


class SealError(ValueError):
    """The file is not what was written: the message says how."""


def notes_path(path: Path) -> Path:
    """Where the notes of a file are: libx.so has libx.json."""
    return path.with_suffix(".json")


def seal(path: Path, notes: dict[str, Any]) -> None:
    """Write notes beside a file, with its size and digest.

    Args:
        path: the finished file.
        notes: what JSON can hold, without the keys "bytes" and "sha256".
    """
    data = path.read_bytes()
    known = notes | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    notes_path(path).write_text(json.dumps(known, sort_keys=True) + "\n", encoding="utf-8")


def read_seal(path: Path) -> dict[str, Any]:
    """The notes of a file, after its digest was checked (5 MB: about 5 ms).

    Args:
        path: the file.

    Returns:
        the notes that `seal` was given.

    Raises:
        SealError: no readable notes, a file of another size (cut off, or of other origin), or other contents.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    try:
        known = json.loads(notes_path(path).read_text(encoding="utf-8"))
        size, digest = known.pop("bytes"), known.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise SealError("it is cut off or comes from another build") from None
    if len(data) != size:
        raise SealError("it is cut off or comes from another build")
    if hashlib.sha256(data).hexdigest() != digest:
        raise SealError("it is damaged")
    return dict(known)
