"""Train a model: python -m experiments.train CONFIG [section.key=value ...], alone or under torchrun.

    python -m experiments.train experiments/configs/quickstart.yaml
    python -m experiments.train CONFIG name=mine data.path=my_videos optim.lr=0.01
    torchrun --nproc-per-node=8 -m experiments.train CONFIG runtime.device=cuda

The same command continues a run that was stopped. --dry-run says what it would do, and trains nothing.
--keys lists the keys, --print-config the values that would be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.command_line import run_command
from experiments.cli.key_list import key_table
from experiments.cli.parser import Parser, heavy_imports
from experiments.config import Config, load_config, resolved_yaml
from experiments.engine.target import check_data_path
from experiments.tasks.consistency import check_consistency

if TYPE_CHECKING:  # torch and DALI take seconds to import: --help and a mistake in the configuration need neither
    from experiments.engine.run import Run
    from experiments.records.tracking import Status
    from experiments.runtime import Runtime

KEYS_NOTE = "model.variant gives the defaults of model.*: python -m model lists them. Meanings: docs/configuration.md"


def train(run: Run) -> bool:
    """Train until the last step or a stop signal; every save happens between two steps.

    Returns:
        Whether it finished.
    """
    from experiments.engine.accumulation import take_passes

    config, clock, learner = run.config, run.clock, run.learner
    batches = run.data.batches(run.step)
    stopping = False
    while run.step < run.total_steps and not stopping:
        run.watch.at(run.step, "waits for data")
        run.trace.before(run.step, learner.model, learner.take_step)
        run.signs.before_data()
        waited_s = run.data.loader.stats.device_wait_s
        with clock.stage("data"), run.trace.range("data"):
            passes = take_passes(batches, run.data.passes)
        clock.rebook(run.data.loader.stats.device_wait_s - waited_s)
        ids = [name for batch in passes for name in batch.ids]
        run.watch.at(run.step, "in its step", ids)
        with clock.stage("step"), run.trace.range("step"):
            run.signs.before_step(timed=run.reports_after(run.step))
            drop_audio = learner.begin_step(run.step)
            loss = learner.step_of(passes, drop_audio=drop_audio)
            clock.warming_up = learner.take_step.warming_up
            learner.statistics.synchronize()
            run.window.add(run.step, loss, ids, learner.guard.verdict)
            run.signs.after_step()
        run.trace.after()
        run.step += 1
        clock.count_step(config.train.clips_per_step)
        stopping = run.stop.agreed()
        evaluating = run.is_due(config.eval.interval_steps)
        saving = stopping or evaluating or run.is_due(config.checkpoint.interval_steps)
        if saving or run.is_due(config.train.log_interval_steps):
            run.report_progress()  # also makes sure that no diverged weights are saved
        if evaluating:
            run.evaluation.make_statistics_precise(run.step)
        if saving:
            run.save()
        if evaluating and not stopping:
            stopping = not run.evaluation.take(run.step)
    run.stop.finish()
    return run.step == run.total_steps and not stopping


def run_training(config: Config, runtime: Runtime) -> int:
    """Set up, train, evaluate and clean up.

    Returns:
        0 when finished, 75 when stopped on request (state saved).
    """
    from experiments.engine.run import Run
    from experiments.runtime import EXIT_STOPPED

    run = Run(config, runtime)
    try:
        run.open()
        # the evaluation that was cut off before
        interrupted = run.step > 0 and run.is_evaluation_due() and not run.evaluation.take(run.step)
        finished = not interrupted and train(run)
    except BaseException as failure:
        cause = run.failed(failure)
        if cause is failure:
            raise
        raise cause from None
    status: Status = "FINISHED" if finished else "KILLED"
    run.close(status)
    run.reporter.tell_end(run.step, finished=finished, saved=run.is_saved)
    return 0 if status == "FINISHED" else EXIT_STOPPED


def say_plan(config: Config, runtime: Runtime) -> int:
    """Print what a training would do, on rank 0; returns 0. Nothing is trained and no run folder is made."""
    from experiments.engine.dry_run import plan_lines

    lines = plan_lines(config, runtime)
    if runtime.is_main:
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser.of_command("train", __doc__)
    parser.add_argument("config", type=Path, nargs="?", help="YAML file of experiments/configs, or your own")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    parser.add_argument("--keys", action="store_true", help="list every key with its default and what it takes")
    parser.add_argument("--print-config", action="store_true", help="print the configuration as it would be used")
    parser.add_argument("--dry-run", action="store_true", help="check all and say what would be done; train nothing")
    options = parser.parse_intermixed_args(list(arguments))
    if options.keys:
        sys.stdout.write("\n".join([*key_table(Config), KEYS_NOTE]) + "\n")
        return 0
    if options.config is None:
        parser.error("a configuration must be given, such as experiments/configs/quickstart.yaml")
    config = load_config(options.config, options.overrides)
    if options.print_config:
        sys.stdout.write(resolved_yaml(config))
        return 0
    check_consistency(config)
    check_data_path(config)
    with heavy_imports():
        import experiments.engine.run  # noqa: F401
        from experiments.runtime import init_runtime, set_up_logging, shut_down

    runtime = init_runtime(config.runtime)
    set_up_logging(runtime)
    code = say_plan(config, runtime) if options.dry_run else run_training(config, runtime)
    shut_down(runtime)  # after a failure the process group may hang: the end of the process leaves it
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
