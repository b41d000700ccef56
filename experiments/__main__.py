"""What there is: `python -m experiments` lists the commands, `--version` says which version this is."""

import difflib
import sys
from pathlib import Path

from experiments.cli.parser import installed_version

COMMANDS = {
    "prepare": "make a store from videos and their official annotation files; verify one",
    "train": "train a model, or continue a run; alone or under torchrun",
    "evaluate": "score a run, a checkpoint or a configuration on a split",
    "predict": "classify videos with a trained model",
    "export": "write the trained weights or a program for other code",
    "combine": "join score files: ensembles, actions, splits, subsets",
    "sweep": "train the rows of a table, and print it beside the paper's",
    "track": "open MLflow on the runs; send what a dead server missed",
}


def main() -> int:
    """Print the commands and the configurations; returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"avslowfast-dali {installed_version()}\n")
        return 0
    given = sys.argv[1:]
    if given and given not in (["--help"], ["-h"]):
        near = difflib.get_close_matches(given[0], COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        command = f"python -m experiments.{given[0]}" if given[0] in COMMANDS else meant
        sys.stderr.write(f"error: a command is a module, python -m experiments.NAME, not {given[0]!r}: {command}\n")
        return 2
    lines = [f"AVSlowFast on NVIDIA DALI {installed_version()}: python -m experiments.COMMAND --help", ""]
    lines += [f"  {name:9} {what}" for name, what in COMMANDS.items()]
    configs = sorted((Path(__file__).parent / "configs").rglob("*.yaml"))
    lines += ["", "Configurations (the first lines of each say what it reproduces):"]
    lines += [f"  experiments/configs/{path.relative_to(Path(__file__).parent / 'configs')}" for path in configs]
    lines += ["", "Their keys: python -m experiments.train --keys; the models: python -m model"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
