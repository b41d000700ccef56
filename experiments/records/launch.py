"""Which launch a process belongs to: a launch that starts its processes again must never start a training afresh."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import torch.distributed as dist

from experiments.cli.files import read_json_file
from experiments.runtime import Runtime
from pipeline.store.durable import write_file

LAUNCH_NAME = ".launch"
log = logging.getLogger(__name__)


def agent() -> str:
    """Return what identifies the process of torchrun that started this one: host, process, its start; empty if none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = "?"
    return f"{socket.gethostname()}/{parent}/{started}"


def agents(runtime: Runtime) -> list[str]:
    """Return the agents of all ranks, of each node one."""
    found: list[str] = [agent()]
    if runtime.world_size > 1:
        found = [""] * runtime.world_size
        dist.all_gather_object(found, agent(), group=runtime.control)
    return sorted(set(found) - {""})


def restarts() -> int:
    """Return how often torchrun or SLURM started this job again; 0 at its first start."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return max(int(value) if (value := os.environ.get(name, "")).isdigit() else 0 for name in names)


def is_restart(folder: Path, present: list[str]) -> bool:
    """Return whether an earlier start of the launch that goes on now may have used a run folder.

    Args:
        folder: of the run.
        present: agents of this start.
    """
    if restarts() > 0:
        return True
    path = folder / LAUNCH_NAME
    try:
        found = read_json_file(path)
        recorded = found.get("agents") if isinstance(found, dict) else None
        if not isinstance(recorded, list) or not all(isinstance(each, str) for each in recorded):
            raise ValueError("it must hold the list of agents")
    except FileNotFoundError:
        return False
    except ValueError as error:
        if not present:
            return False  # no launcher that could have started this process before
        log.warning(
            "%s is damaged (%s): this launch may have used the folder before, so nothing is moved aside; delete the "
            "file to start afresh", path, error,
        )  # fmt: skip
        return True
    return bool(set(recorded) & set(present))


def record_launch(folder: Path, present: list[str]) -> None:
    """Write down which launch uses a run folder.

    Args:
        folder: of the run.
        present: agents of this start.
    """
    write_file(folder / LAUNCH_NAME, json.dumps({"agents": present}) + "\n")
