"""What a checkpoint's folder holds, written so that every byte counts: files with length and sha256, and its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.cli.files import read_json

FORMAT, VERSION = "avsf-checkpoint", 2
MOST_BYTES = 1 << 16
_MOST_STEPS = 10**12
_OWN = "manifest_sha256"  # over the manifest without this key; version 1 has none


class ManifestError(ValueError):
    """A manifest that is not what was written; the message is the reason."""


@dataclass(frozen=True)
class FileRecord:
    """Length and digest of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, data: memoryview) -> FileRecord:
        """Return the record of a content."""
        return cls(data.nbytes, hashlib.sha256(data).hexdigest())


def manifest_text(step: int, files: Mapping[str, FileRecord], version: int = VERSION) -> str:
    """Return the manifest of a checkpoint.

    Args:
        step: steps done.
        files: by name.
        version: 2; 1 is what was written before the manifest had a digest of its own.
    """
    content: dict[str, Any] = {"format": FORMAT, "version": version, "step": step}
    content["files"] = {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in files.items()}
    if version > 1:
        content[_OWN] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content, indent=1)


def read_manifest(data: bytes) -> tuple[int, dict[str, FileRecord]]:
    """Return step and files of a manifest.

    It must be, byte for byte, what `manifest_text` gives for its values: so the digest covers each of them, and what
    lies between them.

    Raises:
        ManifestError: it is not.
    """
    try:
        content = read_json(data)
        version, step, files = content["version"], content["step"], content["files"]
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ManifestError(f"version {str(version)[:20]}; this code reads versions 1 to {VERSION}")
        if type(step) is not int or not 0 <= step <= _MOST_STEPS:
            raise ManifestError(f"step {str(step)[:20]} must be a whole number from 0 on")
        records = {str(name): FileRecord(r["bytes"], r["sha256"]) for name, r in files.items()}
        if manifest_text(step, records, version).encode() != data:
            raise ManifestError("it is not what was written: a value and its digest differ")
    except ManifestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError((str(error).splitlines() or [type(error).__name__])[0][:120]) from None
    return step, records
