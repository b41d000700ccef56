"""Reading of annotation text under limits: every error names file:line, the value, the rule and the remedy.

Nothing here evaluates, imports or unpickles anything that a file says.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pipeline.annotations.rows import AnnotationError

MAX_LINE_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
_PICKLES = {".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth"}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?([eE][+-]?[0-9]{1,2})?")
_CLOCK = re.compile(r"([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])(\.[0-9]{1,9})?")


def error(path: Path, line: int, what: str, value: str, rule: str, remedy: str) -> AnnotationError:
    """Return the error ``file:line: what (value) must rule; remedy``; ``line`` 0 = the whole file."""
    where = f"{path}:{line}" if line else str(path)
    return AnnotationError(f"{where}: {what} ({value[:120]!a}) must {rule}; {remedy}")


def place(path: Path, line: int, what: str = "") -> str:
    """Return ``file:line: what`` for a report, with the file's own name only."""
    return f"{path.name}:{line}: {what}" if what else f"{path.name}:{line}"


def open_bytes(path: Path) -> BinaryIO:
    """Open an annotation file; refuses pickles (they run code) and files above 1 GiB.

    Raises:
        AnnotationError: the file is missing, too big, or of a kind that can run code.
    """
    if path.suffix.lower() in _PICKLES:
        remedy = "give the CSV of the same name, which the publisher offers beside it"
        raise error(path, 0, "file", path.name, "be text, for a pickle can run code", remedy)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise error(path, 0, "size", f"{size} bytes", "be at most 1 GiB", "give the annotation file itself")
        return open(path, "rb")
    except OSError as problem:
        remedy = "check the path and the permission to read it"
        raise error(path, 0, "file", problem.strerror or "", "be readable", remedy) from problem


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without line end) of a UTF-8 file, byte order mark removed.

    Raises:
        AnnotationError: not UTF-8, a NUL, or a line above 1 MiB.
    """
    with open_bytes(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(raw) >= MAX_LINE_BYTES:
                raise error(
                    path, number, "line", f"{len(raw)} bytes", "be shorter than 1 MiB", "is this the right file?"
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                bad = repr(raw[problem.start : problem.start + 8])
                raise error(path, number, "text", bad, "be UTF-8", "convert it with iconv") from problem
            if "\x00" in text:
                raise error(path, number, "text", "NUL", "hold no NUL", "download the file again") from None
            yield number, text.rstrip("\r\n")


def read_class_names(path: Path, key_of: Callable[[int], str], name_rule: str, *, once: bool = False) -> list[str]:
    """Return the names of a class list with lines ``key name``, in their order; blank lines are left out.

    Args:
        path: the list. key_of: key of the n-th class, n from 0. name_rule: pattern of a name.
        once: each name may be there once only.
    Raises:
        AnnotationError: no class, a malformed line, a key out of turn, or a name twice.
    """
    names: list[str] = []
    for line, text in read_lines(path):
        if not text.strip():
            continue
        key = key_of(len(names))
        match = re.fullmatch(rf"\s*{re.escape(key)}\s+({name_rule})\s*", text)
        if not match or (once and match.group(1) in names):
            rule = f"look like '{key} name'" + ", each name once" * once
            raise error(path, line, "class", text, rule, "give the official file")
        names.append(match.group(1))
    if not names:
        raise error(path, 0, "class list", "", "have one class a line", "give the official file")
    return names


def read_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of a CSV without header; empty lines are passed over.

    Raises:
        AnnotationError: text that is not CSV (an open quote, a lone carriage return).
    """
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, text in read_lines(path):  # noqa: B007 - the error below names the line
            yield text + "\n"

    reader = csv.reader(lines(), strict=True)
    first = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise error(path, number, "line", str(problem), "be CSV", "check the quotes of this row") from problem
        if cells:
            yield first, cells
        first = number + 1


def read_table(
    path: Path, required: Sequence[str], rows: Iterator[tuple[int, list[str]]] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> cell) of a CSV with header; columns may come in any order.

    Args:
        path: the file.
        required: columns that must be there.
        rows: the cells, where the caller has them already.
    Raises:
        AnnotationError: a required column is missing or twice, or a row has another number of cells.
    """
    rows = read_cells(path) if rows is None else rows
    line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    for name in required:
        if header.count(name) != 1:
            shown = ",".join(header)
            raise error(path, line, "header", shown, f"have the column {name!r} once", "give the official file")
    for line, cells in rows:
        if len(cells) != len(header):
            rule = f"have the {len(header)} cells of the header"
            raise error(path, line, "row", f"{len(cells)} cells", rule, "quote cells that contain commas")
        yield line, dict(zip(header, cells, strict=True))


def parse_int(text: str, what: str, path: Path, line: int, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return an integer within [low, high], written in ASCII digits.

    Raises:
        AnnotationError: anything else.
    """
    stripped = text.strip()
    if _INTEGER.fullmatch(stripped) and low <= (value := int(stripped)) <= high:
        return value
    raise error(path, line, what, text, f"be an integer in [{low}, {high}]", "correct this row")


def parse_float(text: str, what: str, path: Path, line: int, low: float = 0.0, high: float = 1e6) -> float:
    """Return a finite number within [low, high], written in ASCII digits.

    Raises:
        AnnotationError: anything else, NaN and infinity included.
    """
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped) and low <= (value := float(stripped)) <= high:
        return value
    raise error(path, line, what, text, f"be a number in [{low:g}, {high:g}]", "correct this row")


def parse_clock(text: str, what: str, path: Path, line: int) -> float:
    """Return seconds of ``HH:MM:SS`` with an optional fraction of any number of digits.

    Raises:
        AnnotationError: anything else.
    """
    match = _CLOCK.fullmatch(text.strip())
    if not match:
        raise error(path, line, what, text, "be HH:MM:SS or HH:MM:SS.fraction", "correct this row")
    hours, minutes, seconds, fraction = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds + (fraction or ""))
