"""Text in pictures: names in any script, without warnings, in the fonts that this machine has.

Characters that no installed font has become white squares, and the number of the class then stands before its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Fonts of the systems for the scripts that DejaVu Sans, which comes with matplotlib, does not have.
FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "Malgun Gothic", "Arial Unicode MS",
    "Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Mangal", "Kohinoor Devanagari",
    "Noto Sans Arabic", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai",
)  # fmt: skip
MISSING = "\u25a1"  # white square
_told: set[str] = set()
log = logging.getLogger(__name__)


@cache
def _installed() -> tuple[tuple[str, str, frozenset[int]], ...]:
    """Family, file and characters of every font that is there, in the order in which they are asked."""
    from matplotlib.font_manager import fontManager, get_font

    files: dict[str, str] = {}
    for entry in fontManager.ttflist:
        if entry.name in FAMILIES and entry.style == "normal" and entry.weight in (400, "normal", "regular"):
            files.setdefault(entry.name, entry.fname)
    found = []
    for family in FAMILIES:
        if family in files:
            found.append((family, files[family], frozenset(get_font(files[family]).get_charmap())))
    return tuple(found)


def missing_in(text: str) -> str:
    """Return the characters of a text that no installed font has, each once."""
    fonts = [characters for _, _, characters in _installed()]
    return "".join(dict.fromkeys(c for c in text if not c.isspace() and not any(ord(c) in own for own in fonts)))


def shown(name: str, number: int | None = None) -> str:
    """Return a name as it can be drawn.

    Args:
        name: in any script.
        number: of the class; put before a name that has characters without a font.
    """
    lacking = missing_in(name)
    if not lacking:
        return name
    script = f"U+{ord(lacking[0]) & ~0xFF:04X}"
    if script not in _told:  # once a block of characters
        _told.add(script)
        log.info(
            "no installed font has %r of %r: pictures show %s and numbers; install fonts for it "
            "(Debian: fonts-noto-cjk, fonts-noto-core)", lacking[0], name, MISSING,
        )  # fmt: skip
    drawn = "".join(MISSING if c in lacking else c for c in name)
    return drawn if number is None else f"{number}: {drawn}"


def font_file(text: str) -> str:
    """Return the file of the first font that has every character of a text, else of the first one."""
    fonts = _installed()
    wanted = {ord(c) for c in text if not c.isspace()}
    return next((file for _, file, characters in fonts if wanted <= characters), fonts[0][1])


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw and save figures inside: fonts with fallbacks, and a `$` in a name is a `$`."""
    import matplotlib

    values: Any = {"font.family": [family for family, _, _ in _installed()], "text.parse_math": False}
    with matplotlib.rc_context(values):
        yield
