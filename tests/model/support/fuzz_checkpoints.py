"""Mutated checkpoint files through the reader, in the suite and in confined children: see test_checkpoint_files.py.

Run as `python -m tests.model.support.fuzz_checkpoints FORMAT FOLDER FIRST_SEED END_SEED MEMORY_BYTES`: prints the
counts as JSON, or ends with a traceback after the line that names the seed.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch

from model.checkpoint_files import CheckpointImportError, read_tensors

FORMATS = ("pickle", "torch", "old_torch")
OPCODES = (  # whole opcodes: some ask for much, some only damage brings there
    *(bytes([code]) for code in b"()]}N012RQatubse.\x81\x85\x86\x87\x89\x93\x94"),
    *(b"q\x00", b"h\x00", b"h\x01", b"K\xff", b"I1\n", b"J\xff\xff\xff\x7f", b"G\x7f\xf0" + bytes(6)),
    *(b"r\xff\xff\xff\x07", b"j\xff\xff\xff\x07", b"\x8a\x08" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f"),
    *(b"T\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 1 << 45)),
    *(b"X\x02\x00\x00\x00O8", b"X\x02\x00\x00\x00f8", b"cnumpy\ndtype\n", b"cos\nsystem\n", b"c_codecs\nencode\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
)


def python2_pickle(values: np.ndarray) -> bytes:
    """A dict of one caffe2 blob, (M, N) float32, in the opcodes of Python 2: text and bytes are 8-bit strings."""
    rows, columns = values.shape
    raw = values.astype("<f4").tobytes()
    head = b"\x80\x02}q\x00U\x05blobsq\x01}q\x02U\x07conv1_wq\x03"
    head += b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05"
    array = b"K\x00\x85U\x01b\x87Rq\x06(K\x01K" + bytes([rows]) + b"K" + bytes([columns]) + b"\x86cnumpy\ndtype\nq\x07"
    dtype = b"U\x02f4K\x00K\x01\x87Rq\x08(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    return head + array + dtype + b"T" + struct.pack("<i", len(raw)) + raw + b"tq\x09bss."


def bases(kind: str) -> list[bytes]:
    """Small sound files of a format."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    if kind == "pickle":
        content = {"blobs": {"conv1_w": values, "lr": np.float32(0.1), "other": values.T.copy(order="F"), "note": "x"}}
        return [*(pickle.dumps(content, protocol=protocol) for protocol in (2, 4, 5)), python2_pickle(values)]
    weights = OrderedDict((name, torch.from_numpy(values) * 2) for name in ("s1.pathway0_stem.conv.weight", "b"))
    content = {
        "epoch": 3,
        "model_state": weights,
        "optimizer_state": {"state": {0: {"step": torch.ones(1)}}, "lr": 0.1},
    }
    files = []
    for protocol in (2, 4):
        file = io.BytesIO()
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "torch")
        files.append(file.getvalue())
    return files


def _mutated_bytes(data: bytearray, generator: np.random.Generator) -> bytes:
    for _ in range(int(generator.integers(1, 4))):
        if not data:
            break
        at, choice = int(generator.integers(len(data))), int(generator.integers(8))
        if choice <= 1:
            data[at] = int(generator.integers(256))
        elif choice == 2:
            data[at] ^= 1 << int(generator.integers(8))
        elif choice == 3:
            del data[at:]
        elif choice == 4:
            del data[at : at + int(generator.integers(1, 16))]
        elif choice == 5:
            start = int(generator.integers(len(data)))
            data[at:at] = data[start : start + int(generator.integers(1, 64))]
        else:
            opcode = OPCODES[int(generator.integers(len(OPCODES)))]
            data[at : at + (len(opcode) if choice == 6 else 0)] = opcode
    return bytes(data)


def mutate(files: list[bytes], seed: int) -> bytes:
    """One input: a pure function of the files and the seed; in an archive half of the changes are to its pickle."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    data = files[seed % len(files)]
    if not data.startswith(b"PK") or generator.random() < 0.5:
        return _mutated_bytes(bytearray(data), generator)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            part = source.read(name)
            target.writestr(name, _mutated_bytes(bytearray(part), generator) if name.endswith("data.pkl") else part)
    return out.getvalue()


def feed(kind: str, folder: Path, first: int, end: int) -> Counter[str]:
    """Read the inputs of a range of seeds: how many were read and refused. Anything but those two is an exception."""
    files, path, counts = bases(kind), folder / f"{kind}-{first}.pyth", Counter[str]()
    with path.open("wb", buffering=0) as file:  # opened once: making a file costs more than reading it
        for seed in range(first, end):
            data = mutate(files, seed)
            os.pwrite(file.fileno(), data, 0)
            file.truncate(len(data))
            try:
                tensors = read_tensors(path)
                assert sum(value.numel() * value.element_size() for value in tensors.values()) <= 1 << 20, "size"
                counts["read"] += 1
            except CheckpointImportError as error:
                counts["refused" if str(path) in str(error) else "refused without its path"] += 1
            except BaseException:
                print(f"{kind} seed {seed}", file=sys.stderr, flush=True)
                raise
    return counts


def main() -> None:
    """One child: its memory may grow by a set amount only, from where the imports left it."""
    kind, folder, first, end, memory_bytes = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    feed(kind, folder, first, first + 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    print(json.dumps(feed(kind, folder, first, end)))


if __name__ == "__main__":
    main()
