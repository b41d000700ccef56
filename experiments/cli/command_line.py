"""How every command ends: a result, or one line that says what was wrong and what to do."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from experiments.cli.parser import EXIT_USER_ERROR, heed_interrupts

log = logging.getLogger(__name__)


class CommandFailure(RuntimeError):
    """Work that failed although nothing was wrong with what the user asked for; the message is for the user."""


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` and turn expected failures into one line on stderr (a configuration's mistakes: one line each).

    Any other exception is a bug and keeps its traceback. AVSF_TRACEBACK=1 shows it for all.

    Args:
        main: takes the arguments, returns the exit code.
        arguments: default sys.argv[1:].

    Returns:
        What `main` does, or 2 after a mistake of the user or a file that cannot be used (ValueError, OSError), 1 after
        work that failed, 130 after Ctrl-C.
    """
    heed_interrupts()
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (ValueError, OSError, CommandFailure) as error:
        if os.environ.get("AVSF_TRACEBACK") == "1":
            raise
        rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
        for problem in getattr(error, "problems", (str(error),)):
            sys.stderr.write(f"{rank}error: {' '.join(problem.split()) or type(error).__name__}\n")
        sys.stderr.flush()
        return 1 if isinstance(error, CommandFailure) else EXIT_USER_ERROR
    except RuntimeError as error:
        if not getattr(error, "ends_process", False):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(1)  # a thread hangs in the system, and leaving in order would wait for it
