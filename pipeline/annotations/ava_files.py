"""The file formats of AVA: boxes with labels, excluded time stamps, detected boxes, action lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.annotations.report import ReportBuilder
from pipeline.annotations.rows import AnnotationError
from pipeline.annotations.text import error, parse_float, parse_int, place, read_cells, read_lines

NUM_CLASSES = 80
FIRST_SECOND, LAST_SECOND = 0, 100_000
ROUNDING = 0.01  # boxes may leave the picture by this share of it, from rounding; they are cut off there
_VIDEO = re.compile(r"[A-Za-z0-9_-]{11}")
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*|[0-9]{1,9}|[{}:]|#.*)')
Corners = tuple[float, float, float, float]
KeyFrame = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a box file: key frame, corners as fractions, action from 0 (None = unlabelled), person or score."""

    line: int
    frame: KeyFrame
    corners: Corners | None
    label: int | None
    person: int
    score: float


def read_labelled(path: Path, report: ReportBuilder) -> Iterator[Line]:
    """Yield the lines of ``ava_{train,val}_v2.x.csv``: column 7 is the action from 1, column 8 the **person**.

    A line with empty columns says that nobody is on this key frame; its ``corners`` are None.

    Raises:
        AnnotationError: a malformed line.
    """
    for line, cells in read_cells(path):
        if len(cells) not in (7, 8):
            rule = "have 8 cells: video, second, x1, y1, x2, y2, action, person"
            raise error(path, line, "row", f"{len(cells)} cells", rule, "give the file of the ground truth")
        frame = parse_frame(cells, path, line)
        if not any(cell.strip() for cell in cells[2:7]):
            yield Line(line, frame, None, None, -1, 1.0)
            continue
        label = parse_int(cells[6], "action (column 7)", path, line, 1, NUM_CLASSES) - 1
        person = -1
        if len(cells) == 8 and cells[7].strip():
            person = parse_int(cells[7], "person (column 8)", path, line, 0)
        corners = parse_corners(cells, path, line, report)
        if corners is not None:
            yield Line(line, frame, corners, label, person, 1.0)


def read_detected(path: Path, report: ReportBuilder) -> Iterator[Line]:
    """Yield the lines of a file of detected boxes: column 7 is empty or an action from 1, column 8 the **score**.

    Raises:
        AnnotationError: a malformed line.
    """
    for line, cells in read_cells(path):
        if len(cells) != 8:
            rule = "have 8 cells: video, second, x1, y1, x2, y2, action or nothing, score"
            raise error(path, line, "row", f"{len(cells)} cells", rule, "give the file of detected boxes")
        frame = parse_frame(cells, path, line)
        label = None
        if cells[6].strip() not in ("", "-1"):
            label = parse_int(cells[6], "action (column 7)", path, line, 1, NUM_CLASSES) - 1
        score = parse_float(cells[7], "score (column 8)", path, line, 0.0, 1.0)
        corners = parse_corners(cells, path, line, report)
        if corners is not None:
            yield Line(line, frame, corners, label, -1, score)


def read_excluded(path: Path) -> Iterator[KeyFrame]:
    """Yield the (video, second) pairs of ``ava_{train,val}_excluded_timestamps_v2.x.csv``.

    Raises:
        AnnotationError: a malformed line.
    """
    for line, cells in read_cells(path):
        if len(cells) != 2:
            raise error(
                path, line, "row", f"{len(cells)} cells", "have 2 cells: video, second", "give the official file"
            )
        yield parse_frame(cells, path, line)


def parse_frame(cells: list[str], path: Path, line: int) -> KeyFrame:
    """Return (video, second) of the first two cells.

    Raises:
        AnnotationError: the video is no YouTube id, or the second no number.
    """
    video = cells[0].strip()
    if not _VIDEO.fullmatch(video):
        raise error(path, line, "video", video, "be 11 letters, digits, - or _", "correct this row")
    return video, parse_int(cells[1], "second", path, line, FIRST_SECOND, LAST_SECOND)


def parse_corners(cells: list[str], path: Path, line: int, report: ReportBuilder) -> Corners | None:
    """Return x1, y1, x2, y2 cut off at the picture's edge, or None (and an oddity) for a box without area.

    Raises:
        AnnotationError: a corner that is no fraction (pixels, for example), or corners in the wrong order.
    """
    x1, y1, x2, y2 = (
        min(max(parse_float(cells[2 + i], "box corner", path, line, -ROUNDING, 1.0 + ROUNDING), 0.0), 1.0)
        for i in range(4)
    )
    if x1 > x2 or y1 > y2:
        shown = ",".join(cells[2:6])
        raise error(path, line, "box", shown, "have x1 < x2 and y1 < y2", "correct this row")
    if x1 == x2 or y1 == y2:
        report.oddity("box without area, left out", place(path, line, ",".join(cells[2:6])))
        return None
    return x1, y1, x2, y2


def read_action_list(path: Path) -> dict[int, str]:
    """Return action id (from 1) -> name of a ``.pbtxt``: ``item { name: "..." id: 1 }`` or with ``label_id: 1``.

    Raises:
        AnnotationError: text that is not of this form, an id twice, or an id outside 1 to 80.
    """
    tokens = list(_tokens(path))
    actions: dict[int, str] = {}
    position = 0
    while position < len(tokens):
        line = tokens[position][1]
        if tokens[position][0] not in ("item", "label") or [t for t, _ in tokens[position + 1 : position + 2]] != ["{"]:
            raise error(path, line, "text", tokens[position][0], "be 'item {' or 'label {'", "give the official file")
        position += 2
        fields: dict[str, str] = {}
        while position < len(tokens) and tokens[position][0] != "}":
            part = [token for token, _ in tokens[position : position + 3]]
            if len(part) != 3 or part[1] != ":" or part[0] in fields or part[2] in "{}:":
                raise error(
                    path, tokens[position][1], "field", " ".join(part), "be 'name: value'", "correct this entry"
                )
            fields[part[0]] = part[2]
            position += 3
        if position == len(tokens):
            raise error(path, line, "entry", tokens[-1][0], "end with '}'", "download the file again")
        position += 1
        identity = fields.get("id", fields.get("label_id", ""))
        number = parse_int(identity, "action id", path, line, 1, NUM_CLASSES)
        name = fields.get("name", "").strip('"').strip()
        if not name or number in actions:
            raise error(
                path, line, "entry", f"{number} {name}", "have a name and an id of its own", "correct this entry"
            )
        actions[number] = name
    if not actions:
        raise error(path, 0, "action list", "", "have entries", "give the official file")
    return actions


def _tokens(path: Path) -> Iterator[tuple[str, int]]:
    for line, text in read_lines(path):
        text = text.rstrip()
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                rest = text[position:].strip()
                raise error(path, line, "text", rest, "be a name, number or string", "give the official file")
            position = match.end()
            if not match.group(1).startswith("#"):
                yield match.group(1), line


def overlap(a: Corners, b: Corners) -> float:
    """Return the intersection over union of two boxes, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def check_score(value: float, name: str) -> None:
    """Refuse an option that is no fraction.

    Raises:
        AnnotationError: outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise AnnotationError(
            f"{name} ({value}) must lie in [0, 1]; the paper's protocol has 0.8 for scores, 0.9 for IoU"
        )
