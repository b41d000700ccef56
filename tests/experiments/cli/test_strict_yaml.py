"""The strict reader: PyYAML's traps, places in messages, overrides."""

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.cli.strict_yaml import ConfigError, apply_override, build, read_tree


@dataclass(frozen=True)
class Inner:
    rate: float = field(default=0.1, metadata={"gt": 0.0, "le": 1.0})
    steps: int = field(default=10, metadata={"ge": 0})
    on: bool = False
    name: str = "x"
    mode: Literal["cosine", "steps"] = "cosine"
    stages: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    limit: int | None = None

    def validate(self) -> None:
        if self.steps == 13:
            raise ValueError(f"steps ({self.steps}) must not be 13; use 12")
        if self.rate > 0.8 and self.steps == 1:
            raise ValueError(f"rate ({self.rate}) and steps ({self.steps}) do not fit")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    size: int = 3


def load(text: str, *overrides: str) -> Outer:
    root = read_tree(text, "f.yaml")
    for override in overrides:
        apply_override(root, override)
    return build(Outer, root, presets={"inner": ("preset", {"fast": Inner(steps=99, name="fast")})})


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("rate: 5e-4", "rate", 5e-4),
        ("rate: 1e-1", "rate", 0.1),
        ("rate: 1", "rate", 1.0),
        ("steps: 1e6", "steps", 1_000_000),
        ("steps: 1_000", "steps", 1000),
        ("name: on", "name", "on"),
        ("name: no", "name", "no"),
        ("name: 010", "name", "010"),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("on: true", "on", True),
        ("stages: [res3, on]", "stages", ("res3", "on")),
        ("pair: [3, 4]", "pair", (3, 4)),
        ("limit: 5", "limit", 5),
        ("limit: null", "limit", None),
    ],
)
def test_reads_what_is_written(line: str, key: str, value: object) -> None:
    got = getattr(load(f"inner:\n  {line}\n").inner, key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 3\ninner:\n  ratee: 1\n", "f.yaml:3: unknown key 'inner.ratee'; did you mean 'rate'?"),
        ("size: 3\nsize: 4\n", "f.yaml:2: key 'size' is given twice (first at f.yaml:1)"),
        ("inner: {on: yes}\n", "f.yaml:1: inner.on (yes) must be true or false"),
        ("inner:\n  on: on\n", "f.yaml:2: inner.on (on) must be true or false"),
        ("size: 010\n", "f.yaml:1: size (010) must be a whole number without leading zeros; write 10"),
        ("size: 0x10\n", "f.yaml:1: size (0x10) must be a whole number"),
        ("size: 1.5\n", "f.yaml:1: size (1.5) must be a whole number"),
        ("size: '3'\n", "not a quoted text"),
        ("size: [3]\n", "f.yaml:1: size (a list) must be a whole number, not a list"),
        ("size:\n", "f.yaml:1: size (nothing) must be a whole number, not nothing"),
        ("inner: {rate: .nan}\n", "inner.rate (.nan) must be a number"),
        ("inner: {rate: nan}\n", "inner.rate (nan) must be a number"),
        ("inner: {rate: 1e999}\n", "within the range of a float"),
        ("\n\ninner: {rate: 2}\n", "f.yaml:3: inner.rate (2.0) must be at most 1.0"),
        ("inner:\n  rate: 0\n", "f.yaml:2: inner.rate (0.0) must be greater than 0.0"),
        ("inner:\n  rate: 0.5\n  steps: 13\n", "f.yaml:3: inner: steps (13) must not be 13; use 12"),
        ("inner: {mode: cosin}\n", "must be one of: cosine, steps; did you mean cosine?"),
        ("inner: {pair: [1]}\n", "must be a list of 2 values, not 1"),
        ("inner: 3\n", "f.yaml:1: inner must be a section"),
        ("- 1\n", "the file must hold 'key: value' lines"),
        ("size: !!python/object/apply:os.system ['id']\n", "must not be used"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("size: [1\n", "f.yaml:2:1: not valid YAML"),
        ("size: 3\n\tx: 4\n", "not valid YAML"),
        ("inner: {preset: fst}\n", "inner.preset (fst) must be one of: fast; did you mean fast?"),
    ],
)
def test_refuses_with_place_and_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)


def test_overrides_take_the_same_path_and_name_themselves() -> None:
    assert load("size: 1\n", "size=7", "inner.rate=5e-4", "inner.stages=[a, b]").inner.stages == ("a", "b")
    for override, message in (
        ("inner.ratee=1", "override 'inner.ratee=1': unknown key 'inner.ratee'"),
        ("size=on", "override 'size=on': size (on) must be a whole number"),
        ("size", "must have the form section.key=value"),
        ("size.x=1", "'size.x' must name one value"),
        ("size=[", "override 'size=['"),
    ):
        with pytest.raises(ConfigError, match=r"override") as caught:
            load("size: 1\n", override)
        assert message in str(caught.value)


def test_a_contradiction_is_the_overrides_not_the_files() -> None:
    with pytest.raises(ConfigError, match=r"^override 'inner.steps=13': inner: steps \(13\) must not be 13"):
        load("inner: {steps: 12}\n", "inner.steps=13")
    with pytest.raises(ConfigError, match=r"^override 'inner.steps=1': inner: rate \(0.9\) and steps \(1\) do not fit"):
        load("inner: {rate: 0.9}\n", "inner.steps=1")


def test_all_mistakes_are_said_at_once_each_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        load("size: x\ninner:\n  rate: 2\n  ratee: 1\n", "inner.on=7")
    assert [problem.split(" ", 1)[0] for problem in caught.value.problems] == [
        "f.yaml:1:",
        "f.yaml:3:",
        "f.yaml:4:",
        "override",
    ]
    assert str(caught.value).splitlines() == list(caught.value.problems)


def test_preset_gives_the_defaults_of_its_section() -> None:
    inner = load("inner: {preset: fast, rate: 0.5}\n").inner
    assert (inner.steps, inner.name, inner.rate) == (99, "fast", 0.5)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(load(text), Outer)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 400000, "{a: " * 100000, "".join(" " * i + "a:\n" for i in range(1000))]
)
def test_deep_nesting_is_refused_where_it_is_too_deep(text: str) -> None:
    """Before anything is built: a megabyte of brackets took a time that grew with its square."""
    with pytest.raises(ConfigError, match=r"^x:\d+:\d+: values are nested deeper than 16 levels"):
        read_tree(text, "x")
