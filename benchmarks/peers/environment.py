"""The environment of other people's loaders: `make peers`, or `python -m benchmarks.peers.environment [--folder DIR]`.

They are no dependency of this project: they live in a folder of their own, which sees the packages of the running
environment (torch, numpy, PyAV) and adds the loaders. What cannot be installed is named and left out; the comparison
says so in its rows. torchcodec and SPDL look for FFmpeg's libraries by their plain names: they get those that come with
PyAV, so that every loader decodes with the same FFmpeg.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import av

from benchmarks.result_rows import given_arguments

ROOT = Path(__file__).resolve().parents[2]
FOLDER_VARIABLE = "AVSF_PEERS"
# Loader -> what pip installs for it, without what pip would draw in: the versions of torch and numpy stay as they are.
PACKAGES = {
    "torchcodec": ("torchcodec==0.17.0",),
    "spdl": ("spdl-core==0.8.0", "spdl-io==0.8.0", "spdl==0.8.0"),
    "decord": ("decord==0.6.0",),
    "pytorchvideo": ("pytorchvideo==0.1.5", "fvcore", "iopath", "portalocker", "yacs", "parameterized", "tabulate"),
}
INSTALL_LIMIT_S = 300.0
OUTCOME = "peers.json"  # in the folder: what became of each loader


def default_folder() -> Path:
    """`AVSF_PEERS`, else `.venv-peers` in the checkout."""
    return Path(os.environ.get(FOLDER_VARIABLE) or ROOT / ".venv-peers")


def python_of(folder: Path) -> Path:
    """The interpreter of the environment."""
    return folder / "bin" / "python"


def libraries_of(folder: Path) -> Path:
    """Where FFmpeg's libraries lie under their plain names."""
    return folder / "ffmpeg"


def environment_of(folder: Path) -> dict[str, str]:
    """Variables that a process of the environment needs."""
    paths = [str(libraries_of(folder)), os.environ.get("LD_LIBRARY_PATH", "")]
    return dict(os.environ) | {"LD_LIBRARY_PATH": ":".join(path for path in paths if path)}


def link_libraries(folder: Path) -> list[str]:
    """Give PyAV's FFmpeg libraries their plain names, such as libavcodec.so.62; returns the names.

    Args:
        folder: of the environment.
    """
    target = libraries_of(folder)
    target.mkdir(parents=True, exist_ok=True)
    bundled = Path(av.__file__).resolve().parent.parent / "av.libs"
    names = []
    for path in sorted(bundled.glob("lib*")):
        match = re.fullmatch(r"(lib[a-z]+)-[0-9a-f]{8}\.so\.(\d+)[.\d]*", path.name)
        if match and match[1].startswith(("libav", "libsw")):
            link = target / f"{match[1]}.so.{match[2]}"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            names.append(link.name)
    return names


def make(folder: Path) -> dict[str, str]:
    """Make or complete the environment.

    Args:
        folder: of the environment; made if missing.

    Returns:
        Loader -> "ok", or the last line of what pip said.
    """
    if not python_of(folder).exists():
        venv.create(folder, with_pip=True, symlinks=True)
    own = subprocess.run(
        [python_of(folder), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    Path(own, "of_the_project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    link_libraries(folder)
    outcome = {}
    for name, packages in PACKAGES.items():
        command = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--no-deps", *packages]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
            lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            outcome[name] = "ok" if done.returncode == 0 else lines[-1]
        except subprocess.TimeoutExpired:
            outcome[name] = f"not installed within {INSTALL_LIMIT_S:g} s"
    (folder / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return outcome


def outcome_of(folder: Path) -> dict[str, str]:
    """What `make` returned for an environment; empty where it has left no word."""
    try:
        found: dict[str, str] = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; ends with 0 if at least one loader is there: the comparison names those that are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder())
    options = parser.parse_args(given_arguments(arguments))
    outcome = make(options.folder.absolute())
    for name, text in outcome.items():
        sys.stdout.write(f"{name}: {text}\n")
    return 0 if "ok" in outcome.values() else 1


if __name__ == "__main__":
    sys.exit(main())
