"""Train a model: python -m experiments.train CONFIG [section.key=value ...], alone or under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser
from experiments.config import Config, load_config
from experiments.engine.run import Run
from experiments.records.tracking import Status
from experiments.runtime import EXIT_STOPPED, Runtime, init_runtime, set_up_logging, shut_down


def train(run: Run) -> bool:
    """Train until the last step or a stop signal; every save happens between two steps.

    Returns:
        Whether it finished.
    """
    config, clock, learner = run.config, run.clock, run.learner
    batches = run.data.batches(run.step)
    stopping = False
    while run.step < run.total_steps and not stopping:
        with clock.stage("data"):
            batch = next(batches)
        with clock.stage("step"):
            drop_audio = learner.begin_step(run.step)
            loss = learner.take_step(learner.inputs(batch), drop_audio=drop_audio)  # forward, backward, optimizer
            clock.warming_up = learner.take_step.warming_up
            learner.statistics.synchronize()
            run.window.add(run.step, loss, batch)
        run.step += 1
        clock.count_step(config.train.clips_per_step)
        stopping = run.stop.agreed()
        evaluating = run.is_due(config.eval.interval_steps)
        saving = stopping or evaluating or run.is_due(config.checkpoint.interval_steps)
        if saving or run.is_due(config.train.log_interval_steps):
            run.report_progress()  # also makes sure that no diverged weights are saved
        if evaluating:
            run.make_statistics_precise()
        if saving:
            run.save()
        if evaluating and not stopping:
            stopping = not run.evaluate()
    run.stop.finish()
    return run.step == run.total_steps and not stopping


def run_training(config: Config, runtime: Runtime) -> int:
    """Set up, train, evaluate and clean up.

    Returns:
        0 when finished, 75 when stopped on request (state saved).
    """
    run = Run(config, runtime)
    try:
        run.open()
        interrupted = run.step > 0 and run.evaluation_due() and not run.evaluate()  # the one that was cut off before
        finished = not interrupted and train(run)
    except BaseException as failure:
        run.close("FAILED", failure)
        raise
    status: Status = "FINISHED" if finished else "KILLED"
    run.close(status)
    return 0 if status == "FINISHED" else EXIT_STOPPED


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m experiments.train", description="Train a model; continue an existing run.")
    parser.add_argument("config", type=Path, help="YAML file, see docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    options = parser.parse_intermixed_args(list(arguments))
    config = load_config(options.config, options.overrides)
    runtime = init_runtime(config.runtime)
    try:
        set_up_logging(runtime)
        return run_training(config, runtime)
    finally:
        shut_down(runtime)


if __name__ == "__main__":
    sys.exit(run_command(main))
