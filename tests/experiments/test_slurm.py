"""docs/slurm.sh between stand-ins of Slurm's commands: what it launches, and when the job is queued up again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat training)"',
    "srun": 'echo "srun $*" >> calls; shift; exec "$@"',
    "training.sh": 'trap "exit $ON_TERM" TERM; echo $$ > training; [ -z "$WAITS" ] || sleep 60 & wait; exit "$CODE"',
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with the stand-ins."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(job: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start the script as slurmd would."""
    env = {
        "PATH": f"{job}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(job), "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "PYTHON": str(job / "training.sh"), "WAITS": "", "CODE": "0",
        "ON_TERM": "1", **environment,
    }  # fmt: skip
    return subprocess.Popen(["bash", str(SCRIPT), "recipe.yaml", "optim.lr=0.1 "], env=env, start_new_session=True)


def calls(job: Path) -> list[str]:
    """What Slurm was asked for."""
    return (job / "calls").read_text(encoding="utf-8").splitlines()


def test_every_node_launches_its_ranks(job: Path) -> None:
    assert start(job, RANKS_PER_NODE="4", SLURM_RESTART_COUNT="2").wait(30) == 0
    shown, launched = calls(job)
    assert shown == "scontrol show hostnames node[1-2]"
    assert "--nnodes=2 --nproc-per-node=4 --max-restarts=3" in launched
    assert "--rdzv-id=7-2 --rdzv-endpoint=node1:29500 -m experiments.train recipe.yaml optim.lr=0.1 " in launched


def test_a_failure_is_no_reason_to_queue_again(job: Path) -> None:
    assert start(job, CODE="1").wait(30) == 1
    assert not any("requeue" in call for call in calls(job))


@pytest.mark.parametrize(("on_term", "again"), [("1", True), ("0", False)])
def test_a_stop_asks_every_rank_and_queues_again_unless_the_run_is_done(job: Path, on_term: str, again: bool) -> None:
    process = start(job, WAITS="yes", ON_TERM=on_term)
    deadline = time.monotonic() + 30
    while not (job / "training").exists() or not (job / "training").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert calls(job)[2] == "scancel --signal=TERM 7.0"
        assert calls(job)[3:] == (["scontrol requeue 7"] if again else [])
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the sleep of the stand-in
