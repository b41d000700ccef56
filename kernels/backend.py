"""Which implementation runs: the fused library where it is built, plain torch elsewhere.

The choice belongs to a module: every norm and lateral fusion has a `backend`, which a model sets from its
configuration. "auto", the default, follows what `set_backend` chose for the process.
"""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import ops  # noqa: F401  registers shapes and gradients
from kernels.layout import KernelInputError
from kernels.library import fused_devices, library_text

__all__ = [
    "BACKENDS",
    "announce_backend",
    "backend_in_use",
    "blocked_groups",
    "set_backend",
    "set_blocked_groups",
    "use_fused",
]
BACKENDS = ("auto", "fused", "reference")
_log = logging.getLogger("avslowfast.kernels")
# Group by group: the second pass over 8 clips finds them in the cache (docs/kernels_numerics.md).
_BLOCKED_BY_DEFAULT = {"cpu": True, "cuda": False}


@dataclass
class _Settings:
    """What this process was told, and what it has said about it."""

    backend: str = "auto"  # of modules that leave it open
    blocked: bool | None = None  # group by group; None: as the device's default
    said: set[str] = field(default_factory=set)


_settings = _Settings()


def set_backend(name: str) -> str:
    """Choose the implementation that modules of backend "auto" use in this process; others keep theirs.

    Args:
        name: "auto" (fused where the built library covers the input, else reference), "fused", "reference".

    Returns:
        what "auto" modules use from now on: "fused" or "reference"; why is logged once.

    Raises:
        KernelInputError: unknown name, or "fused" without a built library.
    """
    _check(name)
    _settings.backend = name
    return announce_backend()


def announce_backend(name: str = "auto") -> str:
    """Check a module's choice and log once what it comes to, and why.

    Args:
        name: "auto" (what `set_backend` chose), "fused", "reference".

    Returns:
        "fused" or "reference".

    Raises:
        KernelInputError: unknown name, or "fused" without a built library.
    """
    _check(name)
    requested, chosen = _requested(name), backend_in_use(name)
    if chosen == "fused":
        reason = f"on {', '.join(sorted(fused_devices()))} tensors, backend {requested}; {library_text()}"
    else:
        reason = "backend reference" if requested == "reference" else f"backend {requested}; {library_text()}"
    _say(logging.INFO, f"kernels: {chosen} operations ({reason})")
    return chosen


def backend_in_use(name: str = "auto") -> str:
    """The implementation that supported inputs get in a module of this backend: "fused" or "reference"."""
    return "fused" if _requested(name) != "reference" and fused_devices() else "reference"


def set_blocked_groups(blocked: bool | None) -> None:
    """Whether fused normalisation walks its passes group by group; None: the default of each device."""
    _settings.blocked = blocked


def blocked_groups(device_type: str) -> bool:
    """Whether normalisation on this device walks its passes group by group."""
    default = _BLOCKED_BY_DEFAULT.get(device_type, False)
    return default if _settings.blocked is None else _settings.blocked


def use_fused(x: Tensor, backend: str = "auto") -> bool:
    """Whether this input goes to the fused library.

    Args:
        x: any tensor; float64 always takes the reference, which is its definition.
        backend: of the module that asks: "auto" (what `set_backend` chose), "fused", "reference".

    Returns:
        True where the backend allows it and the library covers device and dtype.

    Raises:
        KernelInputError: backend "fused", and the library has nothing for the device of x.
    """
    requested, device = _requested(backend), x.device.type
    if requested == "reference":
        return False
    if device not in fused_devices():
        _uncovered(device, requested)
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _requested(name: str) -> str:
    return _settings.backend if name == "auto" else name


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise KernelInputError(f"kernel backend {name!r} must be one of {', '.join(BACKENDS)}")
    if name == "fused" and not fused_devices():
        raise KernelInputError(
            f"kernel backend 'fused' needs the built library ({library_text()}, with g++ and, for CUDA, nvcc on the "
            "path), or choose 'auto' or 'reference'"
        )


def _uncovered(device: str, requested: str) -> None:
    """The library has nothing for this device: an error if it was asked for, else said once."""
    if device == "meta" or not fused_devices():  # shapes only; or said when the backend was chosen
        return
    has = ", ".join(sorted(fused_devices()))
    cure = "run `python -m kernels.build` with nvcc on the path" if device == "cuda" else "move the tensors"
    if requested == "fused":
        raise KernelInputError(
            f"kernel backend 'fused' got a {device} tensor but the library holds {has} only; {cure}, "
            "or choose 'auto' or 'reference'"
        )
    if not torch.compiler.is_compiling():
        _say(
            logging.WARNING, f"kernels: reference operations on {device} tensors, the library holds {has} only; {cure}"
        )


def _say(level: int, message: str) -> None:
    if message not in _settings.said:
        _settings.said.add(message)
        _log.log(level, message)
