"""Notes and a digest appended to a file, so that one rename puts both in place and damage shows before it is loaded.

Layout: contents, notes as JSON, their length (8 bytes, little endian), SHA-256 of all that (32 bytes), MAGIC (8 bytes).
A program loader ignores what follows the last section of a shared library.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["SealError", "read_seal", "seal"]
MAGIC = b"AVSFSEAL"
_TAIL = 8 + 32 + len(MAGIC)


class SealError(ValueError):
    """The file is not what was written: the message says how."""


def seal(path: Path, notes: dict[str, Any]) -> None:
    """Append notes and the digest of contents and notes to a file.

    Args:
        path: a file without a seal.
        notes: what JSON can hold.
    """
    text = json.dumps(notes, sort_keys=True).encode()
    contents = path.read_bytes() + text + len(text).to_bytes(8, "little")
    path.write_bytes(contents + hashlib.sha256(contents).digest() + MAGIC)


def read_seal(path: Path) -> dict[str, Any]:
    """The notes of a sealed file, after its digest was checked (5 MB: about 15 ms).

    Args:
        path: the file.

    Returns:
        the notes that `seal` was given.

    Raises:
        SealError: no seal (cut off, or of other origin), or the contents changed.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if len(data) < _TAIL or not data.endswith(MAGIC):
        raise SealError("it is cut off or comes from another build")
    contents, digest = memoryview(data)[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 : -len(MAGIC)]
    if hashlib.sha256(contents).digest() != digest:
        raise SealError("it is damaged")
    end = len(contents) - 8
    notes: dict[str, Any] = json.loads(data[end - int.from_bytes(contents[end:], "little") : end])
    return notes
