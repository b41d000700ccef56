"""The import rules of the house: kernels <- model <- experiments -> pipeline, the arrows between rooms, no circles.

Rules are functions of (module -> what it imports), so that planted mistakes show that they can fail.
"""

import ast
import graphlib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Imports = Mapping[str, frozenset[str]]

# What each package may import beside itself and the standard library.
ALLOWED = {
    "kernels": {"torch"},
    "model": {"numpy", "torch", "torchvision", "safetensors", "kernels"},
    "pipeline": {"numpy", "torch", "torchaudio", "nvidia", "av", "pyarrow"},
    "experiments": {
        "pipeline", "model", "kernels", "numpy", "torch", "yaml", "rich", "matplotlib", "psutil", "pynvml", "av",
        "sklearn", "PIL",
    },
}  # fmt: skip
# Heavy or optional imports that only one module may make.
ONLY_IN = {
    "mlflow": {"experiments/records/shipping.py", "experiments/track.py"},
    "apex": {"kernels/apex_support.py"},
    "torchvision": {"model/heads.py"},
    "onnx": {"model/export.py"},
    "PyNvVideoCodec": {"pipeline/nvdec/hardware.py"},
    "triton": {"pipeline/frames/triton_frames.py"},
}
PACKAGES = (*ALLOWED, "benchmarks")

# What each room may import of its own package; "pipeline" and "experiments" alone are the flat modules.
ARROWS = {
    "pipeline/media": set(),
    "pipeline/annotations": set(),
    "pipeline/store": {"pipeline/media", "pipeline.dataset"},
    "pipeline/folder": {"pipeline/media", "pipeline/annotations", "pipeline.dataset", "pipeline.store.durable"},
    "pipeline/ingest": {"pipeline/store", "pipeline/media", "pipeline/annotations", "pipeline.dataset"},
    "pipeline/nvdec": {"pipeline/media", "pipeline.clip", "pipeline.dataset", "pipeline.source"},
    "pipeline/workers": {"pipeline.clip", "pipeline.dataset", "pipeline.media.reading", "pipeline.source"},
    "pipeline/frames": {"pipeline.clip", "pipeline.source"},
    "pipeline/synthetic": {"pipeline/media", "pipeline/store", "pipeline.dataset", "pipeline.draw"},
    "pipeline": {"pipeline", "pipeline/nvdec", "pipeline.media.reading"},
    "experiments/cli": set(),
    "experiments.config": {"experiments/cli"},
    "experiments.runtime": {"experiments/cli", "experiments.config"},
    "experiments/tasks": {"experiments/cli", "experiments.config", "experiments.runtime"},
    "experiments/records": {"experiments/cli", "experiments.config", "experiments.runtime", "experiments/tasks"},
    "experiments/engine": {
        "experiments/cli", "experiments.config", "experiments.runtime", "experiments/tasks", "experiments/records",
    },
    "experiments": {
        "experiments/cli", "experiments.config", "experiments.runtime", "experiments/tasks", "experiments/records",
        "experiments/engine",
    },
}  # fmt: skip
# Modules of the clip path that may know rooms: the makers of data, the door that opens it, who starts the workers.
DOORS = {
    "pipeline.open": {"pipeline/store", "pipeline/folder", "pipeline/workers", "pipeline/synthetic"},
    "pipeline.feed": {"pipeline/workers", "pipeline/frames"},
    "pipeline.loader": {"pipeline/frames"},
}


def is_type_checking(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST) -> Iterable[ast.AST]:
    """Every node that can run, at any depth."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def imported(source: str, modules: frozenset[str]) -> frozenset[str]:
    """Dotted names that a file imports; of `from package import name` the module `package.name` where there is one."""
    names: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layers; name the package"
            package = node.module or ""
            for alias in node.names:
                full = f"{package}.{alias.name}"
                names.add(full if full in modules else package)
    return frozenset(names)


def module_name(path: Path) -> str:
    """`pipeline/store/reader.py` as `pipeline.store.reader`; a package as itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def house() -> Imports:
    """What every module of the packages imports."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = frozenset(module_name(path) for path in files)
    return {module_name(path): imported(path.read_text(encoding="utf-8"), names) for path in files}


def room(module: str) -> str:
    """`pipeline/store` of a module in a folder, `pipeline` of a flat one; flat ones with rules of their own as such."""
    parts = module.split(".")
    folder = "/".join(parts[:2])
    if folder in ARROWS:
        return folder
    return module if module in ARROWS else parts[0]


def wrong_arrows(imports: Imports) -> list[str]:
    """Imports that point against the arrows between rooms."""
    found = []
    for module, names in imports.items():
        own = room(module)
        if own.split("/")[0].split(".")[0] not in ("pipeline", "experiments"):
            continue
        allowed = ARROWS[own] | DOORS.get(module, set())
        for name in names:
            same_package = name.split(".")[0] == module.split(".")[0] and name != module.split(".")[0]
            if same_package and room(name) != own and not {room(name), name} & allowed:
                found.append(f"{module} imports {name}")
            elif same_package and own == "experiments" and room(name) == own:
                found.append(f"{module} imports the command {name}")
    return sorted(found)


def circle(imports: Imports) -> list[str]:
    """One circle of imports, empty where there is none."""
    try:
        graphlib.TopologicalSorter({m: [n for n in names if n in imports] for m, names in imports.items()}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    modules = {m: names for m, names in house().items() if m.split(".")[0] == package}
    assert modules
    for module, names in modules.items():
        own = module.replace(".", "/") + ".py"
        special = {name for name, places in ONLY_IN.items() if own in places}
        tops = {name.split(".")[0] for name in names}
        foreign = tops - set(sys.stdlib_module_names) - ALLOWED[package] - {package} - special
        assert not foreign, f"{own} imports {sorted(foreign)}, which {package} may not"


def test_special_imports_stay_in_their_modules() -> None:
    for module, names in house().items():
        if module.split(".")[0] in ALLOWED:
            own = module.replace(".", "/") + ".py"
            for name in {name.split(".")[0] for name in names} & set(ONLY_IN):
                assert own in ONLY_IN[name], f"{own} imports {name}; only {sorted(ONLY_IN[name])} may"


def test_nothing_imports_benchmarks_or_tests() -> None:
    for module, names in house().items():
        if module.split(".")[0] in ALLOWED:
            above = {name.split(".")[0] for name in names} & {"benchmarks", "tests"}
            assert not above, f"{module} imports {sorted(above)} from above"


def test_rooms_import_along_the_arrows() -> None:
    assert wrong_arrows(house()) == []


def test_no_circles() -> None:
    assert circle(house()) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pipeline.media.probe", "pipeline.store.reader"),
        ("pipeline.store.reader", "pipeline.ingest.pool"),
        ("pipeline.graph", "pipeline.folder.dataset"),
        ("pipeline.annotations.rows", "pipeline.dataset"),
        ("experiments.cli.parser", "experiments.engine.run"),
        ("experiments.records.tracking", "experiments.engine.run"),
        ("experiments.engine.run", "experiments.train"),
        ("experiments.predict", "experiments.evaluate"),
    ],
)
def test_a_planted_upward_import_is_found(module: str, name: str) -> None:
    found = wrong_arrows({module: frozenset({name, "os"})})
    assert len(found) == 1
    assert found[0].startswith(f"{module} imports")


def test_a_planted_circle_is_found() -> None:
    assert "pipeline.loader" in house()
    links = {"pipeline.dataset": frozenset({"pipeline.loader"}), "pipeline.loader": frozenset({"pipeline.dataset"})}
    assert {"pipeline.dataset", "pipeline.loader"} == set(circle(links))


def test_imports_in_functions_count_and_those_for_types_do_not() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    from b import c\n"
    assert imported(text, frozenset({"b.c"})) == {"typing", "b.c"}


def test_the_floor_plan_stays_small() -> None:
    """Rooms, modules and configs; the log of experiments and the door are beside them."""
    for package, most in (("pipeline", 25), ("experiments", 16), ("benchmarks", 36)):
        beside = {"__pycache__", "__init__.py", "__main__.py", "LOG.md"}
        entries = [p.name for p in (ROOT / package).iterdir() if p.name not in beside]
        assert len(entries) <= most, f"{package}/ shows {len(entries)} entries, more than {most}: {sorted(entries)}"


# Tests that can fail ----------------------------------------------------------------------------------------------

# Functions of libraries that raise where something does not hold.
CHECKERS = {"raises", "warns", "fail", "gradcheck", "gradgradcheck", "opcheck"}


def called_names(node: ast.AST) -> set[str]:
    """Names of the functions and methods that are called inside a node."""
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def functions_of(source: str) -> list[ast.FunctionDef]:
    """Every function of a file."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def checks_something(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a function asserts, expects an exception, or calls a helper that does."""
    if any(isinstance(n, ast.Assert | ast.Raise) for n in ast.walk(node)):
        return True
    names = called_names(node)
    return bool(names & (CHECKERS | helpers)) or any(name.startswith("assert_") for name in names)


def checking_helpers(functions: Iterable[ast.FunctionDef]) -> set[str]:
    """Names of helpers that check something, also by way of other helpers."""
    candidates = [f for f in functions if not f.name.startswith("test_")]
    helpers: set[str] = set()
    while True:
        more = {f.name for f in candidates if checks_something(f, helpers)} - helpers
        if not more:
            return helpers
        helpers |= more


def empty_tests(sources: Mapping[str, str]) -> list[str]:
    """Tests that check nothing, by file."""
    functions = {path: functions_of(text) for path, text in sources.items()}
    helpers = checking_helpers(f for found in functions.values() for f in found)
    return [
        f"{path}::{f.name}"
        for path, found in functions.items()
        for f in found
        if f.name.startswith("test_") and not checks_something(f, helpers)
    ]


def test_every_test_asserts_something() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert empty_tests({p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in files}) == []


def test_a_planted_empty_test_is_found() -> None:
    helper = "def helper():\n    assert 1\n"
    text = f"def test_nothing():\n    print(len([1]))\n{helper}def test_something():\n    helper()\n"
    assert empty_tests({"planted.py": text}) == ["planted.py::test_nothing"]
