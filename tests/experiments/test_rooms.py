"""The arrows inside experiments: cli <- config <- runtime <- tasks <- records <- engine <- commands, and no circles."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ("cli", "config", "runtime", "tasks", "records", "engine")
COMMANDS = len(ORDER)
Arrows = dict[str, set[str]]


def rank(module: str) -> int:
    """Height of a module's room; commands are above all."""
    room = module.split(".")[1]
    return ORDER.index(room) if room in ORDER else COMMANDS


def arrows(sources: dict[str, str]) -> Arrows:
    """Module -> modules of experiments that its text imports, at any depth of the code."""
    found: Arrows = {}
    for module, text in sources.items():
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
        names = {n.module for n in nodes if n.module is not None and n.module.startswith("experiments.")}
        names |= {f"experiments.{a.name}" for n in nodes if n.module == "experiments" for a in n.names}
        found[module] = names
    return found


def complaints(found: Arrows) -> list[str]:
    """What breaks the rules: imports of something higher, imports of a command, circles."""
    lines = [f"{m} imports {n}, which is above it" for m, ns in found.items() for n in ns if rank(n) > rank(m)]
    lines += [f"{m} imports the command {n}" for m, ns in found.items() for n in ns if rank(n) == COMMANDS]
    try:
        list(graphlib.TopologicalSorter(found).static_order())
    except graphlib.CycleError as error:
        lines.append(f"circle: {' -> '.join(error.args[1])}")
    return lines


def tree() -> dict[str, str]:
    """The text of every module of experiments."""
    files = (ROOT / "experiments").rglob("*.py")
    texts = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text(encoding="utf-8") for p in files}
    return {module.removesuffix(".__init__"): text for module, text in texts.items() if module.count(".") > 0}


def test_arrows_point_down_and_there_are_no_circles() -> None:
    found = arrows({m: t for m, t in tree().items() if m != "experiments"})
    assert len(found) > 30
    assert complaints(found) == []


@pytest.mark.parametrize(
    ("module", "line", "word"),
    [
        ("experiments.cli.parser", "from experiments.engine.run import Run", "above"),
        ("experiments.engine.run", "from experiments.train import train", "command"),
        ("experiments.engine.step", "def f():\n    from experiments.engine.graphs import CapturedStep", "circle"),
    ],
)
def test_planted_import_is_found(module: str, line: str, word: str) -> None:
    sources = {m: t for m, t in tree().items() if m != "experiments"}
    sources[module] += f"\n{line}\n"
    assert any(word in complaint for complaint in complaints(arrows(sources)))
