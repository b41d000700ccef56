"""Training, evaluation and tracking: the commands `python -m experiments.NAME`."""

import os
import signal
import sys

# While `python -m experiments.NAME` imports its module (sys.argv[0] is then "-m"; seconds, mostly torch), Ctrl-C ends
# the process without a traceback. The command then calls `heed_interrupts`.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# OpenMP's threads sleep while they wait, as they must be told before torch is loaded: where another program has one of
# their cores, a spinning thread waits for one that cannot run, and a training step takes five to ten times as long.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"

# With AMX, oneDNN of torch 2.14 computes some bfloat16 convolutions of grouped pixels from memory that nobody wrote.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # the most it may use, not the least
