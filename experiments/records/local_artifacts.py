"""Artifacts of an MLflow that keeps its files on this machine: linked, so that a checkpoint takes its space once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit


def link_folder(source: Path, artifact_uri: str, folder: str) -> bool:
    """Put the files of a folder among the artifacts of a run as hard links, in place of what is there.

    Files that are replaced are removed first, never written into: they may be links to an earlier checkpoint.

    Args:
        source: folder of files that are never written to again, only replaced (a checkpoint).
        artifact_uri: of the run, as MLflow has it.
        folder: of the artifacts, such as "checkpoints/best".

    Returns:
        Whether all are there; False where the artifacts do not lie on this machine's file system, or where that has no
        hard links between the two places: what was there before is then gone, and the files can be copied.
    """
    parts = urlsplit(artifact_uri)
    if parts.scheme not in ("file", "") or parts.netloc or not parts.path:
        return False
    target = Path(unquote(parts.path) if parts.scheme else artifact_uri) / folder
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (target / name).unlink()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.link(source / name, target / name)
    except OSError:
        return False
    return True
