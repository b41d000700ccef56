"""torchrun's agent with ranks that are forked: python -m tests.experiments.support.agent RANKS RESTARTS -m MODULE.

Rendezvous, restarts, signals and the table of failures are torchrun's; the ranks do not import torch and DALI anew at
each start, and torchrun's own command line is not read.
"""

import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.experiments.support.forked import be_module


def rank(module: str, arguments: list[str]) -> None:
    """Be one rank: ends as `python -m MODULE` does, and returns where that is in order."""
    code = be_module(module, arguments)
    if code:
        os._exit(code)


def main(arguments: list[str]) -> int:
    """Start the ranks on this machine, and again where one fails; returns the exit code."""
    ranks, restarts, _, module, *rest = arguments
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        max_restarts=int(restarts),
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, rank)(module, rest)
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
