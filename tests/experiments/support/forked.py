"""Commands as processes that start at once: forked from a process that has imported what they import.

Each is a process of its own, with its own signals, environment and end; what it lacks of `python -m MODULE` is the 5 s
of processor time in which torch and DALI are imported. Tests of the start itself run `python -m MODULE`.
"""

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
from torch.multiprocessing import start_processes

from tests.experiments.support import pictures

ROOT = Path(__file__).parents[3]
CONTEXT = get_context("forkserver")
# What a training and an evaluation import, and what the optimizer imports at its first step.
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "nvidia.dali._debug_mode",
        "experiments.engine.run",
        "experiments.evaluate",
        "experiments.tasks.classification",
        "tests.experiments.support.faults",
        "tests.experiments.support.warm",
        "pytest",
    ]
)


def _serve() -> None:
    """Start the process that forks, with one thread, whatever this one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        forkserver.ensure_running()


def be_module(module: str, arguments: Sequence[str]) -> int:
    """Be `python -m MODULE ARGUMENTS`, without pictures where the test says so; returns the exit code at the end."""
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
    if pictures.VARIABLE in os.environ:
        pictures.leave_out(setattr)
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # as the interpreter would
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """Be `python -m MODULE ARGUMENTS` from here on; never returns."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os._exit(be_module(module, arguments))


class Forked:
    """A started command; takes the place of `subprocess.Popen` with stdout and stderr in one pipe.

    Args:
        module: run as `python -m` does.
        arguments: of the command.
        environment: all of it.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        _serve()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        output = f"/proc/{os.getpid()}/fd/{self._output.fileno()}"
        self._process = CONTEXT.Process(target=_run_module, args=(module, list(arguments), dict(environment), output))
        self._process.start()
        self.pid = self._process.pid
        self.args = [module, *arguments]

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None and self.pid is not None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait_for_words(self, words: str, timeout_s: float = 120) -> None:
        """Return when the command has written `words`; fails the test when it ends or takes longer before that."""
        deadline = time.monotonic() + timeout_s
        while words not in (text := self._written()):
            if self.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{words!r} was not written: {text[-2000:]}")
            time.sleep(0.05)

    def _written(self) -> str:
        length = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), length, 0).decode(errors="replace")

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end and return what was written.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._written(), None


def call_on_ranks(function: Callable[[int, str], None], folder: str, ranks: int = 2) -> None:
    """Call `function(rank, folder)` in a process for each rank; a failure in one is raised here."""
    _serve()
    start_processes(function, args=(folder,), nprocs=ranks, start_method="forkserver")  # type: ignore[no-untyped-call]


def run_ranks(
    module: str, arguments: Sequence[str], ranks: int, timeout_s: float, **environment: str
) -> tuple[int, str]:
    """Run a command on several ranks of this machine as torchrun does, without restarts.

    Where a rank fails, the others get SIGTERM, and SIGKILL 30 s later.

    Args:
        module: run as `python -m` does.
        arguments: of the command.
        ranks: processes.
        timeout_s: longer fails the test.
        environment: besides this process's and what torchrun gives.

    Returns:
        0 or 1, as torchrun's; the output of all, rank by rank.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", **environment}  # fmt: skip
    started = [Forked(module, arguments, common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
    deadline = time.monotonic() + timeout_s
    failed = False
    while any(process.poll() is None for process in started):
        if not failed and any(process.poll() for process in started):
            failed, deadline = True, min(deadline, time.monotonic() + 30)
            for process in started:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
            if not failed:
                pytest.fail("still running: " + "".join(process.communicate()[0] for process in started)[-3000:])
        time.sleep(0.02)
    output = "".join(process.communicate()[0] for process in started)
    return int(any(process.returncode for process in started)), output
