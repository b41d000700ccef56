"""Files as commands read them: regular ones, of a bounded size. A FIFO would wait for ever, a device never end."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file.

    Args:
        path: of the file; links are followed.
        most_bytes: a longer file is not read.

    Raises:
        OSError: no regular file, too long, or it cannot be read; the reason is its `strerror`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO does not keep it waiting
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is not None:
            raise OSError(errno.EINVAL, f"it is {kind} and must be a regular file", str(path))
        if found.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes and must have at most {most_bytes}", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)


def near_path(path: Path) -> str:
    """Return "did you mean PATH?" for a path that does not exist and whose folder has a similar name, else ""."""
    parent, missing = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    try:
        names = [entry.name for entry in os.scandir(parent) if not entry.name.startswith(".")]
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.lower(), [name.lower() for name in names], 1, 0.6)
    found = [name for name in names if near and name.lower() == near[0]]
    rest = path.parts[len(parent.parts) + 1 :]
    return f"did you mean {parent.joinpath(found[0], *rest)}?" if found else ""


def near_shipped(path: Path) -> str:
    """Return what to write for a configuration file that is not there, else "".

    Args:
        path: a setting that stands in the file's place, or the bare name of a file of experiments/configs.
    """
    if re.match(r"[a-z_]+(\.[a-z_]+)*=", str(path)):
        return "the file comes first, settings as section.key=value behind it"
    shipped = {other.stem: other for other in (Path(__file__).parents[1] / "configs").rglob("*.yaml")}
    near = difflib.get_close_matches(path.stem, shipped, 1, 0.8)
    return f"did you mean {os.path.relpath(shipped[near[0]])}?" if near else ""


def read_json(data: bytes | str) -> Any:
    """Parse JSON from outside.

    Raises:
        ValueError: it is none, is nested too deep, or holds numbers that are none of Python.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json_file(path: Path, most_bytes: int = 1 << 20) -> Any:
    """Read a small JSON file.

    Args:
        path: of the file.
        most_bytes: a longer file is not read.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read or is no JSON; the message is the reason, without the path.
    """
    try:
        return read_json(read_regular(path, most_bytes))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"no JSON: {(str(error).splitlines() or [''])[0][:120]}") from None
