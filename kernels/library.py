"""Find and load the compiled library; nothing is compiled here. Built by `python -m kernels.build` or pip install.

The file is checked before it is loaded: a damaged one would end the process, one of other sources be silently wrong.
"""

import logging

import torch

from kernels.build import BUILD_IT, LIBRARY, LibraryState, library_state

__all__ = ["fused_devices", "library_text"]
_log = logging.getLogger("avslowfast.kernels")


def _load() -> LibraryState:
    state = library_state()
    if not state.parts:
        if LIBRARY.exists():
            _log.warning("%s; until then the reference operations run", state.text)
        return state
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        state = LibraryState((), f"kernels: {LIBRARY.name} does not load ({error}); {BUILD_IT}")
        _log.warning("%s; until then the reference operations run", state.text)
    return state


_STATE = _load()
_DEVICES = frozenset(part.lower() for part in _STATE.parts)


def fused_devices() -> frozenset[str]:
    """Device types that the loaded library serves: "cpu", "cuda"; empty without a library."""
    return _DEVICES


def library_text() -> str:
    """What the loaded library holds, or why there is none and what to run; part of a sentence."""
    return _STATE.text.removeprefix("kernels: ")
