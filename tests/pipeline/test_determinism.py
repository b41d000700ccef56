"""The same files give the same bytes, whatever lies in memory and however busy the machine is."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.annotations import read
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from tests.pipeline.ingest.test_run import digest
from tests.pipeline.support.plain_videos import write_video

M_PERTURB = -6  # glibc, malloc.h: fresh memory is filled with the complement of this byte


def moving_blocks(count: int, width: int, height: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Frames over which a field of blocks of random colours moves, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    field = rng.integers(0, 256, (height // 8 + 2, width // 8 + 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(field[i % 9 : i % 9 + height, 3 * i % 60 :][:, :width]) for i in range(count)]


def encode_over(fill: int, width: int, height: int, codec: str) -> FragmentedVideo:
    """Encode with fresh memory filled with the complement of a byte; 0 leaves it as it was."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_PERTURB, fill)
    try:
        frames = moving_blocks(24, width, height)
        return encode_fragments(frames, fps=Fraction(25), width=width, height=height, codec=codec)
    finally:
        mallopt(M_PERTURB, 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the C library's mallopt")
@pytest.mark.parametrize(("width", "codec"), [(176, "h264"), (144, "h264"), (176, "vp9")])
def test_memory_contents_do_not_reach_the_stream(width: int, codec: str) -> None:
    videos = [encode_over(fill, width, 160, codec) for fill in (0, 1, 2, 85)]
    assert all(video == videos[0] for video in videos[1:])


def test_macroblock_tree_is_off() -> None:
    video = encode_fragments(moving_blocks(2, 32, 32), fps=Fraction(25), width=32, height=32, codec="h264")
    assert b" mbtree=0 " in video.fragments[0]
    assert b" threads=1 " in video.fragments[0]


@contextmanager
def busy_cpus() -> Iterator[None]:
    """Twice as many spinning processes as there are cores."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_full_pool_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(20):
        kind = (".mp4", ".mkv", ".ts")[number % 3]
        write_video(videos / f"{number}{kind}", frames=moving_blocks(60, 224, 208, number))
    annotations = read("folder", None, videos, {"val_fraction": "0"})
    settings = TranscodeSettings(codec="h264", short_side_px=160, gop=8)
    digests = []
    with busy_cpus():
        for run in range(10):
            monkeypatch.setenv("MALLOC_PERTURB_", str(run // 2))
            store = tmp_path / f"store{run}"
            ingest(annotations, videos, store, settings, options=IngestOptions(workers=4))
            digests.append(digest(store))
    assert all(value == digests[0] for value in digests[1:])
