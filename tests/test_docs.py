"""Every path, command, option and configuration key that README and docs name is there."""

import ast
import io
import re
import runpy
import shlex
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.config import Config, flat_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OURS = ("pipeline", "model", "kernels", "experiments", "benchmarks", "tests", "avslowfast")
# What starts a path of this project in running text.
PATH = re.compile(r"(?<![\w./-])((?:docs|tests|\.ci|" + "|".join(OURS) + r")/[\w./-]*[\w/])")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MODULE = re.compile(r"-m ((?:" + "|".join(OURS) + r")[.\w]*)")
MAKE = re.compile(r"\bmake ((?!it\b|them\b|a\b|the\b)[a-z][a-z-]*)\b")
# Words of a page that stand for any subcommand.
STANDS_FOR = {"DATASET": "kinetics400"}
# Made by a command of the page, on the reader's machine.
MADE = ("benchmarks/results/gpu-", "kernels/libavslowfast")


def code_of(page: Path) -> str:
    """Fenced blocks and code spans of a page, a line each."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*fenced, *spans])


def broken_paths(page: Path) -> list[str]:
    """Links and paths of a page that lead nowhere."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    found = [link for link in links if not (page.parent / link).exists()]
    for name in PATH.findall(code_of(page)):
        path = name.split("::")[0].rstrip("/")
        if not path.startswith(MADE) and not (ROOT / path).exists() and not list(ROOT.glob(path + "*")):
            found.append(name)
    return found


def broken_modules(text: str) -> list[str]:
    """Modules after -m that do not exist."""
    return [name for name in MODULE.findall(text) if find_spec(name.rstrip(".")) is None]


def broken_targets(text: str) -> list[str]:
    """Targets of make that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    return [name for name in MAKE.findall(text) if name not in targets]


def broken_keys(text: str) -> list[str]:
    """`section.key=value` whose key no configuration has."""
    keys = set(flat_config(Config()))
    sections = {key.split(".")[0] for key in keys if "." in key}
    given = re.findall(r"(?<![\w./])([a-z_]+)\.([a-z_]+)=", text)
    return [f"{s}.{k}" for s, k in given if s in sections and f"{s}.{k}" not in keys]


def broken_imports(page: Path) -> list[str]:
    """Names that the Python of a page imports from this project and that are not there."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for node in ast.walk(ast.parse(block)):
            module = node.module.removeprefix("avslowfast.") if isinstance(node, ast.ImportFrom) and node.module else ""
            if isinstance(node, ast.ImportFrom) and module.split(".")[0] in OURS:
                names = [alias.name for alias in node.names]
                found += [f"{module}.{name}" for name in names if not hasattr(import_module(module), name)]
    return found


def words_to_read(page: Path) -> int:
    """Words of a page outside tables, code blocks and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    return sum(len(line.split()) for line in text.splitlines() if not line.startswith("|"))


@cache
def help_of(*words: str) -> str:
    """What a command, or a subcommand of it, says of itself; empty where it is none.

    It runs in this process: a process for each command would import torch and DALI each time.
    """
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(io.StringIO()):
        patch.setattr(sys, "argv", [*words, "--help"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
            try:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                return said.getvalue() if end.code in (None, 0) else ""
    raise AssertionError(f"{' '.join(words)} --help must end by itself")


def broken_options(text: str) -> list[str]:
    """Options of this project's commands that the command does not have."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = MODULE.search(line)
        if match is None or match[1].startswith("tests"):
            continue
        words = shlex.split(line[match.end() :], comments=True)
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        if options:
            named = [STANDS_FOR.get(word, word) for word in words]
            subcommand = [word for word in named if re.fullmatch(r"[a-z][a-z0-9_-]*", word)][:1]
            known = help_of(match[1]) + (help_of(match[1], *subcommand) if subcommand else "")
            found += [f"{match[1]} {option}" for option in options if option not in known]
    return found


def test_there_are_pages() -> None:
    assert len(PAGES) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    code = code_of(page)
    assert broken_paths(page) == []
    assert broken_modules(code) == []
    assert broken_targets(code) == []
    assert broken_keys(code) == []
    assert broken_imports(page) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_a_page_is_read_in_minutes(page: Path) -> None:
    assert words_to_read(page) <= 900  # tables aside; details go to a second page or to docstrings


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_have_its_options(page: Path) -> None:
    assert broken_options(code_of(page)) == []


def test_the_picture_is_the_one_that_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_idea.py"))
    assert draw["picture"]() == (ROOT / "docs" / "idea.svg").read_text(encoding="utf-8")
    assert "](docs/idea.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_mistakes_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("See [x](missing.md) and `docs/missing.md`; `pipeline/clip.py` is there.\n")
    assert broken_paths(page) == ["missing.md", "docs/missing.md"]
    page.write_text("```python\nfrom avslowfast.pipeline import Batch, Bacth\n```\n")
    assert broken_imports(page) == ["pipeline.Bacth"]
    page.write_text("| a b | c |\none two\n```\nx y z\n```\nthree\n")
    assert words_to_read(page) == 3
    assert broken_modules("python -m experiments.trian") == ["experiments.trian"]
    assert broken_targets("make quikstart") == ["quikstart"]
    assert broken_keys("optim.learning_rate=1 optim.lr=1") == ["optim.learning_rate"]
    assert broken_options("python -m kernels.build --status --statsu") == ["kernels.build --statsu"]
    assert broken_options("python -m experiments.prepare ava --anotations x") == ["experiments.prepare --anotations"]
