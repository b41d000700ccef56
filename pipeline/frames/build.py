"""Build the small library that makes frames on a CPU: `python -m pipeline.frames.build`, and what setup.py calls.

One C++ compiler command (CXX, default g++), a few seconds. Without a compiler nothing is built and DALI's CPU operators
do the work. The name of the file tells what it was made from, and its last bytes are a digest of the rest: an old or
damaged library is never loaded. Imports nothing but the standard library: worker processes load it without torch.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["BUILD_IT", "build", "build_if_needed", "library_path", "library_problem"]
ABI = 1  # raised with every change of the C interface
SOURCES = Path(__file__).parent / "csrc"
# Without contraction and with IEEE rounding the result is the same for every instruction set.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
         "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]  # fmt: skip
BUILD_IT = "run `python -m pipeline.frames.build`"
_STEM = f"libavslowfast_frames_{platform.machine()}_"
_SEAL_BYTES = 32


def source_digest() -> str:
    """SHA-256, in hex, of what the library is made from: sources, flags, kind of machine."""
    digest = hashlib.sha256("\0".join([str(ABI), platform.machine(), *FLAGS]).encode())
    for path in sorted(SOURCES.glob("*")):
        if path.is_file():
            digest.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def library_path() -> Path:
    """Where the library of the present sources is, or would be."""
    return Path(__file__).parent / f"{_STEM}{source_digest()[:16]}.so"


def library_problem(path: Path) -> str:
    """Why a library is not to be loaded, and what to do; empty if it is whole."""
    if not path.is_file():
        others = list(path.parent.glob(f"{_STEM}*.so"))
        what = "it was made from other sources" if others else "none is built"
        return f"{what}; {BUILD_IT}"
    data = path.read_bytes()
    if hashlib.sha256(data[:-_SEAL_BYTES]).digest() != data[-_SEAL_BYTES:]:
        return f"{path.name} is damaged; {BUILD_IT}"
    return ""


def cxx() -> list[str]:
    """The C++ compiler's command, which may have a launcher before it: CXX="ccache g++"."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def build() -> str:
    """Compile the library, in place of any earlier one.

    Returns:
        one sentence: what was built, in which time; or why nothing was, and what is used instead.
    """
    compiler, target, started = cxx(), library_path(), time.monotonic()
    if shutil.which(compiler[0]) is None:
        return f"frames: nothing built, no C++ compiler ({' '.join(compiler)}) found; install g++ or set CXX; {_else()}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-Wl,--as-needed", "-o", str(made)]
        code, output = _run(command)
        if code or not made.is_file():
            sys.stderr.write(output or f"{compiler[0]} failed without a message\n")
            return f"frames: nothing built, the compiler failed (see above); {_else()}"
        data = made.read_bytes()
        made.write_bytes(data + hashlib.sha256(data).digest())
        _put_in_place(made, target)
    for old in target.parent.glob(f"{_STEM}*.so"):
        if old != target:
            with contextlib.suppress(FileNotFoundError):  # by another build
                old.unlink()
    return f"frames: built {target.name}, {len(data) / 1024:.0f} KiB, in {time.monotonic() - started:.0f} s"


def build_if_needed() -> str:
    """`build` where the library is missing, damaged or made from other sources; one sentence on what there is now."""
    path = library_path()
    return build() if library_problem(path) else f"frames: built {path.name}"


def _else() -> str:
    return "frames are made by DALI's CPU operators, at a tenth of the speed"


def _put_in_place(made: Path, target: Path) -> None:
    """Copy a finished file beside its target and rename it there: builds at the same time cannot mix."""
    beside = target.with_name(f".{os.urandom(8).hex()}.so")
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
    parser = argparse.ArgumentParser(prog="python -m pipeline.frames.build", description="Build the frame library.")
    parser.add_argument("--status", action="store_true", help="build nothing, say what there is")
    parser.add_argument("--if-needed", action="store_true", help="build only what is missing, damaged or out of date")
    options = parser.parse_args(arguments)
    if options.status:
        problem = library_problem(library_path())
        text = f"frames: no library ({problem})" if problem else f"frames: built {library_path().name}"
    else:
        text = build_if_needed() if options.if_needed else build()
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
