"""Names in Latin letters, for pictures on a machine that has no font for their script.

Where Unicode calls a character by its sound (Hangul, kana, the scripts of India) that is its transcription: rough, but
enough to tell classes apart. Chinese characters have no sound in Unicode, and others only the names of letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container

UNKNOWN = "?"  # one or more characters without a transcription
_INDIC = "DEVANAGARI|BENGALI|GURMUKHI|GUJARATI|ORIYA|TAMIL|TELUGU|KANNADA|MALAYALAM"
_LETTER = re.compile(rf"(?:{_INDIC}) LETTER (?:VOCALIC )?([A-Z]+)")
_VOWEL = re.compile(rf"(?:{_INDIC}) VOWEL SIGN (?:CANDRA |SHORT |VOCALIC )?([A-Z]+)")
_SIGN = re.compile(rf"(?:{_INDIC}) SIGN ([A-Z]+)")
_DIGIT = re.compile(rf"(?:{_INDIC}) DIGIT")
_KANA = re.compile(r"(?:HIRAGANA|KATAKANA) LETTER (?:SMALL )?([A-Z]+)")
_HANGUL = re.compile(r"HANGUL SYLLABLE ([A-Z]+)")
_SIGN_SOUNDS = {"ANUSVARA": "n", "CANDRABINDU": "n", "BINDI": "n", "VISARGA": "h"}


def transcribed(name: str, lacking: Container[str]) -> str:
    """Return a name with some of its characters transcribed.

    Args:
        name: in any script.
        lacking: the characters to transcribe.

    Returns:
        The name; `?` stands for what has no transcription.
    """
    out = ""
    for character in name:
        out = _append(out, character) if character in lacking else out + character
    return re.sub(rf"(?:{re.escape(UNKNOWN)})+", UNKNOWN, out)


def _append(text: str, character: str) -> str:
    """Return a text with a further character; the vowel of an Indian script takes the place of the inherent a."""
    called = unicodedata.name(character, "")
    if match := _VOWEL.fullmatch(called):
        return text.removesuffix("a") + match[1].lower()
    if match := _SIGN.fullmatch(called):
        return text.removesuffix("a") if match[1] == "VIRAMA" else text + _SIGN_SOUNDS.get(match[1], "")
    if match := _LETTER.fullmatch(called) or _KANA.fullmatch(called):
        return text + match[1].lower()
    if match := _HANGUL.fullmatch(called):
        sound = match[1].lower()
        return text + ("ch" + sound[1:] if sound.startswith("c") else sound)
    if _DIGIT.match(called):
        return text + str(unicodedata.digit(character))
    if called == "KATAKANA-HIRAGANA PROLONGED SOUND MARK" or unicodedata.category(character) == "Mn":
        return text
    plain = unicodedata.normalize("NFKD", character)  # wide forms of Latin letters, and the like
    return text + (plain if plain != character and plain.isascii() else UNKNOWN)
