"""Parts of a model that may start afresh beside weights that lack them: a rule for each; everything else is refused."""

from __future__ import annotations

import re
from collections.abc import Collection

from model.config import ModelConfig

NONLOCAL = re.compile(r"(slow\.stages\.res4\.nonlocal[0-9]+\.)")
STAGE = re.compile(r"(stages\.(\w+)\.)(\w+)\.")
HEADS = re.compile(r"(synchronization\.heads\.\w+\.)")
REASONS = {
    "Non-local blocks": "models with them start from their counterparts without (A.4); their last scale is 0, so "
    "that they change nothing yet",
    "audio": "the weights are of a visual model; without audio the outputs are its own",
    "synchronization": "the weights were trained without this loss",
}


def part_of(key: str, config: ModelConfig) -> tuple[str, str]:
    """Return which part of a model a tensor belongs to, and what the names of its neighbours there begin with.

    Args:
        key: name of the tensor in the model.
        config: of the model.

    Returns:
        a key of `REASONS` and a prefix: the part may be fresh where a source has nothing of that prefix; two empty
        texts for a tensor that must be there.
    """
    if found := NONLOCAL.match(key):
        return "Non-local blocks", found[1]
    if key.startswith(("audio.", "audio_average.")):
        return "audio", "audio."
    if found := HEADS.match(key):
        return "synchronization", found[1]
    if (found := STAGE.match(key)) is None:
        return "", ""
    prefix, stage, child = found.groups()
    if stage not in config.lateral_stages:  # there for the loss alone: F->S as well
        return "synchronization", prefix
    if child == "fast_to_slow":
        return "", ""
    return ("audio", "audio.") if stage in config.audio_fusion_stages else ("synchronization", f"{prefix}{child}.")


def fresh_parts(missing: Collection[str], source: Collection[str], config: ModelConfig) -> dict[str, list[str]]:
    """Sort what a source lacks into parts that may be fresh.

    Args:
        missing: names in the model that the source has not, or with another shape.
        source: names in the source.
        config: of the model.

    Returns:
        part -> its names in `missing`; "" -> what must be in the source.
    """
    found: dict[str, list[str]] = {}
    for key in sorted(missing):
        part, prefix = part_of(key, config)
        allowed = part and not any(name.startswith(prefix) for name in source) and not forbidden(part, config)
        found.setdefault(part if allowed else "", []).append(key)
    return found


def forbidden(part: str, config: ModelConfig) -> str:
    """Return why a part must not be fresh in this training, in words; empty if it may."""
    if config.freeze == "backbone":
        return "model.freeze=backbone trains the classifier alone"
    if config.freeze == "bn" and part == "Non-local blocks":
        return "model.freeze=bn keeps their last scale, which begins at 0, so that they would never do anything"
    return ""
