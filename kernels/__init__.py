"""Fused operations of the model as modules: batch normalisation over groups of clips, and the lateral fusion.

Names are imported when they are used: `import kernels` alone loads nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.backend import set_backend
    from kernels.modules import GhostBatchNorm, LateralFusion, choose_backend

__all__ = ["GhostBatchNorm", "LateralFusion", "choose_backend", "set_backend"]

if not TYPE_CHECKING:  # a checker shall find wrong names
    _PLACES = {
        "GhostBatchNorm": "modules",
        "LateralFusion": "modules",
        "choose_backend": "modules",
        "set_backend": "backend",
    }

    def __getattr__(name):
        """Import a public name on first use (PEP 562)."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return value

    def __dir__():
        """The public names as well."""
        return sorted({*globals(), *__all__})
