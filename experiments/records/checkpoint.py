"""Checkpoints that are whole or absent: temporary folder, fsync, sha256 manifest, rename; verified before use.

Layout: checkpoints/step-00001000/{state.pt, config.yaml, manifest.json}; `best` is a folder of the same form.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.cli.files import read_regular
from experiments.records.finite import few, not_finite, tensors_of
from experiments.records.manifest import MOST_BYTES, FileRecord, ManifestError, manifest_text, read_manifest
from experiments.records.state import CheckpointError, load_state, no_memory
from pipeline.store.durable import put_folder

_MOST_STATE_BYTES, _MOST_CONFIG_BYTES = 1 << 40, 1 << 20
STATE, CONFIG, MANIFEST, BEST = "state.pt", "config.yaml", "manifest.json", "best"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"
_verified: dict[Path, list[tuple[int, int, int]]] = {}  # inode, length and time of each file when it was verified
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Args:
        path: its folder.
        step: steps done.
        state: bytes of state.pt.
        config: text of its configuration.
    """

    path: Path
    step: int
    state: bytes
    config: str

    def load(self) -> dict[str, Any]:
        """Return the state; only tensors, numbers, texts and containers are accepted (no code runs)."""
        return load_state(self.state, str(self.path / STATE))


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], config_yaml: str, *, keep: int) -> Path:
    """Write a checkpoint so that a crash at any point leaves either the whole or nothing under its name.

    Args:
        folder: checkpoints/ of the run.
        step: steps done.
        state: tensors and plain values.
        config_yaml: resolved configuration.
        keep: newest checkpoints to keep, >= 1.

    Returns:
        Its path.

    Raises:
        OSError: disk full, read-only, no memory for a copy of the state; older checkpoints and the folder are then as
            before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        contents = {STATE: buffer.getbuffer(), CONFIG: memoryview(config_yaml.encode())}
        files = {name: _write(temporary / name, data) for name, data in contents.items()}
        _write(temporary / MANIFEST, memoryview(manifest_text(step, files).encode()))
        put_folder(temporary, final)  # in place of a damaged one of the same step
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except MemoryError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(errno.ENOMEM, "there is no memory for a copy of the state", str(final)) from None
    _verify_written(final)
    _retain(folder, step, keep)
    return final


def _verify_written(path: Path) -> None:
    """Read a new checkpoint back, before an older one goes for it; raises OSError where it is not what was written."""
    for name in (STATE, CONFIG, MANIFEST):
        _drop_from_cache(path / name)
    if not _is_whole(path):
        raise OSError(errno.EIO, f"{path} was read back after writing and is damaged")


def _drop_from_cache(path: Path) -> None:
    """Have the next read come from the disk; what was flushed may go from memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _retain(folder: Path, newest: int, keep: int) -> None:
    """Delete what is not among the `keep` newest checkpoints that are whole; `newest` was verified a moment ago.

    Those with higher steps were passed over when this run began: they are damaged and count for nothing, but stay for
    whoever wants to look, until the run is there itself.
    """
    kept = 1
    for step, path in list_checkpoints(folder):
        if step < newest and kept < keep and _is_whole(path):
            kept += 1
        elif step < newest:
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint passes verification; one that was verified and has not been written to is not read again."""
    try:
        found = [(path / name).stat() for name in (STATE, CONFIG, MANIFEST)]
        state = [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]
        if _verified.get(path) != state:
            read_checkpoint(path)
            _verified[path] = state
    except (OSError, CheckpointError):
        return False
    return True


def mark_best(folder: Path, path: Path) -> Path:
    """Copy a checkpoint to `best` (hard links, no space) in place of the former best; return the new folder."""
    temporary, final = folder / f"{_TEMPORARY}{BEST}", folder / BEST
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in (STATE, CONFIG, MANIFEST):
        try:
            os.link(path / name, temporary / name)
        except OSError:  # a file system without hard links
            shutil.copy2(path / name, temporary / name)
    put_folder(temporary, final)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint folder, newest first; nothing is verified."""
    if not folder.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Args:
        path: folder with a manifest.

    Returns:
        The checkpoint, verified.

    Raises:
        CheckpointError: naming the file that is missing, of the wrong length or changed, or an unknown version.
    """
    step, files = _manifest_of(path)
    contents = {name: _verified_content(path, name, files, most) for name, most in
                ((STATE, _MOST_STATE_BYTES), (CONFIG, _MOST_CONFIG_BYTES))}  # fmt: skip
    return Checkpoint(path, step, contents[STATE], contents[CONFIG].decode())


def has_own_config(path: Path) -> bool:
    """Return whether the configuration in a checkpoint folder is what was written; its state is not read."""
    try:
        _verified_content(path, CONFIG, _manifest_of(path)[1], _MOST_CONFIG_BYTES)
    except CheckpointError:
        return False
    return True


def _manifest_of(path: Path) -> tuple[int, dict[str, FileRecord]]:
    """Return step and files of a checkpoint; raises CheckpointError where its manifest is not what was written."""
    try:
        step, files = read_manifest(read_regular(path / MANIFEST, MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"checkpoint {path} has no {MANIFEST}; give a folder like .../checkpoints/{BEST}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ManifestError as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged or of another version ({error})") from None
    named = _NAME.fullmatch(path.name)
    if named and int(named.group(1)) != step:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is of step {step}, which must be that of the folder's name"
        )
    return step, files


def _verified_content(path: Path, name: str, files: Mapping[str, FileRecord], most_bytes: int) -> bytes:
    """Return the content of a file of a checkpoint that is what the manifest says."""
    record = files.get(name)
    if record is None or len(files) != 2:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} must list {STATE} and {CONFIG}")
    try:
        data = read_regular(path / name, most_bytes)
    except MemoryError:
        raise CheckpointError(no_memory(f"{path}: {name}", record.bytes)) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error.strerror})") from None
    if FileRecord.of(memoryview(data)) != record:
        raise CheckpointError(f"checkpoint {path}: {name} is damaged (length or sha256 differs from {MANIFEST})")
    return data


def newest_valid(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that passes verification and is finite, or None if there is none at all.

    Says which ones it passes over.

    Raises:
        CheckpointError: with the list if checkpoints exist and none can be used.
    """
    problems = []
    for step, path in list_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
            _require_finite_state(checkpoint)
        except CheckpointError as error:
            log.warning("%s; falling back to the one before", error)
            problems.append(f"step {step}: {error}")
            continue
        return checkpoint
    if problems:
        listed = "; ".join(problems)
        raise CheckpointError(
            f"all {len(problems)} checkpoints in {folder} are damaged ({listed}); train.fresh=true starts again"
        )
    return None


def _require_finite_state(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a state with values that are nan or inf: that of a training that had diverged."""
    tensors = dict(tensors_of(checkpoint.load()))
    bad = not_finite(tensors)
    if bad:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} must be finite, but {len(bad)} of its {len(tensors)} tensors are not "
            f"({few(bad)}): the training had diverged"
        )


def find_checkpoint(target: Path, which: str = BEST) -> Checkpoint:
    """Return the checkpoint that a command names.

    Args:
        target: run folder or checkpoint folder.
        which: "best" (the newest where no best is marked) or "last".

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    if (target / MANIFEST).exists():
        return _read_named(target)
    folder = target / "checkpoints"
    if which == BEST and (folder / BEST).is_dir():
        return _read_named(folder / BEST)
    found = newest_valid(folder)
    if found is None:
        raise CheckpointError(f"{target} must hold a checkpoint{what_to_name(target)}")
    return found


def what_to_name(target: Path) -> str:
    """Return what lies at a path that holds no checkpoint and what to name instead, as the end of a message."""
    if target.is_file():
        whole = (target.parent / MANIFEST).exists()
        return f", not a file inside one; name its folder, {target.parent}" if whole else "; name a run folder"
    if any(target.glob("model.pt2")) or any(target.glob("model.onnx")):
        return (
            ", but is a model exported as program or onnx, which is complete in itself; name the run that it came "
            "from, or, to start a training, what experiments.export --format weights writes of that run"
        )
    if (target / "model.safetensors").exists():
        return (
            ", but is a model exported with --format weights; name the run that it came from "
            "(train.init_from and model.export.load_model take the exported folder)"
        )
    found = [path for _, path in list_checkpoints(target)] + [p for p in [target / BEST] if p.is_dir()]
    if found:
        return f", but is the folder of several; name the run ({target.parent}) or one of them ({found[0]})"
    runs = sorted(p.parent for p in target.glob("*/checkpoints") if p.is_dir())
    if runs:
        more = ", ..." if len(runs) > 3 else ""
        return f", but is the folder of {len(runs)} run(s); name one: {', '.join(map(str, runs[:3]))}{more}"
    return "; train first, or name a checkpoint folder"


def _read_named(path: Path) -> Checkpoint:
    """Read the checkpoint that the user named; one that cannot be used is an error that names another one."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        others = [other for _, other in list_checkpoints(path.parent) if other.resolve() != path.resolve()]
        remedy = f"name another one ({others[0]})" if others else "restore it from a copy, or train again"
        raise CheckpointError(f"{error}; {remedy}") from None


def _write(path: Path, data: memoryview) -> FileRecord:
    path.write_bytes(data)
    return FileRecord.of(data)
