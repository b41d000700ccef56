"""Evaluate a trained model: python -m experiments.evaluate RUN [section.key=value ...], alone or under torchrun.

    python -m experiments.evaluate runs/quickstart
    python -m experiments.evaluate runs/quickstart views.num_clips=10 views.num_crops=3
    python -m experiments.evaluate runs/quickstart --split train --checkpoint last --scores train.npz
    python -m experiments.evaluate runs/quickstart --robustness    # sound muted, of other videos, shifted

RUN is a run folder, a checkpoint folder or a configuration file. The keys: python -m experiments.train --keys
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli.command_line import run_command
from experiments.cli.parser import CHECKPOINTS, Parser, heavy_imports
from experiments.engine.target import check_target


def _parser() -> Parser:
    parser = Parser.of_command("evaluate", __doc__)
    parser.add_argument("target", type=Path, help="run folder, checkpoint folder or configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the run's")
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default=CHECKPOINTS[0], help="which one of a run (default: best)"
    )
    parser.add_argument("--split", default="", help="split to score (default: data.val_split)")
    parser.add_argument("--output", type=Path, help="folder for the report (default: below the run folder)")
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="also write what was scored of a detection, as AVA's CSV"
    )
    parser.add_argument("--scores", type=Path, metavar="FILE", help="also write the scores of every sample (.npz)")
    parser.add_argument(
        "--robustness", action="store_true", help="also score with the sound muted, of other videos, and shifted"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_intermixed_args(list(arguments))
    check_target(options.target, options.overrides)
    with heavy_imports():
        from experiments.engine.evaluation import Outputs, score_split
        from experiments.engine.trained_model import load_target
        from experiments.runtime import init_runtime, set_up_logging, shut_down

    config, checkpoint = load_target(options.target, options.checkpoint, options.overrides)
    runtime = init_runtime(config.runtime)
    try:
        set_up_logging(runtime)
        outputs = Outputs(options.output, options.detections, options.scores, options.robustness)
        lines = score_split(config, checkpoint, runtime, options.split, outputs)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    finally:
        shut_down(runtime)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
