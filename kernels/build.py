"""Build the library of fused operations from kernels/csrc: `python -m kernels.build`, and what setup.py calls.

Needs g++ for the CPU part and nvcc for the CUDA part; what is missing is left out and said. AVSF_CUDA=0 leaves CUDA
out, 1 makes a missing nvcc an error, auto (default) takes it where it is found. Imports neither torch nor anything
compiled.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["LIBRARY", "build", "torch_folder"]
ABI = 2  # raised with every change of an operation's schema, so that an old library is never loaded
LIBRARY = Path(__file__).parent / f"libavslowfast_kernels_v{ABI}.so"
SOURCES = Path(__file__).parent / "csrc"
COMMON = ["-std=c++20", "-O3", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--extra-device-vectorization", "-Xptxas=-v"]


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
    compiler, include = os.environ.get("CXX", "g++"), f"-I{torch / 'include'}"
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
        jobs.append([compiler, *flags, *defines, *extra, "-c", leaf, "-o", str(objects / f"leaf_{name}.o")])
    for name in ("ops", "cpu", "schema"):
        jobs.append([compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(objects / f"{name}.o")])
    return jobs


def link_command(torch: Path, objects: list[str], cuda: Path | None, out: Path) -> list[str]:
    """The command that makes the shared library: no Python symbols, static CUDA runtime, torch's own libraries only."""
    words = [
        os.environ.get("CXX", "g++"),
        "-shared",
        "-o",
        str(out),
        *objects,
        f"-L{torch / 'lib'}",
        "-Wl,--no-as-needed",
    ]
    words += ["-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
    if cuda:
        words += [str(cuda_runtime(cuda)), "-ldl", "-lrt", "-lpthread"]
    return words


def build(log_path: Path | None = None) -> str:
    """Compile and link what this machine can, into `LIBRARY`.

    Args:
        log_path: where the compilers' output goes, for reading register counts; None: kept only on an error.

    Returns:
        one sentence that says what was built: "CPU and CUDA", "CPU", or why nothing was.

    Raises:
        RuntimeError: AVSF_CUDA=1 and no nvcc, or an AVSF_CUDA that is none of 0, 1, auto.
    """
    wish = os.environ.get("AVSF_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise RuntimeError(f"AVSF_CUDA ({wish}) must be 0, 1 or auto")
    cuda = find_nvcc() if wish != "0" else None
    if wish == "1" and cuda is None:
        raise RuntimeError("AVSF_CUDA=1 but no nvcc on the path or in CUDA_HOME; install the CUDA toolkit or use auto")
    compiler, torch = shutil.which(os.environ.get("CXX", "g++")), torch_folder()
    later = "the reference backend is used; `python -m kernels.build` builds later"
    if compiler is None:
        return f"kernels: nothing built, no C++ compiler (g++) found; {later}"
    if torch is None:
        return f"kernels: nothing built, torch is not installed yet; {later}"
    started = time.monotonic()
    for attempt in (cuda, None) if cuda else (None,):
        problem = _compile(torch, attempt, log_path)
        if not problem:
            parts = "CPU and CUDA" if attempt else "CPU"
            note = "" if attempt or not cuda else " (the CUDA part did not compile)"
            return f"kernels: built {parts}{note} in {time.monotonic() - started:.0f} s: {LIBRARY.name}"
        sys.stderr.write(problem + "\n")
        if wish == "1":
            raise RuntimeError("AVSF_CUDA=1 but the CUDA part did not compile; see the compiler's message above")
    return f"kernels: nothing built, the compiler failed (see above); {later}"


def _compile(torch: Path, cuda: Path | None, log_path: Path | None) -> str:
    """Run the compilers; returns their complaint, empty on success. The library is replaced in one step."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = commands(torch, Path(folder), cuda)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            results = list(pool.map(_run, jobs))
        log = "".join(output for _, output in results)
        if log_path is not None:
            log_path.write_text((log_path.read_text() if log_path.exists() else "") + log)
        if any(code for code, _ in results):
            return log or "the compiler failed without a message"
        out = LIBRARY.with_suffix(f".so.{os.getpid()}")
        code, output = _run(link_command(torch, [job[job.index("-o") + 1] for job in jobs], cuda, out))
        if code:
            out.unlink(missing_ok=True)
            return output or "the linker failed without a message"
        out.replace(LIBRARY)
        return ""


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return 1, f"{command[0]}: {error}\n"
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.stdout.write(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None) + "\n")
