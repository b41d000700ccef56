"""Damaged run folders: one bit, one piece, one file; and what reading them gives."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments.config import Config, config_digest, load_config, resolved_yaml
from experiments.engine.trained_model import load_target
from experiments.records.checkpoint import BEST, mark_best, newest_valid, save_checkpoint
from experiments.records.run_folder import check_run_folder, read_evaluations, read_summary, record_evaluations
from experiments.records.run_folder import write_summary as put_summary
from experiments.records.spool import Spool, read_metrics

# Read by people and by plots: no weight, no score and no choice of a checkpoint comes from them.
FOR_READING = ("summary.json", "metrics.jsonl", "log.txt")


def make_run(folder: Path, config: Config) -> None:
    """Write a run of two checkpoints, the first the best, as `Run` does, without training."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    for step in (1, 2):
        state = {"model": {"w": torch.full((5,), float(step))}, "step": step, "class_names": ["a", "b"]}
        path = save_checkpoint(folder / "checkpoints", step, state, resolved_yaml(config), keep=2)
        if step == 1:
            mark_best(folder / "checkpoints", path)
    record_evaluations(folder, {1: {"top1": 0.5}, 2: {"top1": 0.25}})
    put_summary(folder, {"name": config.name, "steps": 2, "finished": True})
    spool = Spool(folder / "metrics.jsonl")
    for step in (1, 2):
        spool.metrics(step, {"train/loss": 1.0 / step})
        spool.metrics(step, {"val/top1": 0.5 / step})
    spool.close()
    (folder / "log.txt").write_text("a line\n")


def read_run(folder: Path, config: Config) -> dict[str, Any]:
    """Everything that commands take from a run folder; an error is the text of one line, by what was asked.

    Raises:
        Exception: any that a command would show with a traceback.
    """
    asked: dict[str, Any] = {
        "continue": lambda: check_run_folder(config),
        "newest": lambda: _state(newest_valid(folder / "checkpoints")),
        "best": lambda: _target(folder, BEST),
        "last": lambda: _target(folder, "last"),
        "evaluations": lambda: read_evaluations(folder),
        "summary": lambda: read_summary(folder),
        "metrics": lambda: read_metrics(folder / "metrics.jsonl"),
    }
    found = {}
    for name, question in asked.items():
        try:
            found[name] = repr(question())
        except (ValueError, OSError) as error:  # what `run_command` makes one line of
            found[name] = f"error: {' '.join(str(error).split())}"
    return found


def _state(checkpoint: Any) -> Any:
    return None if checkpoint is None else (checkpoint.step, checkpoint.config, checkpoint.load())


def _target(folder: Path, which: str) -> Any:
    config, checkpoint = load_target(folder, which, [])
    return config_digest(config), _state(checkpoint)  # operational keys decide no weight and no score


def damage(folder: Path, draw: random.Random) -> str:
    """Do one thing to one file of a run folder; returns what, beginning with the file's path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    path = draw.choice(files)
    name, data = str(path.relative_to(folder)), bytearray(path.read_bytes())
    what = draw.choice(("bit",) * 6 + ("cut", "zeros", "gone", "doubled", "fifo", "noise"))
    path.unlink()  # `best` shares its files with a step
    if what == "gone":
        return f"{name} gone"
    if what == "fifo":
        os.mkfifo(path)
        return f"{name} fifo"
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    if what == "bit":
        position = draw.randrange(8 * len(data))
        data[position // 8] ^= 1 << (position % 8)
    elif what == "cut":
        del data[start:]
    elif what == "zeros":
        data[start:end] = bytes(end - start)
    elif what == "doubled":
        data[end:end] = data[start:end]
    else:
        data[start:end] = draw.randbytes(end - start)
    path.write_bytes(data)
    return f"{name} {what}"


def whole_run(pristine: Path, folder: Path, config: Config) -> dict[str, Any]:
    """What a whole copy of a run folder reads as."""
    shutil.copytree(pristine, folder)
    return read_run(folder, config)


def trial(pristine: Path, folder: Path, config: Config, seed: int, expected: dict[str, Any]) -> tuple[str, str]:
    """Damage a copy of a run folder and read it.

    Args:
        pristine: the run folder.
        folder: of the copy, the one that the configuration names.
        config: of the run.
        seed: decides what is done.
        expected: see `whole_run`.

    Returns:
        what was done, and "found" (an error says so), "same" (nothing that is read differs), "reading" (a file of
        `FOR_READING` reads otherwise), or "silent", which a warning makes "found".
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    what = damage(folder, random.Random(seed))
    found = read_run(folder, config)
    file = what.split()[0]
    if any(text.startswith("error: ") for text in found.values()):
        return what, "found"
    if found == expected:
        return what, "same"
    changed = {name for name in found if found[name] != expected[name]}
    return what, "reading" if file in FOR_READING and changed == {file.split(".")[0]} else "silent"


def tiny(output_dir: Path) -> Config:
    """A configuration as a user's."""
    path = output_dir / "tiny.yaml"
    path.write_text(
        f"output_dir: {output_dir}\nmodel: {{variant: small, num_classes: 2}}\ntrain: {{steps: 2}}\n", encoding="utf-8"
    )
    return load_config(path)
