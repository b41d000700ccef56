"""The build says what it built and never fails for lack of a compiler; the library holds what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build
from kernels.library import fused_devices

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m kernels.build` in a copy of the sources, with only the given PATH."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "kernels" / "build.py").write_text((ROOT / "kernels" / "build.py").read_text())
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "AVSF_CUDA")}
    return subprocess.run(
        [sys.executable, "-m", "kernels.build"], cwd=tmp_path, env=clean | environment, capture_output=True, text=True
    )


@pytest.mark.integration
def test_without_a_compiler_it_says_so_and_succeeds(tmp_path: Path) -> None:
    done = run(tmp_path, PATH="/nowhere", CUDA_HOME="/nowhere")
    assert done.returncode == 0
    assert "nothing built, no C++ compiler" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.integration
def test_cuda_wanted_but_missing_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, PATH="/nowhere", CUDA_HOME="/nowhere", AVSF_CUDA="1")
    assert done.returncode != 0
    assert "no nvcc" in done.stderr


@pytest.mark.integration
def test_failing_compiler_leaves_the_reference(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="false", AVSF_CUDA="0")
    assert done.returncode == 0
    assert "the reference backend is used" in done.stdout


def test_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSF_CUDA", "yes")
    with pytest.raises(RuntimeError, match="must be 0, 1 or auto"):
        build.build()


def test_torch_is_found_without_import() -> None:
    assert build.torch_folder() == Path(torch.__file__).parent


@pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
@pytest.mark.integration
def test_every_symbol_is_in_a_cpu_build_of_torch_or_weak() -> None:
    """What the library needs of torch is in libtorch_cpu, what only CUDA builds have is weak; nothing of Python."""
    listing = subprocess.run(["nm", "-D", str(build.LIBRARY)], capture_output=True, text=True, check=True).stdout
    words = [line.split()[-2:] for line in listing.splitlines() if len(line.split()) >= 2]
    needed = {name for kind, name in words if kind == "U" and name.startswith(("aoti_torch", "torch_"))}
    weak = {name for kind, name in words if kind == "w" and name.startswith(("aoti_torch", "torch_"))}
    assert not [name for _, name in words if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))]
    library = build.torch_folder() / "lib" / "libtorch_cpu.so"
    have = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1].split("@")[0] for line in have.splitlines()}
    assert needed <= exported
    assert weak <= {"aoti_torch_get_current_cuda_stream"}
