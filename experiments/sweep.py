"""Train the rows of a table: python -m experiments.sweep SWEEP.yaml [section.key=value ...].

    python -m experiments.sweep experiments/sweeps/table5c.yaml data.path=STORE
    python -m experiments.sweep experiments/sweeps/table5c.yaml --commands     # a line for each row, for a scheduler
    python -m experiments.sweep experiments/sweeps/table5c.yaml --table        # what is known so far, nothing is run
    python -m experiments.sweep experiments/sweeps/droppathway_toy.yaml --gap FILE.png   # two groups of rows compared

One row after the other, each a run of its own below a common MLflow run. The same command goes on where it stopped:
finished rows are not run again. At the end: the paper's table, its figures beside ours.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.cli.command_line import CommandFailure, run_command
from experiments.cli.parser import Parser
from experiments.cli.strict_yaml import ConfigError, read_config_text
from experiments.config import Config, differing_keys, load_config
from experiments.records.error_curves import draw_error_curves
from experiments.records.group_gap import Gap, draw_gap, paired_gap
from experiments.records.shipping import PARENT_VARIABLE, parent_run

EXIT_STOPPED = 75
_SWEEP_KEYS, _ROW_KEYS = {"table", "title", "metrics", "rows"}, {"row", "config", "set", "paper", "note", "group"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: as the paper prints it.
        config: configuration file; None for a row that is not trained.
        overrides: what differs from it.
        paper: metric -> the paper's figure, percent or GFLOPs.
        note: printed behind the row.
        group: of rows that `--gap` compares with those of another, pair by pair in the order of the file; empty: none.
    """

    name: str
    config: Path | None
    overrides: tuple[str, ...]
    paper: dict[str, float]
    note: str
    group: str = ""


@dataclass(frozen=True)
class Sweep:
    """A table and what trains it."""

    name: str
    table: str
    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Args:
        path: YAML; `config` of a row is relative to it.

    Raises:
        ConfigError: for what is unknown, missing or of the wrong kind, with the file.
    """
    try:
        found = yaml.safe_load(read_config_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} must be YAML: {' '.join(str(error).split())}") from None
    _require(path, "the file", found, _SWEEP_KEYS, {"table", "metrics", "rows"})
    for key, kind in (("metrics", list), ("rows", list)):
        if not isinstance(found[key], kind) or not found[key]:
            raise ConfigError(f"{path}: {key} must be a list with at least one entry; fill it")
    metrics = tuple(map(str, found["metrics"]))
    rows = tuple(_read_row(path, number, row, metrics) for number, row in enumerate(found["rows"], 1))
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: row {name!r} comes twice; give each row a name of its own")
    return Sweep(path.stem, str(found["table"]), str(found.get("title", "")), metrics, rows)


def _require(path: Path, place: str, found: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {place} must be a mapping with the keys {', '.join(sorted(known))}")
    for problem, keys in (("unknown", set(map(str, found)) - known), ("missing", needed - found.keys())):
        if keys:
            raise ConfigError(
                f"{path}: {place}: {problem} {', '.join(sorted(keys))}; known are {', '.join(sorted(known))}"
            )


def _read_row(path: Path, number: int, found: Any, metrics: tuple[str, ...]) -> Row:
    place = f"row {number}"
    _require(path, place, found, _ROW_KEYS, {"row"})
    paper, overrides = found.get("paper", {}), found.get("set", [])
    if not isinstance(paper, dict) or any(k not in (*metrics, "gflops") or _not_number(v) for k, v in paper.items()):
        raise ConfigError(f"{path}: {place}: paper ({paper}) must give numbers for {', '.join(metrics)} or gflops")
    if not isinstance(overrides, list) or not all(isinstance(text, str) and "=" in text for text in overrides):
        raise ConfigError(f"{path}: {place}: set ({overrides}) must be a list of section.key=value")
    config = found.get("config")
    file = None if config is None else Path(os.path.normpath(path.parent / str(config)))
    if file is not None and not file.is_file():
        raise ConfigError(f"{path}: {place}: config ({config}) must be a file beside {path}; correct it")
    notes = str(found.get("note", "")), str(found.get("group", ""))
    return Row(str(found["row"]), file, tuple(overrides), dict(paper), *notes)


def _not_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, float))


def arguments_of(row: Row, overrides: Sequence[str]) -> list[str]:
    """Return the arguments of `experiments.train` for a row: its file, its overrides, then those of the command."""
    return [str(row.config), *row.overrides, *overrides]


def configs_of(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Config]:
    """Return the configuration of every row that is trained, by its name.

    Raises:
        ConfigError: one that does not load, or two rows in the same run folder.
    """
    found: dict[str, Config] = {}
    for row in sweep.rows:
        if row.config is None:
            continue
        config = load_config(row.config, [*row.overrides, *overrides])
        for other, known in found.items():
            if known.run_dir == config.run_dir:
                raise ConfigError(
                    f"rows {other!r} and {row.name!r} must have run folders of their own, both have {config.run_dir}; "
                    "give one of them name=... under `set`"
                )
        found[row.name] = config
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what summary.json of a run holds; see `experiments.records.run_folder`, which torch comes with."""
    from experiments.records.run_folder import read_summary as read

    return read(folder)


def other_settings(config: Config) -> list[str]:
    """Return `key: there -> here` for what decides the weights and differs in the finished run of a row.

    Args:
        config: of the row; its classes are those of the data where it names none.
    """
    if not (config.run_dir / "config.yaml").exists() or not read_summary(config.run_dir).get("finished"):
        return []
    from experiments.records.run_folder import recorded_config

    found = recorded_config(config.run_dir)
    if found is None:
        return []
    classes = "model.num_classes: "
    lines = differing_keys(config, found)
    return [line for line in lines if config.model.num_classes or not line.startswith(classes)]


def require_same_settings(configs: dict[str, Config]) -> None:
    """Refuse finished rows that were trained with other settings than this command gives them.

    Raises:
        ConfigError: naming the first, what differs and what to do.
    """
    for name, config in configs.items():
        others = [] if config.train.fresh else other_settings(config)
        if others:
            raise ConfigError(
                f"row {name!r} is finished in {config.run_dir} with other settings ({'; '.join(others[:4])}); give the "
                "old ones, another output_dir=..., or train.fresh=true to move that run aside"
            )


def table_lines(sweep: Sweep, configs: dict[str, Config]) -> list[str]:
    """Return the table: a row a line, each metric ours and the paper's, and what each row lacks."""
    head = ["row", *(f"{metric} {who}" for metric in sweep.metrics for who in ("ours", "paper")), "GFLOPs (paper)", ""]
    lines = [head]
    for row in sweep.rows:
        summary = read_summary(configs[row.name].run_dir) if row.name in configs else {}
        cells = [row.name]
        for metric in sweep.metrics:
            ours = summary.get(metric) if summary.get("finished") else None
            cells += ["-" if ours is None else f"{100 * ours:.1f}", _number(row.paper.get(metric))]
        others = other_settings(configs[row.name]) if row.name in configs else []
        state = _state(row, summary, others)
        lines.append([*cells, _number(row.paper.get("gflops")), "; ".join(filter(None, (state, row.note)))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    title = f"Table {sweep.table}{f': {sweep.title}' if sweep.title else ''} (percent)"
    return [title, *("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)]


def gap_of(sweep: Sweep, configs: dict[str, Config]) -> Gap:
    """Return the gap of the first metric between the two groups of a sweep.

    Raises:
        ConfigError: there are not two groups, or not equally many finished runs in them.
    """
    groups: dict[str, list[float]] = {}
    for row in sweep.rows:
        if row.group and row.config is not None:
            summary = read_summary(configs[row.name].run_dir)
            value = summary.get(sweep.metrics[0]) if summary.get("finished") else None
            groups.setdefault(row.group, []).extend([] if value is None else [100 * value])
    if len(groups) != 2:
        raise ConfigError(f"sweep {sweep.name} must have rows of two groups, not {len(groups)}, for --gap; add `group`")
    (first, second), values = tuple(groups), tuple(groups.values())
    try:
        return paired_gap((first, second), *values)
    except ValueError as error:
        raise ConfigError(f"sweep {sweep.name}: {error}") from None


def _is_done(config: Config) -> bool:
    return bool(read_summary(config.run_dir).get("finished")) and not other_settings(config)


def _state(row: Row, summary: dict[str, Any], others: Sequence[str]) -> str:
    if summary.get("finished"):
        return f"trained with other settings ({'; '.join(others[:2])})" if others else ""
    if row.config is None:
        return "not trained"
    return f"stopped at step {summary['steps']}" if summary.get("steps") else "not run"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def run_rows(sweep: Sweep, configs: dict[str, Config], overrides: Sequence[str]) -> int:
    """Train the rows that are not finished, one after the other.

    Returns:
        0, or 75 where a row was stopped on request: the others are not begun.

    Raises:
        CommandFailure: a row failed; the others are not begun.
    """
    from experiments.records.tracking import resolve_uri

    environment = dict(os.environ)
    for number, row in enumerate(sweep.rows, 1):
        if row.config is None:
            continue
        config, place = configs[row.name], f"row {number} of {len(sweep.rows)}, {row.name!r}"
        if _is_done(config):
            sys.stdout.write(f"{place}: finished before, in {config.run_dir}\n")
            continue
        if config.tracking.backend == "mlflow" and PARENT_VARIABLE not in environment:
            uri = resolve_uri(config.tracking.uri, Path(config.output_dir))
            parent = parent_run(uri, config.tracking.experiment, f"sweep {sweep.name}", Path(config.output_dir))
            environment |= {PARENT_VARIABLE: parent} if parent else {}
        sys.stdout.write(f"{place}: {config.run_dir}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "experiments.train", *arguments_of(row, overrides)]
        code = _run(command, environment)
        if code == EXIT_STOPPED:
            return code
        if code != 0:
            raise CommandFailure(
                f"{place} ended with {code}; start the same command again after what it says is mended"
            )
    return 0


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end; returns its exit code. Ctrl-C reaches it by itself, SIGTERM is passed on."""
    process = subprocess.Popen(command, env=environment)
    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser.of_command("sweep", __doc__)
    parser.add_argument("sweep", type=Path, help="YAML file of experiments/sweeps, or your own")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all rows")
    parser.add_argument("--commands", action="store_true", help="print the rows that are not finished as commands")
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--curves", type=Path, metavar="PNG", help="draw the errors of the rows over the epochs only")
    parser.add_argument("--gap", type=Path, metavar="PNG", help="compare the two groups of rows and draw it only")
    options = parser.parse_intermixed_args(list(arguments))
    sweep = read_sweep(options.sweep)
    configs = configs_of(sweep, options.overrides)
    if not (options.curves or options.gap or options.table):
        require_same_settings(configs)
    if options.commands:
        for row in sweep.rows:
            if row.config is not None and not _is_done(configs[row.name]):
                words = ["python", "-m", "experiments.train", *arguments_of(row, options.overrides)]
                sys.stdout.write(shlex.join(words) + "\n")
        return 0
    if options.curves:
        missing = draw_error_curves({name: config.run_dir for name, config in configs.items()}, options.curves)
        sys.stdout.write(f"written to {options.curves}; no metrics of: {', '.join(missing) or 'none'}\n")
        return 0
    if options.gap:
        gap = gap_of(sweep, configs)
        draw_gap(gap, sweep.metrics[0], options.gap)
        sys.stdout.write("\n".join([*gap.lines(sweep.metrics[0]), f"written to {options.gap}"]) + "\n")
        return 0
    code = 0 if options.table else run_rows(sweep, configs, options.overrides)
    sys.stdout.write("\n".join(table_lines(sweep, configs)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
