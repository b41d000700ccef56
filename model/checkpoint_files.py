"""Reading checkpoint files without running what is in them."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


class CheckpointImportError(ValueError):
    """A file that cannot be imported: the message names it, what differs and what to do."""


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in a pickle is refused before anything runs."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
            ("_codecs", "encode"): _encode_latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain container")
        return allowed[module, name]


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 stores bytes; only this encoding is needed."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not latin1")
    return text.encode("latin1")


def read_arrays(file: BinaryIO) -> Any:
    """Unpickle numpy arrays and plain containers, and nothing else (Python 2 pickles too).

    Raises:
        pickle.UnpicklingError: for any other object; no code of the pickle has run then.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a file by name.

    Raises:
        CheckpointImportError: no such file, a pickle with other objects, or no weights in it.
    """
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = read_arrays(file)
            blobs: Any = content.get("blobs", content) if isinstance(content, dict) else {}
            return {str(k): torch.as_tensor(v) for k, v in dict(blobs).items() if _is_numeric(v)}
        content = torch.load(path, map_location="cpu", weights_only=True)
        state: Any = content.get("model_state", content.get("state_dict", content)) if isinstance(content, dict) else {}
        return {str(k): v for k, v in dict(state).items() if isinstance(v, Tensor)}
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointImportError(
            f"{path} must hold arrays in plain containers and nothing else, but reading it failed: {error}"
        ) from error


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
