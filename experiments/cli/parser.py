"""The command line's parser: mistakes look as all others do. Imports nothing heavy."""

from __future__ import annotations

import argparse
import signal
import sys

EXIT_USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, `error: ...`, and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and exit.

        Args:
            message: what is wrong.

        Raises:
            SystemExit: always, with code 2.
        """
        sys.stderr.write(f"error: {message}; see --help\n")
        raise SystemExit(EXIT_USER_ERROR)


def heed_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on: experiments/__init__.py took that back for the imports."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
