"""Where a result comes from: versions, git commit, digest of the code, environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from kernels.backend import backend_in_use
from kernels.library import fused_devices

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("kernels", "model", "pipeline", "experiments")


def code_digest() -> str:
    """Return 16 hexadecimal digits over the source files of the four packages."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".inc"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def kernels_in_use(backend: str = "auto") -> str:
    """Return the implementation of the fused operations and what is built of it, e.g. "fused (cpu, cuda)".

    Args:
        backend: of the model (`model.backend`).
    """
    return f"{backend_in_use(backend)} ({', '.join(sorted(fused_devices())) or 'nothing built'})"


def git_commit() -> str:
    """Return the commit of the checkout, with "+changes" if tracked files differ; "unknown" outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions(backend: str = "auto") -> dict[str, str]:
    """Return the versions that decide a result: python, torch, dali, cuda, cudnn, GPU, git commit, fused operations.

    Args:
        backend: of the model (`model.backend`).
    """
    has_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": _dali_version(),
        "cuda": (torch.version.cuda or "none") if has_gpu else "none",
        "cudnn": str(torch.backends.cudnn.version()) if has_gpu else "none",
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "git_commit": git_commit(),
        "kernels": kernels_in_use(backend),
    }


def _dali_version() -> str:
    for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def environment() -> str:
    """Return `name==version` of every installed distribution, one a line."""
    described = [distribution.metadata for distribution in importlib.metadata.distributions()]  # each access parses
    found = {f"{metadata['Name']}=={metadata['Version']}" for metadata in described if metadata["Name"]}
    return (
        "\n".join([f"# python {platform.python_version()} on {platform.platform()}", *sorted(found, key=str.lower)])
        + "\n"
    )
