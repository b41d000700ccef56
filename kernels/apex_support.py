"""NVIDIA apex where it still has something (fused optimizers): found, told apart from its namesake, never required."""

import importlib
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Any

__all__ = ["ApexError", "ApexStatus", "apex_optimizer", "apex_status"]
INSTALL = (
    "NVIDIA apex comes from source only: "
    "`pip install -v --no-build-isolation --config-settings '--build-option=--cpp_ext' "
    "--config-settings '--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex`"
)


class ApexError(ValueError):
    """apex was asked for and is not there, or the installed `apex` is another project."""


@dataclass(frozen=True)
class ApexStatus:
    """What `import apex` would give.

    Args:
        state: "nvidia", "impostor" (PyPI's web toolkit of that name), "broken" (NVIDIA's, does not import) or "absent".
        message: one sentence, with the remedy where there is one.
    """

    state: str
    message: str

    @property
    def usable(self) -> bool:
        """True for NVIDIA's apex that imports."""
        return self.state == "nvidia"


def apex_status() -> ApexStatus:
    """Look at the installed `apex` without trusting its name.

    Returns:
        the state; NVIDIA's apex is recognised by its `apex.optimizers` module, which PyPI's `apex` has not.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ApexStatus("absent", f"apex is not installed, and not needed. {INSTALL}")
    folders = list(spec.submodule_search_locations or [])
    finder = importlib.machinery.PathFinder.find_spec("apex.optimizers", folders) if folders else None
    if finder is None:
        return ApexStatus(
            "impostor",
            f"the installed `apex` ({_version()}, {spec.origin}) is PyPI's unrelated web toolkit, not NVIDIA apex; "
            f"`pip uninstall apex`, then: {INSTALL}",
        )
    try:
        importlib.import_module("apex.optimizers")
    except (ImportError, RuntimeError, OSError) as error:
        return ApexStatus("broken", f"NVIDIA apex is installed but does not import ({error}); rebuild it. {INSTALL}")
    return ApexStatus("nvidia", f"NVIDIA apex {_version()}")


def apex_optimizer(name: str) -> Any:
    """A fused optimizer class of NVIDIA apex.

    Args:
        name: class in apex.optimizers, for example "FusedLAMB", "FusedAdam" or "FusedSGD" (float32 and float16 only:
            torch.optim.SGD(fused=True) also takes bfloat16 and spares GradScaler's host synchronisation).

    Returns:
        the class.

    Raises:
        ApexError: apex is absent, broken, or another project; or has no such optimizer.
    """
    status = apex_status()
    if not status.usable:
        raise ApexError(f"optimizer apex.{name} needs NVIDIA apex: {status.message}")
    module = importlib.import_module("apex.optimizers")
    if not hasattr(module, name):
        known = ", ".join(sorted(n for n in vars(module) if n.startswith("Fused")))
        raise ApexError(f"apex.optimizers has no {name!r}; it has {known}")
    return getattr(module, name)


def _version() -> str:
    try:
        return metadata.version("apex")
    except metadata.PackageNotFoundError:
        return "unknown version"
