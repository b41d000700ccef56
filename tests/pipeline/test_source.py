"""What the clip source calls sound: windows of nothing but zeros have none."""

from pathlib import Path

import numpy as np

from pipeline.source import Wanted, read_sound
from tests.pipeline.support.stores import noise, numbered_frames, write_store


def test_windows_of_zeros_have_no_audio(tmp_path: Path) -> None:
    track = np.concatenate([np.zeros(16_000, np.int16), noise(0.5)])  # late sound that ends early
    split = write_store(tmp_path / "s", [("a", numbered_frames(3), track)])
    wanted = Wanted(8_000, "cpu")
    starts = {-9_000: False, 0: False, 8_000: False, 8_001: True, 16_000: True, 23_999: True, 24_000: False}
    for start, has_audio in starts.items():
        samples, found = read_sound(split, 0, start, wanted)
        assert (len(samples), found) == (8_000, has_audio)
        assert samples.any() == has_audio
