"""The import rules of the house: kernels <- model <- experiments -> pipeline; benchmarks and tests on top."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "model", "kernels", "experiments", "benchmarks", "tests")

# What each package may import beside itself and the standard library.
ALLOWED = {
    "kernels": {"torch"},
    "model": {"numpy", "torch", "torchvision", "safetensors", "kernels"},
    "pipeline": {"numpy", "torch", "torchaudio", "nvidia", "av", "pyarrow"},
    "experiments": {
        "pipeline", "model", "kernels", "numpy", "torch", "yaml", "rich", "matplotlib", "psutil", "pynvml", "av",
        "sklearn",
    },
}  # fmt: skip
# Heavy or optional imports that only one module may make.
ONLY_IN = {
    "mlflow": {"experiments/records/tracking.py", "experiments/track.py"},
    "apex": {"kernels/apex_support.py"},
    "torchvision": {"model/heads.py"},
    "onnx": {"model/export.py"},
}


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers; name the package"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        own = path.relative_to(ROOT).as_posix()
        special = {name for name, places in ONLY_IN.items() if own in places}
        foreign = imports_of(path) - set(sys.stdlib_module_names) - ALLOWED[package] - {package} - special
        assert not foreign, f"{own} imports {sorted(foreign)}, which {package} may not"


def test_special_imports_stay_in_their_modules() -> None:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            own = path.relative_to(ROOT).as_posix()
            for name in imports_of(path) & set(ONLY_IN):
                assert own in ONLY_IN[name], f"{own} imports {name}; only {sorted(ONLY_IN[name])} may"


def test_nothing_imports_benchmarks_or_tests() -> None:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            above = imports_of(path) & {"benchmarks", "tests"}
            assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)} from above"


def test_every_test_asserts_something() -> None:
    """A test without assert, raises or a call of a checking helper would pass whatever happens."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                checks = [n for n in ast.walk(node) if isinstance(n, (ast.Assert, ast.With, ast.Call))]
                assert checks, f"{path.relative_to(ROOT)}::{node.name} checks nothing"
