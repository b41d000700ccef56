"""Mutated media: whatever comes, an input is classed, or costs its child process; the parent never dies."""

import itertools
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pipeline.support import fuzz_media

ROOT = Path(__file__).resolve().parents[3]
# Inputs per format of the long run; its default is about 8,300, AVSF_FUZZ_INPUTS=100000 takes more than an hour.
LONG_RUN = int(os.environ.get("AVSF_FUZZ_INPUTS", "0")) * len(fuzz_media.BASES) or 100_000
UNCOUNTED = "before a death, not counted"
STALL_S = 60.0  # 200 inputs take a few seconds


def feed(folder: Path, first: int, end: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Run all inputs of a range, restarting the child behind an input that ended it; returns classes and deaths."""
    classes, deaths, seed = Counter[str](), list[tuple[int, str]](), first
    while seed < end:
        command = [
            sys.executable,
            "-m",
            "tests.pipeline.support.fuzz_media",
            str(folder),
            str(seed),
            str(end),
            str(1 << 30),
        ]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stderr is not None
        counted, last, moved = Counter[str](), seed, time.monotonic()
        while True:
            ready, _, _ = select.select([child.stdout], [], [], 1.0)
            line = child.stdout.readline() if ready else b""
            if line:
                state = json.loads(line)
                counted, last, moved = Counter(state["classes"]), state["done"], time.monotonic()
            elif ready or time.monotonic() - moved > STALL_S:
                break
        child.kill()
        words = child.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        status = child.wait()
        classes += counted
        if last >= end:
            break
        (at,) = struct.unpack("<Q", (folder / f"at-{seed}").read_bytes())
        deaths.append((at, f"status {status} {words}"))
        classes[UNCOUNTED] += at - last
        seed = at + 1
    return classes, deaths


def run(folder: Path, inputs: int, first: int = 0) -> tuple[Counter[str], list[tuple[int, str]]]:
    fuzz_media.make_bases(folder)
    workers = min(len(os.sched_getaffinity(0)), 8)
    edges = [first + inputs * n // workers for n in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda pair: feed(folder, *pair), itertools.pairwise(edges)))
    total = Counter[str]()
    for classes, _ in results:
        total += classes
    return total, [death for _, deaths in results for death in deaths]


@pytest.mark.parametrize(
    "inputs",
    [pytest.param(600, marks=pytest.mark.integration), pytest.param(LONG_RUN, marks=pytest.mark.slow, id="long")],
)
def test_mutated_media(inputs: int, tmp_path: Path) -> None:
    began = time.monotonic()
    found, deaths = run(tmp_path, inputs)
    uncounted, formats = found.pop(UNCOUNTED, 0), {name: Counter[str]() for name in fuzz_media.BASES}
    for key, number in found.items():
        name, _, kind = key.partition(" ")
        formats[name][kind] += number
    classes = sum(formats.values(), Counter[str]())
    print(f"{inputs} inputs in {time.monotonic() - began:.0f} s: {dict(classes)}; deaths of children: {deaths}")
    print(*(f"{name}: {dict(kinds)}" for name, kinds in formats.items()), sep="\n")
    assert classes.total() + uncounted + len(deaths) == inputs
    assert all("Error" not in words for _, words in deaths), deaths  # our own exceptions are bugs, signals are FFmpeg's
    assert len(deaths) <= inputs // 1000
    for kind in ("refused", "repaired", "short"):  # all bases are short; silent and fine take a rare lie about lengths
        assert classes[kind] > inputs // 20, (kind, classes)
    for name, kinds in formats.items():  # no format is refused or accepted whatever its bytes
        assert 0 < kinds["refused"] < kinds.total(), (name, kinds)


def test_inputs_depend_on_the_seed_alone(tmp_path: Path) -> None:
    bases = [bytes(range(256)) * 20, b"abcd" * 700]
    assert fuzz_media.mutate(bases, 7) == fuzz_media.mutate(bases, 7)
    assert len({fuzz_media.mutate(bases, seed) for seed in range(200)}) == 200
