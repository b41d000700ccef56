"""The command line's parser: mistakes look as all others do. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

EXIT_USER_ERROR = 2
EXPORT_FORMATS = ("weights", "program", "onnx")
CHECKPOINTS = ("best", "last")  # of a run, as commands name them


def installed_version() -> str:
    """Return the installed version, "unknown" in a checkout that is not installed."""
    try:
        return metadata.version("avslowfast-dali")
    except metadata.PackageNotFoundError:
        return "unknown"


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        sys.stdout.write(f"avslowfast-dali {installed_version()}\n")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, `error: ...`, and exit code 2; `~` of a path is the home folder."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, lambda text: Path(text).expanduser())  # a shell leaves that of --out=~/x

    @classmethod
    def of_command(cls, name: str, text: str | None) -> Parser:
        """Return the parser of a command, its help as written, with `--version`.

        Args:
            name: of the command in `experiments`.
            text: docstring of its module: what it does, examples, remarks.
        """
        parser = cls(
            prog=f"python -m experiments.{name}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
        return parser

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and exit.

        Args:
            message: what is wrong.

        Raises:
            SystemExit: always, with code 2.
        """
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), 1, 0.5) if choice else []
        if near:
            message += f"; did you mean {near[0]}?"
        if any(action.dest == "overrides" for action in self._actions):
            message = message.replace(", section.key=value", "")
        if message.startswith("unrecognized arguments: "):
            options = [text for action in self._actions for text in action.option_strings]
            near = difflib.get_close_matches(message.split()[2], options, 1, 0.7)
            if near:
                message += f"; did you mean {near[0]}?"
            elif any(action.dest == "overrides" for action in self._actions):
                message += "; settings are written section.key=value, such as optim.lr=0.1"
        sys.stderr.write(f"error: {message}; see --help\n")
        raise SystemExit(EXIT_USER_ERROR)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Let Ctrl-C end the process without a traceback while torch and DALI are imported, as it does before `main`."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        yield


def heed_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on: experiments/__init__.py took that back for the imports."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
