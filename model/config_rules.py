"""Values of a configuration against the annotations and metadata of its fields: types, choices, limits.

The strict reader of YAML files goes by the same annotations and metadata and names file and line; this is for
configurations that are built in Python.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

_KINDS: Final = {int: "whole number", float: "finite number", str: "name", bool: "true-or-false value"}
_LIMITS: Final = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


class ModelConfigError(ValueError):
    """A model configuration that describes no model; the message gives the value, the rule and a remedy."""


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise unless `holds`.

    Args:
        holds: whether the value keeps the rule.
        name: of the key.
        value: as it is shown.
        rule: what it must do, and a remedy where there is one.
    Raises:
        ModelConfigError: with key, value and rule.
    """
    if not holds:
        shown = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else value  # as a file has it
        raise ModelConfigError(f"{name} ({shown}) must {rule}")


def check_fields(config: Any) -> None:
    """Check every field of a dataclass by itself; a list holds nothing twice.

    Args:
        config: an instance whose annotations are int, float, str, bool, Literal or tuple[one of these, ...]; metadata
            "ge", "gt", "le", "lt" limit a number (of a list: each), "hint" ends the message about a wrong choice.
    Raises:
        ModelConfigError: on the first broken rule.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if get_origin(hint) is tuple:
            _check_list(field.name, value, get_args(hint)[0], field.metadata)
            continue
        kind, choices = _kind(hint)
        require(_is(kind, value), field.name, repr(value), f"be a {_KINDS[kind]}")
        require(not choices or value in choices, field.name, value, f"be one of {_joined(choices)}")
        _check_limits(field.name, value, field.metadata)


def _kind(hint: Any) -> tuple[type, tuple[Any, ...]]:
    """Type of a value, and its choices if they are listed."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return (type(choices[0]) if choices else hint), choices


def _check_list(name: str, value: object, item: Any, metadata: Mapping[str, Any]) -> None:
    kind, choices = _kind(item)
    good = isinstance(value, tuple) and all(_is(kind, v) for v in value)
    require(good, name, repr(value), f"be a list of {_KINDS[kind]}s")
    assert isinstance(value, tuple)
    require(len(set(value)) == len(value), name, value, "name nothing twice")
    if choices:
        hint = f" ({metadata['hint']})" if "hint" in metadata else ""
        require(set(value) <= set(choices), name, value, f"name only {_joined(choices)}{hint}")
    for number in value:
        _check_limits(name, number, metadata)


def _check_limits(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    for key, (holds, words) in _LIMITS.items():
        if key in metadata:
            require(holds(value, metadata[key]), name, value, f"be {words} {metadata[key]:g}")


def _is(kind: type, value: object) -> bool:
    """Whether value is of this kind: whole numbers are numbers as well, true and false are not, nor are nan and inf."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _joined(choices: tuple[Any, ...]) -> str:
    return ", ".join(map(str, choices))
