"""Processes and devices of a run: torchrun set-up, seeds, logging with the rank, stop signals, agreement."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from experiments.cli.log_file import LogFile
from experiments.config import RuntimeConfig
from pipeline.workers.machine import usable_cpus

EXIT_STOPPED = 75  # stopped on request, state saved: the same command continues (EX_TEMPFAIL of sysexits.h)
_PR_SET_PDEATHSIG = 1
_DETAILS = "avslowfast.kernels"  # a logger whose INFO is for the log file
_SAME_SIGNAL_S = 1.0  # torchrun repeats the terminal's Ctrl-C to its workers: within this time it is the same one
log = logging.getLogger(__name__)


class RuntimeSetupError(ValueError):
    """A machine, launch or group of ranks that does not fit the configuration."""


@dataclass(frozen=True)
class Runtime:
    """This process among its peers.

    Args:
        rank: 0..world_size - 1.
        world_size: number of processes.
        local_rank: rank on this machine.
        device: where it computes.
        control: gloo process group for messages about the run, on CPU tensors; None when alone.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files."""
        return self.rank == 0


def init_runtime(config: RuntimeConfig) -> Runtime:
    """Choose the device, set up determinism and threads, and join the process group if torchrun started this process.

    Args:
        config: device, determinism, threads, timeout.

    Returns:
        The runtime.

    Raises:
        RuntimeSetupError: without a CUDA device where one is asked for, or with more processes than devices.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(config.device, local_rank)
    if config.precision == "fp16" and device.type == "cpu":
        raise RuntimeSetupError("runtime.precision (fp16) must have a CUDA device; use bf16 or fp32 on a CPU")
    torch.set_num_threads(choose_num_threads(config.num_threads, torch.get_num_threads()))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if world_size == 1:
        return Runtime(0, 1, 0, device)
    die_with_parent()
    _warn_about_shared_store()
    timeout = timedelta(seconds=2 * config.collective_timeout_s)  # the watch of a training (engine/watch.py) is first
    backend = "nccl" if device.type == "cuda" else "gloo"
    place: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and "MASTER_ADDR" in os.environ:
        place = {"store": _rank_store(rank, world_size, timeout), "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None, **place)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank, world_size, local_rank, device, control)


def choose_num_threads(configured: int, torchs: int) -> int:
    """Return how many threads torch has in this process.

    What others do on the machine at the moment is not looked at: with another number of threads sums differ in their
    last bits, and a continued run is bitwise the uninterrupted one. Beside busy programs threads soon sleep while they
    wait (GOMP_SPINCOUNT), and `Pace` says where that is not enough.

    Args:
        configured: `runtime.num_threads`; 0 chooses.
        torchs: those that torch would have: OMP_NUM_THREADS, or the cores of the machine.

    Returns:
        As configured; else torch's, but at most this rank's share of the CPUs that affinity and quotas of control
        groups leave, unless OMP_NUM_THREADS says how many.
    """
    if configured:
        return configured
    if os.environ.get("OMP_NUM_THREADS"):
        return torchs
    return max(1, min(torchs, usable_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))))


def _rank_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store at which the ranks meet; rank 0 keeps it, listening only where the others come to."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {}
    if rank == 0:
        listener = _listener(address, port)
        if listener is None:
            log.warning(
                "the store of the ranks listens on every address of this machine, because MASTER_ADDR (%s) is none of "
                "its own that other nodes reach; keep it on a private network (docs/cluster.md)", address,
            )  # fmt: skip
        else:
            options["master_listen_fd"] = listener.detach()
    return dist.TCPStore(address, port, world_size, rank == 0, timeout=timeout, **options)


def _listener(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens at one address of this machine; None where that is not one for all ranks."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, _, _, _, place in found:
        if ipaddress.ip_address(str(place[0])).is_loopback and not one_machine:
            continue  # a host that calls itself 127.0.1.1: other nodes know it by another address
        with contextlib.suppress(OSError):
            return socket.create_server((str(place[0]), port), family=family, backlog=2048)
    return None


def shut_down(runtime: Runtime) -> None:
    """Leave the process group, if there is one."""
    if runtime.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not available:
        raise RuntimeSetupError(
            "runtime.device (cuda) must find a CUDA device and there is none; use runtime.device=cpu"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= available:
        raise RuntimeSetupError(
            f"local rank {local_rank} must have its own GPU and there are {available}; lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def die_with_parent() -> None:
    """Ask Linux to kill this process when torchrun's agent dies, so that no orphan keeps a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _warn_about_shared_store() -> None:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        log.warning(
            "torchrun restarts can hang on a shared store: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (dropout) as a function of (seed, step, rank), so that any step can be redone.

    Args:
        seed: of the run.
        step: steps done before.
        rank: of this process.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def set_up_logging(runtime: Runtime, log_file: Path | None = None) -> None:
    """Send log lines to stderr, with the rank where there are several, and on rank 0 also to a file.

    Args:
        runtime: this process.
        log_file: appended to; None = no file.
    """
    prefix = f"[rank {runtime.rank}] " if runtime.world_size > 1 else ""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        if getattr(handler, "avsf", False):
            root.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = [_CurrentStderr()]
    handlers[0].setLevel(logging.INFO if runtime.is_main else logging.WARNING)
    if log_file is not None and runtime.is_main:
        handlers.append(LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.avsf = True  # type: ignore[attr-defined]
        kind = TerminalFormatter if isinstance(handler, _CurrentStderr) else logging.Formatter
        handler.setFormatter(kind(f"%(asctime)s {prefix}%(levelname)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    for chatty in ("matplotlib", "alembic", "mlflow", "urllib3", "git"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


class TerminalFormatter(logging.Formatter):
    """For a terminal: the short form of a line where it has one (`short`), no INFO, colour for what needs attention.

    Elsewhere, and where NO_COLOR is set, nothing of this but the text.
    """

    _COLOURS: ClassVar[dict[int, str]] = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        if not sys.stderr.isatty():
            return super().format(record)
        short = getattr(record, "short", None)
        if record.levelno == logging.INFO:
            return f"{self.formatTime(record, self.datefmt)} {short or record.getMessage()}"
        colour = "" if os.environ.get("NO_COLOR") else self._COLOURS.get(record.levelno, "")
        return f"{colour}{super().format(record)}\x1b[0m" if colour else super().format(record)


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to sys.stderr as it is now, so that lines appear above a live line; details are not for a terminal."""

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass

    def filter(self, record: logging.LogRecord) -> Any:
        detail = getattr(record, "detail", False) or (record.name == _DETAILS and record.levelno == logging.INFO)
        said = getattr(record, "for_file", False) or (detail and sys.stderr.isatty())
        return not said and super().filter(record)


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request to stop at the next step; a second Ctrl-C ends at once.

    `agreed()` is called once a step on every rank: the answer lags one step so that nobody waits for it, and is the
    same everywhere, so all ranks leave the loop at the same step.

    Args:
        runtime: this process.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.received = 0
        self._time, self._ending = 0.0, False
        self._pending: Any = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._previous: dict[int, Any] = {}

    def install(self) -> StopSignal:
        """Take over the three signals; return self."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def ending(self) -> None:
        """Give Ctrl-C back; the others, which a launcher sends to the peers of a failed rank, stay without effect."""
        self._ending = True
        self._restore([signal.SIGINT])

    def restore(self) -> None:
        """Give the signals back."""
        self._restore(list(self._previous))

    def _restore(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.received == signal.SIGINT
        if again and time.monotonic() - self._time > _SAME_SIGNAL_S:
            os._exit(128 + number)
        if not self.received:
            self.received, self._time = number, time.monotonic()
            if self._ending:
                return
            os.write(
                2, f"\n{signal.Signals(number).name}: saving and stopping; a second Ctrl-C ends at once\n".encode()
            )

    def agreed(self) -> bool:
        """Return whether any rank had been asked to stop when it finished the previous step (alone: by now)."""
        if self._runtime.world_size == 1:
            return self.received > 0
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor([self.received], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._runtime.control, async_op=True)
        return stop

    def finish(self) -> None:
        """Wait for the message still under way, before the process group is left."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


def require_agreement(runtime: Runtime, facts: Mapping[str, str]) -> None:
    """Compare facts (configuration, code, data fingerprints) over all ranks at the start.

    Args:
        facts: name -> value on this rank.

    Raises:
        RuntimeSetupError: on every rank, naming what differs where.
    """
    if runtime.world_size == 1:
        return
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, dict(facts), group=runtime.control)
    for name in sorted({k for g in gathered for k in g}):
        values = [g.get(name, "") for g in gathered]
        if len(set(values)) > 1:
            shown = ", ".join(f"rank {r}: {v}" for r, v in enumerate(values))
            raise RuntimeSetupError(
                f"{name} must be equal on all ranks but is not ({shown}); start every node from the same files"
            )


def broadcast_bytes(runtime: Runtime, data: bytes | None) -> bytes | None:
    """Send bytes (or None) from rank 0 to all ranks, which all return them."""
    if runtime.world_size == 1:
        return data
    size = torch.tensor([-1 if data is None else len(data)], dtype=torch.int64)
    dist.broadcast(size, 0, group=runtime.control)
    if size.item() < 0:
        return None
    buffer = torch.empty(int(size.item()), dtype=torch.uint8)
    if data is not None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, 0, group=runtime.control)
    return buffer.numpy().tobytes()
