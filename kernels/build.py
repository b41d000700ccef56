"""Build the library of fused operations from kernels/csrc: `python -m kernels.build`, and what setup.py calls.

Needs a C++ compiler (CXX, default g++) for the CPU part and nvcc for the CUDA part; what is missing is left out and
said. AVSF_CUDA=0 leaves CUDA out, 1 makes anything less than both parts an error, auto (default) takes it where nvcc is
found. Imports neither torch nor anything compiled.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels.seal import SealError, notes_path, read_seal, seal

__all__ = ["LIBRARY", "LibraryState", "build", "library_state", "torch_folder"]
ABI = 4  # raised with every change of an operation's schema, so that an old library is never loaded
LIBRARY = Path(__file__).parent / f"libavslowfast_kernels_v{ABI}.so"
SOURCES = Path(__file__).parent / "csrc"
COMMON = ["-std=c++20", "-O3", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--extra-device-vectorization", "-Xptxas=-v"]
DID_NOT_COMPILE = "it did not compile"
BUILD_IT = "run `python -m kernels.build`"


@dataclass(frozen=True)
class LibraryState:
    """What the library file is worth, read from the file alone."""

    parts: tuple[str, ...]  # of "CPU", "CUDA"; empty: not to be loaded
    text: str  # one sentence for people
    missing: str = ""  # why there is no CUDA part


def source_digest() -> str:
    """SHA-256, in hex, of everything that the library is made from: sources and flags."""
    flags = [str(ABI), *COMMON, *CUDA_FLAGS, *CUDA_TARGETS, repr(leaf_variants())]
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in sorted(SOURCES.glob("*")):
        if path.is_file():
            digest.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def library_state() -> LibraryState:
    """Whether the library is whole and made from the present sources; reads 5 MB and compiles nothing."""
    if not LIBRARY.is_file():
        return LibraryState((), f"kernels: no library of fused operations is built; {BUILD_IT}")
    try:
        notes = read_seal(LIBRARY)
        if notes.get("sources") != source_digest():
            raise SealError("kernels/csrc or the flags changed since it was built")
    except (SealError, OSError) as problem:
        return LibraryState((), f"kernels: {LIBRARY.name} is refused ({problem}); {BUILD_IT}")
    parts = tuple(notes["parts"])
    size = LIBRARY.stat().st_size / 2**20
    note = "" if "CUDA" in parts else "; no CUDA part" + (f" ({notes['missing']})" if notes["missing"] else "")
    text = f"{' and '.join(parts)}: {LIBRARY.name}, {size:.1f} MiB, compiling took {notes['seconds']:.0f} s{note}"
    return LibraryState(parts, f"kernels: built {text}", notes["missing"])


def cxx() -> list[str]:
    """The C++ compiler's command, which may have a launcher before it: CXX="ccache g++"."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def torch_folder() -> Path | None:
    """Folder of the installed torch package, found without importing it; None where there is none."""
    spec = importlib.util.find_spec("torch")
    places = [Path(p) for p in (spec.submodule_search_locations or [] if spec else [])]
    places.append(Path(sysconfig.get_paths()["purelib"]) / "torch")
    return next((p for p in places if (p / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def find_nvcc() -> Path | None:
    """The CUDA compiler on the path, in CUDA_HOME or in /usr/local/cuda; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    return Path(found) if found else None


def cuda_runtime(nvcc: Path) -> Path:
    """The static CUDA runtime that belongs to this nvcc, which may be a script that calls another one."""
    lines = _run([str(nvcc), "--dryrun", "-c", os.devnull])[1].splitlines()
    tops = [Path(line.split("TOP=", 1)[1].strip()) for line in lines if "TOP=" in line]
    roots = [*tops, nvcc.resolve().parent.parent]
    folders = [root / part for root in roots for part in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    return next((p / "libcudart_static.a" for p in folders if (p / "libcudart_static.a").is_file()), folders[0])


def leaf_variants() -> dict[str, list[str]]:
    """Instruction sets that the CPU leaf loops are compiled for, with their flags; chosen when the library runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"base": []}
    return {
        "base": [],
        "avx2": ["-march=x86-64-v3", "-DAVSF_AVX2"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-DAVSF_AVX512"],
    }


def commands(torch: Path, objects: Path, cuda: Path | None) -> list[list[str]]:
    """One compiler command per object file; the slowest first.

    Args:
        torch: folder of the torch package.
        objects: where the object files go.
        cuda: nvcc, or None for the CPU part only.

    Returns:
        argument lists; the word after "-o" is the object.
    """
    include = f"-I{torch / 'include'}"
    flags = [*COMMON, *WARNINGS, "-fvisibility=hidden", include] + (["-DAVSF_WITH_CUDA"] if cuda else [])
    jobs = []
    if cuda:
        targets = [word for target in CUDA_TARGETS for word in ("-gencode", target)]
        for source in sorted(SOURCES.glob("*.cu")):
            out = str(objects / f"{source.stem}.cu.o")
            jobs.append([str(cuda), *CUDA_FLAGS, *targets, "-DAVSF_WITH_CUDA", "-c", str(source), "-o", out])
    for name, extra in leaf_variants().items():
        defines = [f"-DAVSF_LEAF=leaf_{name}", f'-DAVSF_NAME="{name}"']
        leaf = str(SOURCES / "cpu_leaf.cpp")
        jobs.append([*cxx(), *flags, *defines, *extra, "-c", leaf, "-o", str(objects / f"leaf_{name}.o")])
    for name in ("ops", "cpu", "stem", "schema"):
        jobs.append([*cxx(), *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(objects / f"{name}.o")])
    return jobs


def link_command(torch: Path, objects: list[str], cuda: Path | None, out: Path) -> list[str]:
    """The command that makes the shared library: no Python symbols, static CUDA runtime, torch's own libraries only.

    The C++ library is the one that torch uses, named outright: where a host's compiler would link its static form, two
    copies met in one process, and the first error text that held a number ended it (streams of one, locales of the
    other). Whatever is static all the same keeps its symbols to itself.
    """
    words = [
        *cxx(),
        "-shared",
        "-o",
        str(out),
        *objects,
        f"-L{torch / 'lib'}",
        "-Wl,--exclude-libs,ALL",
        "-Wl,--no-as-needed",
    ]
    words += ["-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed", *shared_cxx_library()]
    if cuda:
        words += [str(cuda_runtime(cuda)), "-ldl", "-lrt", "-lpthread"]
    return words


def shared_cxx_library() -> list[str]:
    """File of the compiler's shared C++ library, where it says that it has one."""
    code, output = _run([*cxx(), "-print-file-name=libstdc++.so.6"])
    path = Path(output.strip())
    return [str(path)] if code == 0 and path.is_absolute() and path.is_file() else []


def build(log_path: Path | None = None) -> str:
    """Compile and link what this machine can, into `LIBRARY`.

    Args:
        log_path: where the compilers' output goes, for reading register counts; None: kept only on an error.

    Returns:
        one sentence that says what was built, in which time, and what was left out, or why nothing was built.

    Raises:
        RuntimeError: AVSF_CUDA=1 and not both parts could be built, or an AVSF_CUDA that is none of 0, 1, auto.
    """
    wish = _wish()
    cuda = find_nvcc() if wish != "0" else None
    if wish == "1" and cuda is None:
        raise RuntimeError("AVSF_CUDA=1 but no nvcc on the path or in CUDA_HOME; install the CUDA toolkit or use auto")
    torch, obstacle = torch_folder(), ""
    if shutil.which(cxx()[0]) is None:
        obstacle = f"no C++ compiler ({' '.join(cxx())}) found; install g++ or set CXX"
    elif torch is None:
        obstacle = "torch is not installed yet"
    if wish == "1" and obstacle:
        raise RuntimeError(f"AVSF_CUDA=1 but nothing can be built: {obstacle}, or use AVSF_CUDA=auto")
    if obstacle or torch is None:
        return f"kernels: nothing built, {obstacle}; {_instead()}"
    for attempt in (cuda, None) if cuda else (None,):
        missing = DID_NOT_COMPILE if cuda else "AVSF_CUDA=0" if wish == "0" else "no nvcc found"
        problem = _compile(torch, attempt, log_path, "" if attempt else missing)
        if not problem:
            with _alone():
                return library_state().text
        sys.stderr.write(problem + "\n")
        if wish == "1":
            raise RuntimeError("AVSF_CUDA=1 but a compiler failed; see its message above")
    return f"kernels: nothing built, the compiler failed (see above); {_instead()}"


def build_if_needed() -> str:
    """`build` where the library is missing, damaged or older than its sources, or lacks a CUDA part that can be built.

    Returns:
        one sentence that says what there is now.

    Raises:
        RuntimeError: as `build`.
    """
    state = library_state()
    wish = _wish()
    can_add = wish == "auto" and state.missing != DID_NOT_COMPILE and find_nvcc() is not None
    wanted = {"CPU", "CUDA"} if wish == "1" or can_add else {"CPU"}
    return state.text if wanted <= set(state.parts) else build()


def _wish() -> str:
    wish = os.environ.get("AVSF_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise RuntimeError(f"AVSF_CUDA ({wish}) must be 0, 1 or auto")
    return wish


def _instead() -> str:
    """What runs after a build that made nothing: an earlier library may still be good."""
    if library_state().parts:
        return "the library that was there stays in use"
    return "the reference backend is used; `python -m kernels.build` builds later"


def _compile(torch: Path, cuda: Path | None, log_path: Path | None, missing: str) -> str:
    """Run the compilers; returns their complaint, empty on success. The library appears in one step, then its notes."""
    started, sources = time.monotonic(), source_digest()  # before: an edit during the build makes the result stale
    with tempfile.TemporaryDirectory() as folder:
        jobs = commands(torch, Path(folder), cuda)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            results = list(pool.map(_run, jobs))
        log = "".join(output for _, output in results)
        if log_path is not None:
            log_path.write_text((log_path.read_text() if log_path.exists() else "") + log)
        if any(code for code, _ in results):
            return log or "the compiler failed without a message"
        linked = Path(folder) / LIBRARY.name
        code, output = _run(link_command(torch, [job[job.index("-o") + 1] for job in jobs], cuda, linked))
        if code:
            return output or "the linker failed without a message"
        parts, seconds = ["CPU", "CUDA"] if cuda else ["CPU"], time.monotonic() - started
        seal(linked, {"parts": parts, "sources": sources, "seconds": round(seconds, 1), "missing": missing})
        with _alone():
            put_in_place(linked, LIBRARY)
            put_in_place(notes_path(linked), notes_path(LIBRARY))
        return ""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other builds from changing library or notes meanwhile: the notes of one belong to no other's library."""
    folder = os.open(LIBRARY.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def put_in_place(made: Path, target: Path) -> None:
    """Copy a finished file beside its target and rename it there: builds at the same time cannot mix.

    Args:
        made: the finished file, on any disk.
        target: replaced in one step.
    """
    beside = target.with_name(f".{os.urandom(8).hex()}{target.suffix}")
    try:
        shutil.copy(made, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return 1, f"{command[0]}: {error}\n"
    return done.returncode, done.stdout + done.stderr


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description="Build the fused operations.")
    parser.add_argument("log", type=Path, nargs="?", help="append the compilers' output, with register counts")
    parser.add_argument("--status", action="store_true", help="build nothing, say what there is")
    parser.add_argument("--if-needed", action="store_true", help="build only what is missing, damaged or out of date")
    options = parser.parse_args(arguments)
    if options.status:
        text = library_state().text
    else:
        text = build_if_needed() if options.if_needed else build(options.log)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as problem:
        sys.exit(f"error: {problem}")
