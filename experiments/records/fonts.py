"""Text in pictures: names in any script, without warnings and empty boxes, in the fonts that this machine has.

What no font on the machine has is transcribed (`experiments/records/transcription.py`), behind the number of the class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

from experiments.records.transcription import transcribed

# Fonts of the systems for the scripts that DejaVu Sans, which comes with matplotlib, does not have: asked first.
FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "Malgun Gothic", "Arial Unicode MS",
    "Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Mangal", "Kohinoor Devanagari",
    "Noto Sans Arabic", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai",
)  # fmt: skip
_REGULAR = (400, "normal", "regular")
_told: list[str] = []
log = logging.getLogger(__name__)
T = TypeVar("T")


class Font(NamedTuple):
    """A font of this machine: family, file, and the characters that it has."""

    family: str
    file: str
    characters: frozenset[int]


@cache
def _fonts() -> list[Font]:
    """The fonts that are used, in the order in which they are asked; `_find` adds to them."""
    from matplotlib.font_manager import fontManager

    files: dict[str, str] = {}
    for entry in fontManager.ttflist:
        if entry.name in FAMILIES and entry.style == "normal" and entry.weight in _REGULAR:
            files.setdefault(entry.name, entry.fname)
    found = (_font(family, files[family]) for family in FAMILIES if family in files)
    return [font for font in found if font is not None]


def _font(family: str, file: str) -> Font | None:
    """Return a font with its characters; None where its file cannot be used (gone since, or pictures for letters)."""
    from matplotlib.font_manager import get_font

    with suppress(OSError, RuntimeError, ValueError):
        return Font(family, file, frozenset(get_font(file).get_charmap()))
    return None


@cache
def _others() -> list[tuple[str, str]]:
    """Family and file of every other font, those of regular weight first.

    matplotlib keeps a list of fonts between its starts: one that was installed since is added here.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for file in sorted(set(findSystemFonts()) - known):
        with suppress(OSError, RuntimeError, ValueError):
            fontManager.addfont(file)
    used = {font.file for font in _fonts()}
    entries = [
        entry for entry in fontManager.ttflist if entry.fname not in used and not entry.name.startswith("Last Resort")
    ]
    entries.sort(key=lambda e: (e.name not in FAMILIES, e.style != "normal", e.weight not in _REGULAR, e.name, e.fname))
    return list(dict.fromkeys((entry.name, entry.fname) for entry in entries))


@cache
def _find(character: str) -> bool:
    """Return whether a font has a character, looking through all of the machine where those in use have not."""
    if any(ord(character) in font.characters for font in _fonts()):
        return True
    for family, file in _others():
        font = _font(family, file)
        if font is not None and ord(character) in font.characters:
            _fonts().append(font)
            if _drawing:
                raise _FontAdded
            return True
    return False


class _FontAdded(Exception):
    """A picture is begun that needs a font which was not in use: what is drawn of it already would lack it."""


_drawing: list[bool] = []  # not empty inside `in_plot_style`


def missing_in(text: str) -> str:
    """Return the characters of a text that no font of this machine has, each once."""
    return "".join(dict.fromkeys(c for c in text if not c.isspace() and not _find(c)))


def shown(name: str, number: int | None = None) -> str:
    """Return a name as it can be drawn.

    Args:
        name: in any script.
        number: of the class; stands before the transcription of a name that has characters without a font, or for it.
    """
    lacking = missing_in(name)
    if not lacking:
        return name
    if not _told:  # once
        _told.append(name)
        log.info(
            "no font of this machine has %r of %r: in pictures such names are transcribed, behind the number of the "
            "class; install fonts for them (Debian: fonts-noto-cjk, fonts-noto-core)", lacking[0], name,
        )  # fmt: skip
    drawn = transcribed(name, lacking)
    if number is None:
        return drawn
    return f"{number}: {drawn}" if any(c.isalnum() for c in drawn) else f"class {number}"


def font_runs(text: str) -> list[tuple[str, str]]:
    """Split a text into pieces that one font each can draw.

    Args:
        text: as `shown` returns it.

    Returns:
        (file of the font, piece), in order; the first font where none has a character.
    """
    pieces: list[tuple[Font, str]] = []
    for character in text:
        _find(character)
        last = pieces[-1][0] if pieces else None
        if last is not None and (character.isspace() or ord(character) in last.characters):
            pieces[-1] = (last, pieces[-1][1] + character)
            continue
        font = next((f for f in _fonts() if ord(character) in f.characters), _fonts()[0])
        if font is last:
            pieces[-1] = (font, pieces[-1][1] + character)
        else:
            pieces.append((font, character))
    return [(font.file, piece) for font, piece in pieces]


def in_plot_style(draw: Callable[[], T]) -> T:
    """Return what a function draws in fonts with fallbacks; a `$` in a name is a `$`.

    Args:
        draw: makes and saves a figure; is called again where a name needs a font that was not in use.
    """
    import matplotlib

    while True:
        families = list(dict.fromkeys(font.family for font in _fonts()))
        values: Any = {"font.family": families, "text.parse_math": False}
        _drawing.append(True)
        try:
            with matplotlib.rc_context(values), suppress(_FontAdded):
                return draw()
        finally:
            _drawing.pop()
