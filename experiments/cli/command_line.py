"""How every command ends: a result, or one line that says what was wrong and what to do."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import IO

from experiments.cli.parser import EXIT_USER_ERROR, heed_interrupts

EXIT_NO_READER = 141  # as of a program that SIGPIPE ends
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
        work that failed (CommandFailure, errors that say `is_for_user`), 130 after Ctrl-C, 141 where what reads
        standard output has ended (`| head -1`).
    """
    try:
        return _run(main, sys.argv[1:] if arguments is None else arguments)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            _let_go(stream)


def _let_go(stream: IO[str]) -> None:
    """Flush a stream; where nobody reads it any more, lead it nowhere, so that the exit code stays that of the work."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _say(text: str) -> None:
    """Write a line to stderr; nobody may be there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _output_has_no_reader() -> bool:
    """Whether standard output is a pipe or socket whose other end is closed."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _rank() -> str:
    """What stands before a line of another rank than 0."""
    return f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""


def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    heed_interrupts()
    try:
        return main(arguments)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except (ValueError, OSError, CommandFailure) as error:
        if os.environ.get("AVSF_TRACEBACK") == "1":
            raise
        if isinstance(error, BrokenPipeError) and _output_has_no_reader():
            return EXIT_NO_READER
        for problem in getattr(error, "problems", (str(error),)):
            _say(f"{_rank()}error: {' '.join(problem.split()) or type(error).__name__}")
        return 1 if isinstance(error, CommandFailure) else EXIT_USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if getattr(error, "is_for_user", False) and os.environ.get("AVSF_TRACEBACK") != "1":
            _say(f"{_rank()}error: {' '.join(str(error).split())}")
            return 1
        if not getattr(error, "ends_process", False):
            raise
        _say(f"error: {error}")
        os._exit(1)  # a thread hangs in the system, and leaving in order would wait for it
