"""Run the project's CUDA kernels on the CPU: translate .cu files to C++, compile them with the emulation's header.

What it is for: the logic of kernels (indices, fragments, barriers, edges) in tests of machines without a GPU. What it
cannot show: speed, races that only true parallelism brings, the rounding of tensor cores.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kernels import build
from tests.kernels.support.shared import alone

HERE = Path(__file__).parent
HEADER = HERE / "cuda_emulation.h"
FLAGS = [
    "-x",
    "c++",
    "-std=c++20",
    "-O1",
    "-fno-strict-aliasing",
    "-fPIC",
    "-w",
    "-fvisibility=hidden",
    "-DAVSF_WITH_CUDA",
]
LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<[^;{}()]*(?:\([^;{}()]*\)[^;{}()]*)*>)?)\s*<<<(.*?)>>>", re.S)


def cuda_headers() -> Path | None:
    """Folder of cuda_runtime.h and cuda_bf16.h: of the toolkit or of triton's package."""
    places: list[Path] = []
    nvcc = build.find_nvcc()
    if nvcc is not None:
        places += [folder / "include" for folder in build.cuda_runtime(nvcc).parents]
    spec = find_spec("triton")
    places += [Path(p) / "backends/nvidia/include" for p in (spec.submodule_search_locations or [] if spec else [])]
    needed = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_defines.h")
    return next((place for place in places if all((place / name).is_file() for name in needed)), None)


def available() -> bool:
    """Whether kernels can be emulated here: a C++ compiler and CUDA's headers."""
    return shutil.which(build.cxx()[0]) is not None and cuda_headers() is not None


def translate(source: str) -> str:
    """CUDA C++ with its launches written as calls: `k<<<grid, block>>>(x)` becomes `launch(k, grid, block)(x)`."""
    return LAUNCH.sub(r"emulation::launch(\1, \2)", source)


def compile_sources(
    names: Sequence[str],
    folder: Path,
    extra: Sequence[Path] = (),
    flags: Sequence[str] = (),
    plain: Sequence[str] = (),
) -> Path:
    """Compile sources of kernels/csrc with emulated CUDA into one shared library.

    Args:
        names: files of kernels/csrc; .cu files are translated.
        folder: where objects and the library go; what is there from the same sources and flags is used again.
        extra: more C++ files, which see the emulation's header too.
        flags: more compiler flags.
        plain: C++ files of kernels/csrc that are compiled as they are, with torch's headers, and linked with torch.

    Returns:
        the library.

    Raises:
        subprocess.CalledProcessError: it does not compile; the message is on the standard error.
    """
    with alone(folder):
        return _compile(names, folder, extra, flags, plain)


def _compile(
    names: Sequence[str], folder: Path, extra: Sequence[Path], flags: Sequence[str], plain: Sequence[str]
) -> Path:
    headers = cuda_headers()
    assert headers is not None, "CUDA's headers are not here"
    digest = hashlib.sha256(repr((names, [str(e) for e in extra], flags, plain, build.cxx())).encode())
    for path in [*sorted(build.SOURCES.glob("*")), HEADER, Path(__file__), *extra]:
        digest.update(path.read_bytes())
    library = folder / f"emulated_{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    jobs = []
    for path in build.SOURCES.glob("*.cuh"):  # found before the originals: a source's own folder comes first
        (folder / path.name).write_text(translate(path.read_text()))
    for path in [build.SOURCES / name for name in names] + list(extra):
        translated = folder / f"{path.stem}.{path.suffix[1:]}.cpp"
        translated.write_text(translate(path.read_text()))
        words = [*build.cxx(), *FLAGS, *flags, f"-I{build.SOURCES}", f"-isystem{headers}", "-include", str(HEADER)]
        jobs.append([*words, "-c", str(translated), "-o", str(translated.with_suffix(".o"))])
    folder_of_torch = build.torch_folder()
    for name in plain:
        words = [
            *build.cxx(),
            *build.COMMON,
            "-O1",
            "-w",
            "-fvisibility=hidden",
            f"-I{folder_of_torch}/include",
            *flags,
        ]
        jobs.append([*words, "-c", str(build.SOURCES / name), "-o", str(folder / f"{name}.o")])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
    linked, objects = library.with_suffix(".part"), [job[-1] for job in jobs]
    link = [*build.cxx(), "-shared", "-o", str(linked), *objects]
    if plain:
        assert folder_of_torch is not None
        link = build.link_command(folder_of_torch, objects, None, linked)
    subprocess.run(link, check=True)
    return linked.replace(library)


def operations_library(folder: Path) -> Path:
    """Compile every kernel but the stems', as operations of torch and with the C functions of norm_entry.cpp.

    Takes half a minute to minutes.

    Args:
        folder: as for `compile_sources`.
    """
    names = sorted(path.name for path in build.SOURCES.glob("*.cu") if path.name != "cuda_stem.cu")
    extra = [HERE / "emulated_library.cpp", HERE / "norm_entry.cpp"]
    return compile_sources(names, folder, extra, ["-Davsf=avsf_emulated"], ["ops.cpp", "schema.cpp"])


def operations(folder: Path) -> Any:
    """`torch.ops.avsf_emulated`: every operation of the library on CPU tensors, run by the emulated CUDA kernels.

    Without fake tensors and autograd: call the operations themselves.

    Args:
        folder: as for `compile_sources`.
    """
    torch.ops.load_library(str(operations_library(folder)))
    return torch.ops.avsf_emulated


def load(library: Path) -> ctypes.CDLL:
    """The library's C functions; `emulation_order(0 | 1)` sets the order in which warps run."""
    return ctypes.CDLL(str(library))
