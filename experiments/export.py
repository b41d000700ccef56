"""Export a trained model for use elsewhere: python -m experiments.export RUN --out FOLDER [section.key=value ...].

    python -m experiments.export runs/quickstart --out exported
    python -m experiments.export runs/quickstart --out program --format program

weights: safetensors + config.json, read back by `model.export.load_model` and `train.init_from`. program: torch.export,
`torch.export.load(...)` needs nothing of this project. onnx: needs the packages onnx and onnxscript. Beside each: what
it wants to see and what its scores mean (inputs.json), and a script that classifies a video with it (example.py).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli.command_line import run_command
from experiments.cli.parser import CHECKPOINTS, EXPORT_FORMATS, Parser, heavy_imports
from experiments.engine.target import check_target, unfinished_note


def _parser() -> Parser:
    parser = Parser.of_command("export", __doc__)
    parser.add_argument("target", type=Path, help="run folder, checkpoint folder or configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the run's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, absent or empty")
    parser.add_argument("--format", choices=EXPORT_FORMATS, default=EXPORT_FORMATS[0], help="default: weights")
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default=CHECKPOINTS[0], help="which one of a run (default: best)"
    )
    return parser


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_intermixed_args(list(arguments))
    check_target(options.target, options.overrides)
    with heavy_imports():
        from experiments.engine.exporting import export_checkpoint
        from experiments.engine.run_lines import python_to_type
        from experiments.engine.trained_model import load_target

    config, checkpoint = load_target(options.target, options.checkpoint, options.overrides)
    if note := unfinished_note(options.target):
        sys.stderr.write(f"{note}\n")
    files = export_checkpoint(config, checkpoint, options.out, options.format)
    width = max(len(str(file)) for file in files)
    sys.stdout.write("".join(f"{str(file).ljust(width)}  {_size(file.stat().st_size)}\n" for file in files))
    if (options.out / "example.py").exists():
        sys.stdout.write(f"try it: {python_to_type()} {shlex.quote(str(options.out / 'example.py'))} VIDEO\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
