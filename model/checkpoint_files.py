"""Reading checkpoint files without running what is in them.

`pickled_arrays` reads the pickles. `torch.load(weights_only=True)` does not serve: it knows protocol 2 only, takes for
ever over some keys, and gives sparse, quantised and expanded tensors, which are no released weights.
"""

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.pickled_arrays import PickleRefusedError, RawArray, RawTensor, Storage, read_pickle

MAX_BYTES = 2 << 30  # the largest released SlowFast file, optimizer included, has a quarter of it
_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save pickles first up to version 1.5
_STATES = ("blobs", "model_state", "state_dict")


class CheckpointImportError(ValueError):
    """A file that cannot be imported: the message names it, what differs and what to do."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a file by name; whether it is a pickle of arrays or torch's is seen from its first bytes.

    Args:
        path: a pickle of numpy arrays (protocol 2 to 5, of Python 2 or 3) or what `torch.save` wrote; at most
            `MAX_BYTES`.
    Returns:
        dense tensors in memory, of any numeric type and layout; their bytes together are at most the file's.
    Raises:
        CheckpointImportError: no such file, too large, damaged, other objects in it, or no weights.
    """
    try:
        data = _read(path)
        if data.startswith(_ZIP):
            content, storages = _zip(data)
        elif _OLD_TORCH in data[:32]:
            content, storages = _old_torch(data)
        else:
            (content, _), storages = read_pickle(io.BytesIO(data)), {}
        return _tensors(_state(content), storages, len(data))
    except (OSError, PickleRefusedError) as error:
        raise CheckpointImportError(
            f"{path} must hold arrays in plain containers and nothing else, but reading it failed: {error}; "
            "download it again, or save the weights alone with torch.save(state_dict) or pickle protocol 2 and up"
        ) from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise PickleRefusedError("it is no regular file" if path.exists() else "it is missing")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise PickleRefusedError(f"its size ({size} bytes) must be 1 to {MAX_BYTES}")
    with path.open("rb") as file:
        data = file.read(size)
    return data


def _zip(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """torch.save since 1.6: an archive of a pickle and one stored (not compressed) record for each storage."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            sizes = sum(entry.file_size for entry in archive.infolist())
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
            if sizes > len(data) or not plain or len(entries) != len(archive.infolist()):
                raise PickleRefusedError("its records are compressed, double or larger than the file")
            roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
            if len(roots) != 1:
                raise PickleRefusedError("the archive must hold one data.pkl")
            order = f"{roots[0]}byteorder"
            if order in entries and archive.read(order) != b"little":
                raise PickleRefusedError("its numbers are big-endian")
            content, storages = read_pickle(io.BytesIO(archive.read(roots[0] + "data.pkl")))
            return content, {key: archive.read(f"{roots[0]}data/{key}") for key in storages}
    except PickleRefusedError:
        raise
    except KeyError as error:
        raise PickleRefusedError(f"the archive is damaged: {str(error.args[0])[:120]}") from error
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError, OverflowError, struct.error) as error:
        raise PickleRefusedError(f"the archive is damaged: {str(error)[:120]}") from error


def _old_torch(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """torch.save up to 1.5: pickles of a number, a version, the system, the content and the keys; then each storage."""
    file = io.BytesIO(data)
    (_, _), (version, _), (system, _) = read_pickle(file), read_pickle(file), read_pickle(file)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleRefusedError("it must be torch's format 1001 with little-endian numbers")
    (content, storages), (keys, _) = read_pickle(file), read_pickle(file)
    records: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(file.read(8), "little")
        if storage is None or count != storage.count:
            raise PickleRefusedError("the list of storages does not agree with the tensors")
        records[storage.key] = file.read(count * storage.dtype.itemsize)
    return content, records


def _state(content: object) -> Mapping[object, object]:
    """The dict of weights: under one of the usual keys, or the whole content."""
    if isinstance(content, dict):
        return next((content[key] for key in _STATES if isinstance(content.get(key), dict)), content)
    raise PickleRefusedError("it holds no dict of weights")


def _tensors(state: Mapping[object, object], records: Mapping[str, bytes], budget: int) -> dict[str, Tensor]:
    """Every array of a state; entries of other kinds (a rate, an epoch) are no weights.

    An array's bytes are counted each time, so that a small file cannot ask for many copies of one.
    """
    tensors: dict[str, Tensor] = {}
    used: dict[Storage, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, RawArray | RawTensor):
            continue
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise PickleRefusedError("a weight's name must be at most 200 printable characters")
        if isinstance(value, RawArray):
            budget -= value.num_bytes
            if budget < 0:
                raise PickleRefusedError("its arrays are larger than the file")
            tensors[name] = value.tensor()
            continue
        if value.storage.key not in records:
            raise PickleRefusedError(f"storage {value.storage.key[:80]} is missing")
        if value.storage not in used:
            used[value.storage] = value.storage.tensor(records[value.storage.key])
        tensors[name] = value.view(used[value.storage])
    return tensors
