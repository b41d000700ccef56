"""Small JSON files in which every byte counts: format, version, content, and a sha256 over all three."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from experiments.cli.files import read_json

_SEAL = "sha256"


class SealError(ValueError):
    """A file that is not what was written; the message is the reason."""


class NewerVersionError(ValueError):
    """A file that is whole and of a version that this code does not know; the message says which it reads."""


def sealed_json(form: str, version: int, content: Any) -> str:
    """Return the text of a file.

    Args:
        form: what kind of file it is.
        version: of that form, from 1 on.
        content: what JSON can hold; numbers that are not finite become null.
    """
    return _sealed({"format": form, "version": version, "content": finite(content)})


def read_sealed(data: bytes, form: str, version: int) -> Any:
    """Return the content of a file.

    The file must be, byte for byte, what `sealed_json` gives: so the digest covers every byte of it.

    Args:
        data: of the file.
        form: that it must have.
        version: that it must have.

    Raises:
        SealError: it is damaged or of another form.
        NewerVersionError: it is whole, of this form and of another version.
    """
    try:
        found = read_json(data)
        values = {name: found[name] for name in ("format", "version", "content")}
        if _sealed(values).encode() != data:
            raise SealError("its values and its digest differ")
    except SealError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SealError((str(error).splitlines() or [type(error).__name__])[0][:120]) from None
    if values["format"] != form:
        raise SealError(f"it is of the format {str(values['format'])[:40]!r} and must be {form!r}")
    if values["version"] != version:
        raise NewerVersionError(f"it is of version {str(values['version'])[:20]}; this code reads version {version}")
    return values["content"]


def strict_json(value: Any) -> str:
    """Return JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return a value in whose mappings and lists numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sealed(values: Mapping[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(values, allow_nan=False).encode()).hexdigest()
    return json.dumps({**values, _SEAL: seal}, indent=1, allow_nan=False) + "\n"
