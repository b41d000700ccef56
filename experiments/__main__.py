"""What there is: `python -m experiments` lists the commands, `--version` says which version this is."""

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
    lines = [f"AVSlowFast on NVIDIA DALI {installed_version()}: python -m experiments.COMMAND --help", ""]
    lines += [f"  {name:9} {what}" for name, what in COMMANDS.items()]
    configs = sorted((Path(__file__).parent / "configs").rglob("*.yaml"))
    lines += ["", "Configurations (the first lines of each say what it reproduces):"]
    lines += [f"  experiments/configs/{path.relative_to(Path(__file__).parent / 'configs')}" for path in configs]
    lines += ["", "Their keys: python -m experiments.train --keys; the models: python -m model"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
