"""The keys of a configuration as a table for the terminal: name, kind, default, rule."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def key_table(cls: type[Any]) -> list[str]:
    """Return one line for every key, aligned: `section.key  default  what it takes`.

    Args:
        cls: dataclass of the whole configuration; fields that are dataclasses are its sections.
    """
    rows = list(_rows(cls, ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:{widths[0]}}  {default:{widths[1]}}  {rule}".rstrip() for name, default, rule in rows]


def _rows(cls: type[Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _rows(typing.cast("type[Any]", hint), f"{prefix}{item.name}.")
            continue
        default = item.default_factory() if item.default is dataclasses.MISSING else item.default  # type: ignore[misc, operator]
        yield f"{prefix}{item.name}", _value(default), _rule(hint, item.metadata)


def _rule(hint: Any, rules: Mapping[str, Any]) -> str:
    bounds = [f"{sign} {rules[rule]}" for rule, sign in _SIGNS.items() if rule in rules]
    return " ".join([_kind(hint), *bounds])


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _kind(part) for part in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin in (dict, Mapping):
        return f"{_kind(arguments[0])}: {_kind(arguments[1])}"
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}.get(hint, "list")


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return "''" if value == "" else str(value)
