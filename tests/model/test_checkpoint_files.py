"""The reader of checkpoint files: what it reads, number by number, and what it refuses, cheaply."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint_files, pickled_arrays
from model.checkpoint_files import CheckpointImportError, read_tensors
from tests.model.support import fuzz_checkpoints

VALUES = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
EMPTY = b"\x80\x02}"
FUZZ_MEMORY_BYTES = 256 << 20


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def array_pickle(dtype: bytes, raw: bytes, shape: bytes = b"K\x04\x85") -> bytes:
    """{conv1_w: array} in protocol 2, from the opcodes that make the dtype and the shape."""
    made = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85U\x01b\x87R"
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    return EMPTY + b"U\x07conv1_w" + made + state + b"s."


def dtype_opcodes(code: bytes, state: bytes = b"") -> bytes:
    return named("numpy", "dtype") + b"U" + bytes([len(code)]) + code + b"K\x00K\x01\x87R" + state


PLAIN = dtype_opcodes(b"f4", b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
FIELDS = b"(K\x03U\x01|NU\x01f\x85}U\x01f" + dtype_opcodes(b"O8") + b"K\x00\x86sK\x08K\x01K\x01tb"
TENSOR = named("torch._utils", "_rebuild_tensor_v2")
LAUGHS = b")" + b"".join(b"q%bh%b\x86" % (bytes([i]), bytes([i])) for i in range(60))  # 2^60 to hash or print
SHARED = np.zeros(1000, np.float32)
HOSTILE: dict[str, tuple[bytes, str]] = {  # name -> pickle, what the refusal says
    "object fields in a type": (array_pickle(dtype_opcodes(b"V8", FIELDS), b"A" * 32), "plain number"),
    "fields in a plain type": (array_pickle(dtype_opcodes(b"f8", FIELDS), b"A" * 32), "plain number"),
    "objects": (array_pickle(dtype_opcodes(b"O8"), b"A" * 32), "plain number"),
    "too few bytes": (array_pickle(PLAIN, b"A" * 12), "has 12 bytes, not 16"),
    "huge shape": (array_pickle(PLAIN, b"A" * 16, b"\x8a\x08" + struct.pack("<q", 1 << 50) + b"\x85"), "a shape must"),
    "shape of zeros": (array_pickle(PLAIN, b"", b"K\x00\x8a\x06" + b"\xff" * 5 + b"\x7f\x86"), "a shape must"),
    "shape of many": (array_pickle(PLAIN, b"A" * 4, b"(" + b"K\x01" * 70 + b"t"), "at most 8 positive"),
    "nested tuple as key": (EMPTY + LAUGHS + b"K\x01s.", "key is a tuple"),
    "nested tuple as shape": (array_pickle(PLAIN, b"A" * 4, LAUGHS + b"\x85"), "a shape must"),
    "nested tuple as byte order": (array_pickle(dtype_opcodes(b"f4", b"(K\x03" + LAUGHS + b"NNNtb"), b""), "plain n"),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 45) + b"abc.", "damaged"),
    "long text": (EMPTY + b"X\xff\xff\xff\x7fa.", "damaged"),
    "many copies": (pickle.dumps({f"{n:03}": SHARED for n in range(300)}, protocol=2), "larger than the file"),
    "a call of text": (EMPTY + b"U\x01aU\x01b)Rs.", "makes no array"),
    "system": (EMPTY + b"U\x01a" + named("os", "system") + b"U\x02ls\x85Rs.", "os.system"),
    "a class": (EMPTY + b"U\x01a" + named("numpy", "ndarray") + b")\x81s.", "NEWOBJ"),
    "setattr on text": (EMPTY + b"U\x01aU\x01b}bs.", "no array"),
    "persistent": (EMPTY + b"U\x01aU\x01bQs.", "storage is damaged"),
    "storage from nowhere": (
        EMPTY + b"U\x01a" + TENSOR + b"((U\x07storage" + named("torch", "FloatStorage")
        + b"U\x010U\x03cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89}tRs.", "storage 0 is missing"),
    "text as bytes": (array_pickle(PLAIN, b"AAAA", b"K\x01\x85").replace(
        b"T\x04\0\0\0AAAA", b"X\x05\0\0\0" + "AAA\u0100".encode()), "bytes are text"),
    "no dict": (b"\x80\x02]q\x00.", "no dict"),
    "two objects": (b"\x80\x02}}.", "several objects"),
    "empty stack": (b"\x80\x020.", "POP"),
    "no end": (EMPTY, "damaged"),
    "text file": (b"<html>404</html>", ""),
    "name with an escape": (array_pickle(PLAIN, b"A" * 16).replace(b"conv1_w", b"conv\x1b_w"), "printable"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_cost_little(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointImportError) as caught:
            read_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path} must hold arrays in plain containers")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < (1 << 20) + 130 * len(data)


def test_a_large_memo_index_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "memo.pkl"
    path.write_bytes(EMPTY + b"r" + struct.pack("<I", 1 << 27) + b".")
    tracemalloc.start()
    try:
        assert read_tensors(path) == {}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_depth_is_free_and_the_number_of_opcodes_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lists.pkl"
    path.write_bytes(EMPTY + b"U\x01a" + b"]" * 20_000 + b"a" * 19_999 + b"s.")
    assert read_tensors(path) == {}
    monkeypatch.setattr(pickled_arrays, "MAX_OPCODES", 40_000)
    with pytest.raises(CheckpointImportError, match="more than 40000 opcodes"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_number_type_and_order(protocol: int, tmp_path: Path) -> None:
    names = ("<f4", "<f8", "<f2", ">f4", ">i8", "<i4", "<i2", "<i1", "<u1", "<u2", "<u4", "<u8")
    arrays = {name: np.abs(VALUES).astype(name) for name in names}
    arrays |= {"fortran": np.asfortranarray(VALUES), "cube": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))}
    arrays |= {"strided": VALUES[:, ::2], "none": np.array(2.5), "bool": VALUES > 0}
    path = tmp_path / "weights.anything"
    path.write_bytes(
        pickle.dumps({"blobs": arrays | {"scalar": np.float64(0.25), "note": "x", 3: None}}, protocol=protocol)
    )
    read = read_tensors(path)
    assert set(read) == {*arrays, "scalar"}
    for name, values in arrays.items():
        assert read[name].shape == values.shape
        np.testing.assert_array_equal(read[name].numpy(), values.astype(values.dtype.newbyteorder("=")))
    assert read["scalar"].item() == 0.25
    assert read["<f2"].dtype == torch.float16


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    values = np.float32([[-1e-30, 3.5, 200.0], [np.pi, -0.0, 1e30]])
    path = tmp_path / "WEIGHTS.PKL"
    path.write_bytes(fuzz_checkpoints.python2_pickle(values))
    np.testing.assert_array_equal(read_tensors(path)["conv1_w"].numpy(), values)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch(archive: bool, protocol: int, tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    state = torch.nn.BatchNorm1d(3).state_dict()  # an OrderedDict with attributes
    state |= {"view": whole[1:, ::2], "turned": whole.permute(2, 0, 1), "half": whole.half(), "brain": whole.bfloat16()}
    state |= {"parameter": torch.nn.Parameter(whole * 2), "count": torch.tensor(7)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = tmp_path / "weights.PKL"
    torch.save(
        {"epoch": 3, "cfg": "TRAIN: true\n", "model_state": state, "optimizer_state": optimizer},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=archive,
    )
    read = read_tensors(path)
    assert set(read) == set(state)
    for name, values in state.items():
        assert read[name].dtype == values.dtype
        assert torch.equal(read[name], values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.empty(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (lambda: torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
        (lambda: np.array(["text"]), "plain number"),
        (lambda: torch.ones(1).expand(1 << 30, 1 << 9), "larger than its storage of 1 elements"),
    ],
)
def test_other_kinds_of_tensors_are_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyth"
    torch.save({"w": make()}, path)
    with pytest.raises(CheckpointImportError, match=message):
        read_tensors(path)


def rewritten(change: Any, **options: Any) -> bytes:
    """An archive of torch with `change(name, bytes) -> bytes or None` applied to its records."""
    file, out = io.BytesIO(), io.BytesIO()
    torch.save(OrderedDict(w=torch.arange(4.0)), file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(out, "w", **options) as target:
        for name in source.namelist():
            part = change(name.split("/", 1)[1], source.read(name))
            if part is not None:
                target.writestr(name, part)
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda name, part: part, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        (lambda name, part: part[:12] if name == "data/0" else part, {}, "storage 0 has 12 bytes, not 16"),
        (lambda name, part: None if name == "data/0" else part, {}, "data/0"),
        (lambda name, part: None if name == "data.pkl" else part, {}, "one data.pkl"),
        (lambda name, part: b"big" if name == "byteorder" else part, {}, "big-endian"),
        (lambda name, part: part.replace(b"K\x00K\x04\x85", b"K\x01K\x04\x85"), {}, "leaves its storage of 4"),
        (lambda name, part: part.replace(b"K\x01\x85", b"K\x05\x85"), {}, "no numbers inside its storage"),
        (lambda name, part: part.replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85"), {}, "no numbers inside"),
        (lambda name, part: part.replace(b"K\x01\x85", b"K\x01K\x01\x86"), {}, "no numbers inside its storage"),
        (lambda name, part: part.replace(b"X\x01\0\0\x000", b"X\x02\0\0\0.."), {}, "data/\\.\\."),
    ],
)
def test_damaged_archives_are_refused(change: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyth"
    path.write_bytes(rewritten(lambda name, part: part))
    assert torch.equal(read_tensors(path)["w"], torch.arange(4.0))
    path.write_bytes(rewritten(change, **options))
    with pytest.raises(CheckpointImportError, match=message):
        read_tensors(path)


def with_central_offset(data: bytes) -> bytes:
    at = data.rindex(b"archive/data.pkl")  # in the directory: the offset of the record is before its name
    return data[: at - 4] + struct.pack("<I", len(data) - 10) + data[at:]


def with_central_size(data: bytes) -> bytes:
    at = data.rindex(b"archive/data/0") - 26  # where the directory has both sizes
    return data[:at] + struct.pack("<II", len(data), len(data)) + data[at + 8 :]


def with_double(data: bytes) -> bytes:
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(16))
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [(with_central_offset, "damaged"), (with_central_size, "larger than the file"), (with_double, "double")],
)
def test_damaged_directories_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pyth"
    path.write_bytes(change(rewritten(lambda name, part: part)))
    with pytest.raises(CheckpointImportError, match=message):
        read_tensors(path)


@pytest.mark.parametrize("archive", [True, False])
def test_one_storage_has_one_size(archive: bool, tmp_path: Path) -> None:
    path, values = tmp_path / "weights.pyth", torch.arange(4.0)
    torch.save({"w": values, "v": values[:2]}, path, _use_new_zipfile_serialization=archive)
    assert torch.equal(read_tensors(path)["v"], values[:2])
    if archive:
        with zipfile.ZipFile(path) as source:
            part = source.read("weights/data.pkl")
        at = part.rindex(b"K\x04t")
        path.write_bytes(
            rewritten(lambda name, old: part[:at] + b"K\x03" + part[at + 2 :] if name == "data.pkl" else old)
        )
    else:
        data = path.read_bytes()
        at = data.rindex(b"K\x04Nt")
        path.write_bytes(data[:at] + b"K\x03" + data[at + 2 :])
    with pytest.raises(CheckpointImportError, match="two types or sizes"):
        read_tensors(path)


def test_what_is_no_file_of_this_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "empty.pkl").touch()
    (tmp_path / "large.pkl").write_bytes(pickle.dumps({"w": VALUES}))
    monkeypatch.setattr(checkpoint_files, "MAX_BYTES", 100)
    for name, message in {
        "pipe.pkl": "no regular file",
        "empty.pkl": r"\(0 bytes\) must be 1 to 100",
        "large.pkl": "bytes\\) must be 1 to 100",
        "missing.pkl": "it is missing",
    }.items():
        with pytest.raises(CheckpointImportError, match=message):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("kind", fuzz_checkpoints.FORMATS)
def test_mutated_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    counts = fuzz_checkpoints.feed(kind, tmp_path, 0, 200)
    assert counts["read"] + counts["refused"] == 200
    assert counts["refused"] > 100
    assert counts["read"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz_checkpoints.FORMATS)
def test_very_many_mutated_files_in_a_confined_process(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.model.support.fuzz_checkpoints", kind, str(tmp_path), "1000", "101000"]
    child = subprocess.run([*command, str(FUZZ_MEMORY_BYTES)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    counts = json.loads(child.stdout)
    print(f"{kind}: {counts}")
    assert counts["read"] + counts["refused"] == 100_000
    assert counts["read"] > 2000
