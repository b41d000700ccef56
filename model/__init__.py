"""The AVSlowFast family: `build_model(VARIANTS["avslowfast_r50_4x16"])`, or a `ModelConfig` of your own.

Names are imported when they are used: `import model` alone loads nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.avslowfast import AVSlowFast, build_model
    from model.config import ModelConfig
    from model.folding import fold
    from model.output import ModelOutput
    from model.variants import VARIANTS

__all__ = ["VARIANTS", "AVSlowFast", "ModelConfig", "ModelOutput", "build_model", "fold"]

if not TYPE_CHECKING:  # a checker shall find wrong names
    _PLACES = {
        "AVSlowFast": "avslowfast",
        "ModelConfig": "config",
        "ModelOutput": "output",
        "VARIANTS": "variants",
        "build_model": "avslowfast",
        "fold": "folding",
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
