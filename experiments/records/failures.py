"""Failures of the starts of one launch: the same one twice is not tried a third time."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from experiments.cli.files import read_json_file
from experiments.runtime import Runtime
from pipeline.store.durable import write_file

FOLDER = "failures"
_KEPT = 10
log = logging.getLogger(__name__)


def record_failure(folder: Path, rank: int, step: int, text: str, agents: Sequence[str]) -> None:
    """Write down why this rank ended; never raises.

    Args:
        folder: of the run; a rank of another machine makes its own.
        rank: of this process.
        step: steps done.
        text: with rank, step, clips and exception; equal for equal failures.
        agents: of this launch, see `experiments.records.launch`.
    """
    path = folder / FOLDER / f"rank-{rank}.json"
    entry = {"step": step, "text": text, "agents": list(agents)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps([*_read(path), entry][-_KEPT:], indent=1) + "\n")


def repeated_failure(folder: Path, runtime: Runtime, step: int, agents: Sequence[str]) -> str:
    """Return the failure that ended the last two starts of this launch alike, on whichever rank; empty if none did.

    Args:
        folder: of the run.
        runtime: of this process; all ranks call it.
        step: at which this start takes over; failures before it are overcome.
        agents: of this launch; other launches do not count.
    """
    path = folder / FOLDER / f"rank-{runtime.rank}.json"
    entries = [e for e in _read(path) if set(e["agents"]) & set(agents) and e["step"] >= step][-2:]
    own = entries[0]["text"] if len(entries) == 2 and entries[0]["text"] == entries[1]["text"] else ""
    found: list[str] = [own]
    if runtime.world_size > 1:
        found = [""] * runtime.world_size
        dist.all_gather_object(found, own, group=runtime.control)
    return next((text for text in found if text), "")


def end_launcher() -> None:
    """Ask torchrun, when this process has said why it ends, to end as well instead of starting it again."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        atexit.register(os.kill, os.getppid(), signal.SIGTERM)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file; one that is damaged is named and counts as none."""
    try:
        found = read_json_file(path)
        if not isinstance(found, list) or not all(map(_is_entry, found)):
            raise ValueError("it must be a list of failures with step, text and agents")
    except FileNotFoundError:
        return []
    except ValueError as error:
        log.warning("%s is damaged (%s): failures of earlier starts are not known", path, error)
        return []
    return found


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and isinstance(value.get("text"), str)
        and isinstance(value.get("agents"), list)
        and all(isinstance(agent, str) for agent in value["agents"])
    )
