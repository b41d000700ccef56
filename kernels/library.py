"""Find and load the compiled library; nothing is compiled here. Built by `python -m kernels.build` or pip install."""

import logging

import torch

from kernels.build import LIBRARY

__all__ = ["fused_devices"]
_log = logging.getLogger("avslowfast.kernels")


def _load() -> frozenset[str]:
    if not LIBRARY.is_file():
        return frozenset()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _log.warning("kernels: %s does not load (%s); run `python -m kernels.build`", LIBRARY, error)
        return frozenset()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name.lower() for name in ("CPU", "CUDA") if has("avsf::norm_act", name))


_DEVICES = _load()


def fused_devices() -> frozenset[str]:
    """Device types that the loaded library serves: "cpu", "cuda"; empty without a library."""
    return _DEVICES
