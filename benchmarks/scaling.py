"""What a training makes of a cluster, and what to buy: `python -m benchmarks.scaling [--plan RECIPE.yaml]`.

    python -m benchmarks.scaling                               rates from 8 to 1 024 GPUs, inputs, published checks
    python -m benchmarks.scaling --plan RECIPE.yaml --nodes 16 --gpus-per-node 8 [section.key=value ...]
    python -m benchmarks.scaling --plot FILE.png               the same as a picture
    python -m benchmarks.scaling --measure [--out FILE.json]   1, 2 and 4 gloo processes here, against the model

Inputs are measured (rows of benchmarks/results) or cited, each with its error. docs/scaling.md
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster.inputs import Inputs, gather
from benchmarks.cluster.model import Cluster
from benchmarks.cluster.report import draw, load_of, make_plan, plan_text, published_text, runs_text, size_table
from benchmarks.kernel_timing import check_out
from benchmarks.report import all_rows
from benchmarks.result_rows import append_rows, given_arguments, provenance
from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser
from experiments.config import Config, load_config
from experiments.tasks.consistency import check_consistency

RECIPE = Path(__file__).resolve().parents[1] / "experiments/configs/kinetics/kinetics400_avslowfast_r50_4x16.yaml"
CLIPS_PER_GPU = 32
GOAL = 0.15  # of the runs here


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--plan", type=Path, metavar="RECIPE", help="clips/s, days, kWh and what to buy next")
    parser.add_argument("--nodes", type=int, help="of --plan (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, help="of --plan (default: 8)")
    parser.add_argument("--cores-per-node", type=float, help="CPU cores (default: 14 a GPU, as a DGX H100)")
    parser.add_argument("--nics-per-node", type=int, help="InfiniBand of 400 Gb/s (default: one a GPU)")
    parser.add_argument("--storage-node", type=float, default=40.0, metavar="GB/S", help="that one node can read")
    parser.add_argument("--storage-total", type=float, default=float("inf"), metavar="GB/S", help="of all nodes")
    parser.add_argument("--samples", type=int, default=0, help="training clips of the data (Kinetics is known)")
    parser.add_argument("--plot", type=Path, help="picture of what binds from 8 to 1 024 GPUs")
    parser.add_argument("--measure", action="store_true", help="run 1, 2 and 4 processes over gloo on this machine")
    parser.add_argument("--steps", type=int, default=20, help="timed in each case of --measure")
    parser.add_argument("--out", type=Path, help="JSON file to append the rows of --measure to")
    return parser


def cluster_of(options: Any) -> Cluster:
    """Return the machines of a command line."""
    gpus = 8 if options.gpus_per_node is None else options.gpus_per_node
    return Cluster(
        1 if options.nodes is None else options.nodes,
        gpus,
        14.0 * gpus if options.cores_per_node is None else options.cores_per_node,
        gpus if options.nics_per_node is None else options.nics_per_node,
        options.storage_node,
        options.storage_total,
    )


def recipe_of(options: Any) -> Config:
    """Return the recipe of a command line, the paper's without --plan."""
    config = load_config(options.plan or RECIPE, options.overrides)
    check_consistency(config)
    return config


def _measure(options: Any, given: list[str]) -> int:
    """Run the cases; exit code 1 where replicas differ or the model is further off than its goal."""
    from benchmarks.cluster.runs import BUSY_CORES, checkpoint_row, judged_error, measure

    source = provenance("benchmarks.scaling", "cpu", given)
    rows = [*measure(options.steps)]
    saved = checkpoint_row()
    if options.out:
        append_rows(options.out, [row | source for row in (*rows, saved)])
    sys.stdout.write(runs_text(rows) + "\n")
    sys.stdout.write(f"checkpoint of {saved['gigabytes']:.2f} GB: {saved['seconds']:.2f} s\n")
    off = [row for row in rows if abs(judged_error(row)) > GOAL]
    differ = [row for row in rows if row.get("ranks_equal") is False]
    by_cpu = sum(row["foreign_cores"] > BUSY_CORES for row in rows)
    how = f"; {by_cpu} judged by CPU time: others took the cores, measure again on an idle machine" if by_cpu else ""
    sys.stdout.write(f"{len(rows) - len(off)} of {len(rows)} runs within {100 * GOAL:.0f} % of the model{how}\n")
    return 1 if off or differ else 0


def _show(options: Any, inputs: Inputs, config: Config) -> None:
    cluster, load = cluster_of(options), load_of(config, CLIPS_PER_GPU)
    total = config.train.clips_per_step
    if options.plan:
        sys.stdout.write(plan_text(make_plan(config, cluster, inputs, options.samples)) + "\n")
    elif not options.plot:
        sys.stdout.write("\n".join(["inputs", *inputs.lines(), ""]) + "\n")
        sys.stdout.write(size_table(inputs, load, total, cluster) + "\n\n" + published_text(inputs) + "\n")
    if options.plot:
        draw(inputs, load, total, cluster, options.plot)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_intermixed_args(list(arguments))
    check_out(options.out)
    if options.out and not options.measure:
        raise ValueError(f"--out ({options.out}) must come with --measure; add it, or leave this out")
    numbers = {"--cores-per-node": options.cores_per_node, "--storage-node": options.storage_node,
               "--storage-total": options.storage_total}  # fmt: skip
    for name, number in numbers.items():
        if number is not None and math.isnan(number):
            raise ValueError(f"{name} ({number}) must be a number; leave it out for its default")
    shape = {"--nodes": "nodes", "--gpus-per-node": "gpus_per_node"}
    unused = [name for name, key in shape.items() if getattr(options, key) is not None]
    if unused and not options.plan:
        raise ValueError(
            f"{' and '.join(unused)} must come with --plan RECIPE; without it the rates of 8 to 1 024 GPUs are told"
        )
    if options.steps < 2:
        raise ValueError(f"--steps ({options.steps}) must be at least 2")
    if options.measure:
        return _measure(options, given_arguments(arguments))
    config = recipe_of(options)
    drop = config.model.drop_pathway_rate if config.model.has_audio and config.model.has_visual else 0.0
    _show(options, gather(all_rows(), drop), config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
