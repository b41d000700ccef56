"""Training, evaluation and tracking: the commands `python -m experiments.NAME`."""

import signal
import sys

# While `python -m experiments.NAME` imports its module (sys.argv[0] is then "-m"; seconds, mostly torch), Ctrl-C ends
# the process without a traceback. The command then calls `heed_interrupts`.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
