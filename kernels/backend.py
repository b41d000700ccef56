"""Which implementation runs: the fused library where it is built, plain torch elsewhere."""

import logging

import torch
from torch import Tensor

from kernels import ops  # noqa: F401  registers shapes and gradients
from kernels.layout import KernelInputError
from kernels.library import fused_devices

__all__ = ["backend_in_use", "blocked_groups", "set_backend", "set_blocked_groups", "use_fused"]
BACKENDS = ("auto", "fused", "reference")
_log = logging.getLogger("avslowfast.kernels")
# Group by group: the second pass over 8 clips finds them in the cache. Measured on the CPU only (docs/kernels.md).
_BLOCKED_BY_DEFAULT = {"cpu": True, "cuda": False}
_blocked: dict[str, bool | None] = {"forced": None}
_state = {"requested": "auto", "announced": ""}


def set_backend(name: str) -> str:
    """Choose the implementation of the fused operations for this process.

    Args:
        name: "auto" (fused where the built library covers the input, else reference), "fused", "reference".

    Returns:
        what is used from now on: "fused" or "reference". "auto" logs its choice once.

    Raises:
        KernelInputError: unknown name, or "fused" without a built library.
    """
    if name not in BACKENDS:
        raise KernelInputError(f"kernel backend {name!r} must be one of {', '.join(BACKENDS)}")
    devices = fused_devices()
    if name == "fused" and not devices:
        raise KernelInputError(
            "kernel backend 'fused' needs the built library; run `pip install -e . --no-build-isolation` with g++ "
            "(and nvcc for CUDA) on the path, or choose 'auto' or 'reference'"
        )
    _state["requested"] = name
    chosen = backend_in_use()
    message = f"kernels: {chosen} operations" + (f" on {', '.join(sorted(devices))}" if chosen == "fused" else "")
    if name == "auto" and _state["announced"] != message:
        _state["announced"] = message
        _log.info(message)
    return chosen


def backend_in_use() -> str:
    """The implementation that supported inputs get now: "fused" or "reference"."""
    return "fused" if _state["requested"] != "reference" and fused_devices() else "reference"


def set_blocked_groups(blocked: bool | None) -> None:
    """Whether fused normalisation walks its passes group by group; None: the default of each device."""
    _blocked["forced"] = blocked


def blocked_groups(device_type: str) -> bool:
    """Whether normalisation on this device walks its passes group by group."""
    forced = _blocked["forced"]
    return _BLOCKED_BY_DEFAULT.get(device_type, False) if forced is None else forced


def use_fused(x: Tensor) -> bool:
    """Whether this input goes to the fused library (its device and dtype are covered and the backend allows it)."""
    return (
        _state["requested"] != "reference"
        and x.device.type in fused_devices()
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
