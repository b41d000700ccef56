"""Training, evaluation and tracking: the commands `python -m experiments.NAME`."""

import importlib.util
import os
import signal
import sys


def _packages_problem() -> str:
    """Return what to do where this Python lacks the packages, as the system's does; empty where it has them."""
    missing = [name for name in ("yaml", "numpy", "torch") if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    home = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".venv", "bin")
    ready = os.path.exists(os.path.join(home, "python"))
    remedy = f"use {home}/python, or first: source {home}/activate" if ready else "first: make install"
    return f"error: {sys.executable or 'this Python'} must have the packages {', '.join(missing)} and has not; {remedy}"


if sys.argv[:1] == ["-m"] and (_problem := _packages_problem()):
    sys.stderr.write(_problem + "\n")
    raise SystemExit(2)

# While `python -m experiments.NAME` imports its module (sys.argv[0] is then "-m"; seconds, mostly torch), Ctrl-C ends
# the process without a traceback. The command then calls `heed_interrupts`.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# OpenMP's threads spin for a moment while they wait, then sleep, as they must be told before torch is loaded: where
# another program has one of their cores, a spinning thread waits for one that cannot run. GNU's default is 300,000
# turns; none at all costs a third of an idle machine's speed, so many 6 % (`python -m benchmarks.threads`).
SPIN_TURNS = 20_000
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_TURNS)

# With AMX, oneDNN of torch 2.14 computes some bfloat16 convolutions of grouped pixels from memory that nobody wrote.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # the most it may use, not the least

# A command that was started without standard streams (`<&- >&- 2>&-`) has nobody to talk to, but works: without this,
# sys.stderr is None, and the next file that is opened gets number 2, into which libraries write.
if sys.argv[:1] == ["-m"]:
    for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, _name) is None:
            _descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free number: that of the missing stream
            os.set_inheritable(_descriptor, _descriptor < 3)
            setattr(sys, _name, os.fdopen(_descriptor, _mode))
