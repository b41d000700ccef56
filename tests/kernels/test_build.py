"""The build says what it built and never fails for lack of a compiler; a library is used only whole and new."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build
from kernels.library import fused_devices
from kernels.seal import SealError, read_seal, seal

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
NOTES = {"parts": ["CPU"], "seconds": 9.4, "missing": "no nvcc found"}


def copy_of_build(folder: Path) -> dict[str, str]:
    """A checkout with sources but no library; the environment without what would steer a build."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "AVSF_CUDA")}


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m kernels.build` in a copy of the sources."""
    clean = copy_of_build(folder)
    command = [sys.executable, "-m", "kernels.build", *words]
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)


def compiler_of_words(folder: Path) -> Path:
    """A stand-in that writes its process number to every output, slowly: what two builds could mix shows."""
    script = folder / "compiler"
    output = 'while [ "$1" != -o ]; do shift; done'
    script.write_text(f'#!/bin/sh\n{output}\nfor i in 1 2 3 4; do echo "$PPID" >> "$2"; sleep 0.02; done\n')
    script.chmod(0o755)
    return script


@pytest.mark.integration
def test_without_a_compiler_it_says_so_and_succeeds(tmp_path: Path) -> None:
    done = run(tmp_path, **NOWHERE)
    assert done.returncode == 0
    assert "nothing built, no C++ compiler (g++) found" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.integration
def test_cuda_wanted_but_missing_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, **NOWHERE, AVSF_CUDA="1")
    assert done.returncode == 1
    assert "no nvcc" in done.stderr


@pytest.mark.integration
def test_cuda_wanted_but_no_cpp_compiler_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to("/bin/true")
    done = run(tmp_path, PATH=str(tmp_path / "bin"), CUDA_HOME="/nowhere", AVSF_CUDA="1")
    assert done.returncode == 1
    assert "no C++ compiler (g++) found; install g++ or set CXX" in done.stderr


@pytest.mark.integration
def test_failing_compiler_leaves_the_reference(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="false", AVSF_CUDA="0")
    assert done.returncode == 0
    assert "the reference backend is used" in done.stdout


@pytest.mark.integration
def test_launcher_before_the_compiler_and_what_is_missing_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, CXX=f"env {compiler_of_words(tmp_path)}", AVSF_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kernels: built CPU: ")
    assert "no CUDA part (AVSF_CUDA=0)" in done.stdout


@pytest.mark.integration
def test_two_builds_at_once_leave_one_whole_library(tmp_path: Path) -> None:
    compiler = compiler_of_words(tmp_path)
    environment = copy_of_build(tmp_path) | {"CXX": str(compiler), "AVSF_CUDA": "0"}
    command = [sys.executable, "-m", "kernels.build"]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"kernels: built CPU")
        process.stdout.close()
    (library,) = tmp_path.rglob("*.so")  # nothing temporary stays
    assert read_seal(library)["parts"] == ["CPU"]
    assert len(set(library.read_bytes().split())) == 1


def test_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSF_CUDA", "yes")
    with pytest.raises(RuntimeError, match="must be 0, 1 or auto"):
        build.build()


def test_torch_is_found_without_import() -> None:
    assert build.torch_folder() == Path(torch.__file__).parent


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sealed file in the library's place, made from present sources."""
    path = tmp_path / build.LIBRARY.name
    path.write_bytes(bytes(range(256)) * 40)
    seal(path, NOTES | {"sources": build.source_digest()})
    monkeypatch.setattr(build, "LIBRARY", path)
    return path


def test_whole_library_is_described(library: Path) -> None:
    state = build.library_state()
    assert state.parts == ("CPU",)
    size = f"{library.name}, 0.0 MiB, compiling took 9 s"
    assert state.text == f"kernels: built CPU: {size}; no CUDA part (no nvcc found)"


@pytest.mark.parametrize("harm", ["truncated", "empty", "zeroed", "foreign", "stale"])
def test_harmed_library_is_refused_in_one_sentence(
    harm: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = library.read_bytes()
    if harm == "stale":
        shutil.copytree(build.SOURCES, tmp_path / "csrc")
        with (tmp_path / "csrc" / "cpu.cpp").open("a") as file:
            file.write("// edited\n")
        monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    else:
        harmed = {"truncated": data[:-1000], "empty": b"", "zeroed": data[:5000] + bytes(200) + data[5200:]}
        library.write_bytes(harmed.get(harm, b"\x7fELF" + data[4:9000]))
    reason = {"zeroed": "it is damaged", "stale": "kernels/csrc or the flags changed since it was built"}
    state = build.library_state()
    assert state.parts == ()
    expected = reason.get(harm, "it is cut off or comes from another build")
    assert state.text == f"kernels: {library.name} is refused ({expected}); run `python -m kernels.build`"


def test_seal_returns_its_notes_and_leaves_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    seal(path, {"parts": ["CPU", "CUDA"], "seconds": 1.5})
    assert read_seal(path) == {"parts": ["CPU", "CUDA"], "seconds": 1.5}
    assert path.read_bytes() == b"contents"
    path.write_bytes(b"c0ntents")
    with pytest.raises(SealError, match="damaged"):
        read_seal(path)


def test_only_what_is_needed_is_built(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda: "built anew")
    monkeypatch.delenv("AVSF_CUDA", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build_if_needed() == build.library_state().text
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("nvcc"))  # installed since
    assert build.build_if_needed() == "built anew"
    seal(library, read_seal(library) | {"missing": build.DID_NOT_COMPILE})
    assert build.build_if_needed() == build.library_state().text
    monkeypatch.setenv("AVSF_CUDA", "1")  # and the library has no CUDA part
    assert build.build_if_needed() == "built anew"
    monkeypatch.setenv("AVSF_CUDA", "auto")
    library.unlink()
    assert build.library_state().text.startswith("kernels: no library of fused operations is built; run `python -m")
    assert build.build_if_needed() == "built anew"


@pytest.mark.integration
def test_refused_library_is_said_once_and_the_reference_runs(tmp_path: Path) -> None:
    environment = copy_of_build(tmp_path)
    (tmp_path / "kernels" / build.LIBRARY.name).write_bytes(b"\x7fELF" + bytes(5000))
    code = (
        "import torch\nfrom kernels.modules import GhostBatchNorm, set_backend\n"
        "x = torch.randn(8, 4, 2, 2, 2).to(memory_format=torch.channels_last_3d)\n"
        "print(set_backend('auto'), GhostBatchNorm(4)(x).mean().abs().item() < 1e-6)\n"
        "try:\n    set_backend('fused')\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    warnings = [line for line in done.stderr.splitlines() if "kernels:" in line]
    assert len(warnings) == 1
    assert "is refused (it is cut off or comes from another build); run `python -m kernels.build`" in warnings[0]
    chosen, error = done.stdout.splitlines()
    assert chosen == "reference True"
    assert "'fused' needs the built library" in error
    assert "is refused" in error


def test_library_of_this_checkout_is_fit_for_use() -> None:
    """A refused library would make the tests of the fused operations skip."""
    assert build.library_state().parts or not build.LIBRARY.exists(), build.library_state().text


def test_sources_include_only_light_headers() -> None:
    """What keeps the build short and the library free of a torch version: the stable ABI, no ATen, no c10."""
    allowed = ("torch/csrc/stable/", "cuda_")
    text = "\n".join(path.read_text() for path in sorted(build.SOURCES.iterdir()) if path.is_file())
    names = [line.split("<")[1].split(">")[0] for line in text.splitlines() if line.startswith("#include <")]
    assert len(names) >= 10
    assert [n for n in names if ("/" in n or n.endswith(".h")) and not n.startswith(allowed)] == [
        "cpuid.h",
        "immintrin.h",
    ]


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


RAISE = """
import torch, kernels.modules
x = torch.randn(8, 16, 2, 3, 3).to(memory_format=torch.channels_last_3d)
for call in (lambda: torch.ops.avsf.bn_stats(x, 3), lambda: torch.ops.avsf.bn_stats(x.contiguous(), 1)):
    try:
        call()
    except RuntimeError as error:
        print("8 clips must be a multiple of 3" in str(error), "channels_last" in str(error))
"""


@pytest.mark.integration
@pytest.mark.skipif("cpu" not in fused_devices(), reason="no library of fused operations is built here")
def test_errors_come_out_of_a_library_built_against_the_static_cpp_library(tmp_path: Path) -> None:
    """As on a host whose compiler links it: two copies of streams in one process ended it with the first message."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@" -O0\n')  # the optimization is not what matters
    compiler.chmod(0o755)
    done = run(tmp_path, AVSF_CUDA="0", CXX=str(compiler))
    assert "built CPU" in done.stdout, done.stdout + done.stderr
    library = next(tmp_path.rglob("*.so"))
    names = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True).stdout
    assert [line for line in names.splitlines() if "_ZNSo" in line or "locale" in line or "codecvt" in line] == []
    said = subprocess.run([sys.executable, "-c", RAISE], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.split("\n")[:2] == ["True False", "False True"], said.stdout + said.stderr
