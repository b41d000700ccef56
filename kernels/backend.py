"""Which implementation runs: the fused library where it is built, plain torch elsewhere."""

import logging

from torch import Tensor

from kernels.layout import KernelInputError

__all__ = ["backend_in_use", "set_backend", "use_fused"]
BACKENDS = ("auto", "fused", "reference")
_log = logging.getLogger("avslowfast.kernels")
_state = {"requested": "auto", "announced": ""}


def _fused_devices() -> frozenset[str]:
    return frozenset()


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
    devices = _fused_devices()
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
    return "fused" if _state["requested"] != "reference" and _fused_devices() else "reference"


def use_fused(x: Tensor) -> bool:
    """Whether this input goes to the fused library (its device and dtype are covered and the backend allows it)."""
    return False
