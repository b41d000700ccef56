"""One strict way from YAML text and `a.b=value` overrides to frozen dataclasses; every error names file and line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from experiments.cli.files import near_path, near_shipped, read_regular

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")
)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MAX_FILE_BYTES, _MAX_DEPTH = 1 << 20, 16
_SYNONYMS = {"gpu": "cuda"}
_MANY = 12  # choices that are not listed in a message: the near ones are
_OVERRIDE = "override "  # how the place of a value from the command line begins
T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in a configuration file or override; the message starts with its place.

    Attributes:
        problems: the messages, one for every mistake that was found.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Entry:
    """One value as written.

    Args:
        value: a text (scalar), a list or dict of entries, or None (null).
        where: its place, file:line or the override.
        quoted: whether it was written in quotes, so that it is a text and nothing else.
    """

    value: str | list[Entry] | dict[str, Entry] | None
    where: str
    quoted: bool = False


def read_tree(text: str, name: str) -> Entry:
    """Parse YAML `text` into entries that remember their place.

    Args:
        text: YAML of one mapping.
        name: file name for messages.

    Returns:
        The root entry (a dict).

    Raises:
        ConfigError: for bad YAML, duplicate keys, tags, aliases and keys that are not texts.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            _check_events(text, name)
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{name}: not valid YAML: {first}") from None
    if node is None:
        return Entry({}, f"{name}:1")
    root = _entry(node, name)
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.where}: the file must hold 'key: value' lines, not {_kind(root)}")
    return root


def _check_events(text: str, name: str) -> None:
    """Refuse aliases and deep nesting while the text is read, before anything is built of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{name}: YAML aliases (*name) must not be used; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            mark = event.start_mark
            place = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
            raise ConfigError(f"{place}: values are nested deeper than {_MAX_DEPTH} levels; a configuration has 3")


def _entry(node: yaml.Node, name: str) -> Entry:
    where = f"{name}:{node.start_mark.line + 1}"
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{where}: tag {node.tag!r} must not be used; write plain values")
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style in ("'", '"', "|", ">")
        is_null = not quoted and node.value.lower() in ("", "~", "null")
        return Entry(None if is_null else node.value, where, quoted)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(item, name) for item in node.value], where)
    values: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        place = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        key = key_node.value
        if key in values:
            raise ConfigError(f"{place}: key {key!r} is given twice (first at {values[key].where}); remove one")
        values[key] = _entry(value_node, name)
        values[key].where = place
    return Entry(values, where)


def apply_override(root: Entry, override: str) -> None:
    """Set one `a.b=value` in the tree; its place in later messages is the override itself.

    Args:
        root: tree of the file, changed in place.
        override: dotted key, '=', YAML value.

    Raises:
        ConfigError: an override that is no `section.key=value`, or does not name one value.
    """
    where = f"{_OVERRIDE}'{override}'"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{where} must have the form section.key=value, for example train.steps=100")
    try:
        value = read_tree(f"value: {text}", where).value
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).split(': ', 1)[-1]}") from None
    assert isinstance(value, dict)
    entry = value["value"]
    _place(entry, where)
    node = root
    for key in keys[:-1]:
        if not isinstance(node.value, dict):
            raise ConfigError(f"{where}: {path!r} must name one value; {node.where} holds {_kind(node)} there")
        node = node.value.setdefault(key, Entry({}, where))
    if not isinstance(node.value, dict):
        raise ConfigError(f"{where}: {path!r} must name one value; {node.where} holds {_kind(node)} there")
    node.value[keys[-1]] = entry


def _place(entry: Entry, where: str) -> None:
    entry.where = where
    children: list[Entry] = []
    if isinstance(entry.value, dict):
        children = list(entry.value.values())
    elif isinstance(entry.value, list):
        children = entry.value
    for child in children:
        _place(child, where)


def build(cls: type[T], root: Entry, *, presets: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None) -> T:
    """Make the frozen dataclass `cls` from the tree.

    Args:
        cls: dataclass of int, float, bool, str, Literal, tuple[X, ...], X | None, dict[str, X] or dataclasses.
        root: tree of the file.
        presets: section -> (key, name -> instance): `key` in that section picks the instance that gives its defaults.

    Returns:
        An instance.

    Raises:
        ConfigError: naming file and line (unknown key, wrong type, out of range, validate()).
    """
    return typing.cast(T, _dataclass(cls, root, "", presets or {}))


def _dataclass(cls: type[Any], entry: Entry, path: str, presets: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Any:
    title = path or "the file"
    if not isinstance(entry.value, dict):
        raise ConfigError(f"{entry.where}: {title} must be a section of 'key: value' lines, not {_kind(entry)}")
    given = dict(entry.value)
    values: dict[str, Any] = {}
    preset_key = ""
    if path in presets:
        preset_key, choices = presets[path]
        chosen = given.pop(preset_key, None)
        if chosen is not None:
            preset = choices[_choice(chosen, f"{path}.{preset_key}", tuple(choices))]
            values = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    problems: list[str] = []
    for key, child in given.items():
        full = f"{path}.{key}" if path else key
        try:
            if key not in fields:
                known = [*fields, preset_key] if preset_key else list(fields)
                inside = [] if path else _sections_with(key, hints)
                hint = f"did you mean {' or '.join(inside)}?" if inside else _suggest(key, known)
                raise ConfigError(f"{child.where}: unknown key {full!r}; {hint}")
            _check_renamed(child, fields[key].metadata.get("renamed", {}), full)
            values[key] = _value(hints[key], child, full, presets)
            _check_range(values[key], fields[key].metadata, full, child.where)
        except ConfigError as error:  # all mistakes of a file are said at once
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key not in values and required:
            raise ConfigError(
                f"{entry.where}: key {path + '.' if path else ''}{key} is missing and has no default; add it"
            )
    try:
        instance = cls(**values)
        validate = getattr(instance, "validate", None)
        if callable(validate):
            validate()
    except ConfigError:
        raise
    except ValueError as error:
        where = _place_of(str(error), given, entry.where)
        raise ConfigError(f"{where}: {path}: {error}" if path else f"{where}: {error}") from None
    return instance


def _place_of(message: str, given: Mapping[str, Entry], section: str) -> str:
    """Return where the values come from that a message names: an override before the file, which it contradicts."""
    found = ((re.search(rf"\b{re.escape(key)}\b", message), entry.where) for key, entry in given.items())
    named = sorted((match.start(), where) for match, where in found if match)
    overrides = [where for _, where in named if where.startswith(_OVERRIDE)]
    if not named:
        overrides = [entry.where for entry in given.values() if entry.where.startswith(_OVERRIDE)]
    return (overrides or [where for _, where in named] or [section])[0]


def _value(hint: Any, entry: Entry, path: str, presets: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if entry.value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), entry, path, presets)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint), entry, path, presets)
    if origin is Literal:
        return _choice(entry, path, arguments)
    if origin in (tuple, list, Sequence):
        if not isinstance(entry.value, list):
            raise ConfigError(f"{entry.where}: {path} ({_show(entry)}) must be a list; write [a, b]")
        fixed = origin is tuple and len(arguments) > 0 and arguments[-1] is not Ellipsis
        if fixed and len(arguments) != len(entry.value):
            raise ConfigError(
                f"{entry.where}: {path} must be a list of {len(arguments)} values, not {len(entry.value)}"
            )
        hints = arguments if fixed else [arguments[0]] * len(entry.value)
        return tuple(
            _value(h, item, f"{path}[{i}]", presets) for i, (h, item) in enumerate(zip(hints, entry.value, strict=True))
        )
    if origin in (dict, Mapping):
        if not isinstance(entry.value, dict):
            raise ConfigError(f"{entry.where}: {path} ({_show(entry)}) must be a section of 'key: value' lines")
        return {key: _value(arguments[1], item, f"{path}.{key}", presets) for key, item in entry.value.items()}
    return _scalar(hint, entry, path)


def _scalar(hint: Any, entry: Entry, path: str) -> Any:
    text, names = entry.value, {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    problem = f"{entry.where}: {path} ({_show(entry)}) must be {names[hint]}"
    if not isinstance(text, str):
        raise ConfigError(f"{problem}, not {_kind(entry)}")
    if hint is str:
        return text
    if entry.quoted:
        raise ConfigError(f"{problem}, not a quoted text; remove the quotes")
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{problem}; write one of these two words")
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return hint(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise ConfigError(f"{problem} within the range of a float")
        if hint is float:
            return number
        if ("e" in text or "E" in text) and number.is_integer():
            return int(number)
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        raise ConfigError(f"{problem} without leading zeros; write {int(text)}")
    raise ConfigError(f"{problem}; write it in decimal, for example {'100' if hint is int else '0.1 or 5e-4'}")


def _choice(entry: Entry, path: str, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if isinstance(entry.value, str) and entry.value == str(choice):
            return choice
    names, value = [str(c) for c in choices], str(entry.value)
    near = [_SYNONYMS[value]] if _SYNONYMS.get(value) in names else difflib.get_close_matches(value, names, 1)
    shown = f"one of: {', '.join(names)}"
    if len(names) > _MANY:
        near += [name for name in names if value in name and name not in near][: 3 - len(near)]
        near = near or difflib.get_close_matches(value, names, 3, 0.3)
        shown = f"one of {len(names)} names" if near else shown
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"{entry.where}: {path} ({_show(entry)}) must be {shown}{hint}")


def _sections_with(key: str, hints: Mapping[str, Any]) -> list[str]:
    """Return `section.key` for the sections that have a key, at most three: it was written without its section."""
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [
        f"{name}.{key}" for name, hint in sections.items() if key in {field.name for field in dataclasses.fields(hint)}
    ][:3]


def _check_renamed(entry: Entry, renamed: Mapping[str, str], path: str) -> None:
    """Refuse a value that a choice once had, with the name that it has now."""
    new = renamed.get(entry.value) if isinstance(entry.value, str) else None
    if new is not None:
        raise ConfigError(f"{entry.where}: {path} ({entry.value}) is called {new} now; write {path}={new}")


def _check_range(value: Any, rules: Mapping[str, Any], path: str, where: str) -> None:
    if value is None or isinstance(value, bool):
        return
    for item in value if isinstance(value, tuple) else (value,):
        for rule, holds, words in (
            ("ge", lambda v, b: v >= b, "at least"),
            ("gt", lambda v, b: v > b, "greater than"),
            ("le", lambda v, b: v <= b, "at most"),
            ("lt", lambda v, b: v < b, "less than"),
        ):
            if rule in rules and not holds(item, rules[rule]):
                raise ConfigError(f"{where}: {path} ({item}) must be {words} {rules[rule]}; change it")


def _suggest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"


def _show(entry: Entry) -> str:
    return str(entry.value)[:60] if isinstance(entry.value, str) else _kind(entry)


def _kind(entry: Entry) -> str:
    if entry.value is None:
        return "nothing"
    return {dict: "a section", list: "a list", str: f"the value {entry.value!r}"}[type(entry.value)]


def read_config_text(path: Path) -> str:
    """Read a configuration file as UTF-8.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        ConfigError: if it is missing, not UTF-8 or larger than 1 MiB.
    """
    try:
        data = read_regular(path, _MAX_FILE_BYTES)
    except OSError as error:
        hint = (near_path(path) or near_shipped(path)) if isinstance(error, FileNotFoundError) else ""
        if path.is_dir():
            hint = f"did you mean {path / 'config.yaml'}?" if (path / "config.yaml").exists() else ""
        remedy = hint or "give the path of a YAML file"
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); {remedy}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} must be UTF-8 text; byte {error.start} is not") from None
