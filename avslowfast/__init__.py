"""The project for scripts outside the checkout: `from avslowfast.pipeline import open_dataset`.

Inside the checkout the packages are called `pipeline`, `model`, `kernels` and `experiments`. Names as common as these
do not belong into anybody's site-packages, so an installation (`pip install .` or `pip install -e .`) makes them
importable as parts of `avslowfast` only. They are the same source files: this package's loader compiles `from
pipeline.clip import ...` inside them as `from avslowfast.pipeline.clip import ...`. `python -m
avslowfast.experiments.train` works as well.

In one process use one of the two names: a part that was already imported from the checkout is refused.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

__version__ = "0.1.0"
PARTS = ("pipeline", "model", "kernels", "experiments")
_HERE = Path(__file__).resolve().parent
# Installed, the parts lie inside this package; in a checkout beside it.
ROOT = _HERE if (_HERE / "pipeline").is_dir() else _HERE.parent


def _is_part(name: str) -> bool:
    return name.split(".")[0] in PARTS


class _Renamed(ast.NodeTransformer):
    """Imports of the parts under this package's name."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """`from model import x` and `from model.blocks import x`."""
        if node.level == 0 and node.module and _is_part(node.module):
            node.module = f"{__name__}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.AST | list[ast.AST]:
        """`import model.blocks as x`; a plain `import model.blocks` also binds `model`."""
        bound: list[ast.AST] = []
        for alias in node.names:
            if _is_part(alias.name):
                if alias.asname is None:
                    top = ast.alias(alias.name.split(".")[0], None)
                    bound.append(ast.copy_location(ast.ImportFrom(__name__, [top], 0), node))
                alias.name = f"{__name__}.{alias.name}"
        return [node, *bound]


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a file with its imports renamed, always from source: byte code of the checkout has other imports."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the module of this name."""
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(_Renamed().visit(ast.parse(self.get_data(path), path)))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `avslowfast.pipeline...` and its siblings under `ROOT`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a part or of a module in one, None for every other name."""
        own, _, name = fullname.partition(".")
        if own != __name__ or not _is_part(name):
            return None
        self._refuse_twice(name.split(".")[0])
        place = ROOT.joinpath(*name.split("."))
        for file, folders in ((place / "__init__.py", [str(place)]), (place.with_suffix(".py"), None)):
            if file.is_file():
                loader = _Loader(fullname, str(file))
                return importlib.util.spec_from_file_location(
                    fullname, file, loader=loader, submodule_search_locations=folders
                )
        return None

    def _refuse_twice(self, part: str) -> None:
        other = getattr(sys.modules.get(part), "__file__", None)
        if other and Path(other).resolve().parent == (ROOT / part).resolve():
            raise ImportError(
                f"{__name__}.{part} was already imported as `{part}` from {ROOT}; use one of the two names in a process"
            )


if not any(type(finder).__qualname__ == _Finder.__qualname__ and type(finder).__module__ == __name__
           for finder in sys.meta_path):  # fmt: skip
    sys.meta_path.insert(0, _Finder())
