"""NVIDIA apex is told apart from PyPI's project of the same name."""

import sys
from pathlib import Path

import pytest

from kernels.apex_support import ApexError, apex_optimizer, apex_status


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty import folder in front of all others, with any apex forgotten."""
    for name in [n for n in sys.modules if n.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_absent(packages: Path) -> None:
    assert apex_status().state == "absent"
    with pytest.raises(ApexError, match="NVIDIA/apex"):
        apex_optimizer("FusedLAMB")


def test_impostor_is_refused_and_never_imported(packages: Path) -> None:
    write(packages, {"__init__.py": "raise SystemExit('the web toolkit ran')\n"})
    status = apex_status()
    assert status.state == "impostor"
    assert not status.usable
    with pytest.raises(ApexError, match="pip uninstall apex"):
        apex_optimizer("FusedLAMB")


def test_nvidia(packages: Path) -> None:
    write(packages, {"__init__.py": "", "optimizers/__init__.py": "class FusedLAMB:\n    pass\n"})
    assert apex_status().usable
    assert apex_optimizer("FusedLAMB").__name__ == "FusedLAMB"
    with pytest.raises(ApexError, match="it has FusedLAMB"):
        apex_optimizer("FusedMagic")


def test_broken(packages: Path) -> None:
    write(packages, {"__init__.py": "", "optimizers/__init__.py": "raise ImportError('no amp_C')\n"})
    assert apex_status().state == "broken"
    with pytest.raises(ApexError, match="amp_C"):
        apex_optimizer("FusedLAMB")
