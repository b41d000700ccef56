"""Stores for the recorded batches, and the digest of a batch that they are compared by."""

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.annotations.rows import Box, TimedLabel
from pipeline.batch import Batch
from pipeline.media.fragments import encode_fragments
from pipeline.store.reader import Store
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter
from tests.pipeline.support.stores import noise

FIELDS = (
    *("frames", "log_mel", "negative_log_mel", "has_audio", "has_negative", "is_substitute", "labels", "rotation"),
    *("sample", "view", "position", "ids", "start_s", "boxes", "box_labels", "box_index"),
)


def picture(number: int, frame: int, width: int = 128, height: int = 96) -> NDArray[np.uint8]:
    """A smooth moving pattern, (H, W, 3), integers only."""
    ys, xs = np.mgrid[:height, :width]
    planes = [(xs * (2 + number) + ys * (3 - c) + frame * 5) % 256 for c in range(3)]
    return (np.stack(planes, axis=2) // 2 + 40).astype(np.uint8)


def make_store(path: Path, *, key_frames: bool = False) -> Store:
    """Six media of three seconds at 25 fps, the last one silent, with classes, times and (on request) boxes."""
    classes = {"action": list("abcd"), "verb": list("vwxyz"), "noun": list("nopq")}
    with StoreWriter(path, video_codec="vp9", gop=12, short_side_px=96, dataset="recorded", classes=classes) as writer:
        rows = []
        for number in range(6):
            frames = [picture(number, frame) for frame in range(75)]
            video = encode_fragments(frames, fps=Fraction(25), width=128, height=96, codec="vp9", gop=12, quality=30)
            sound = None if number == 5 else writer.add_audio(noise(3, seed=number))
            media = writer.add_media(f"m{number}", writer.add_video(video), sound, source=f"m{number}")
            boxes = (Box(0.1, 0.2, 0.5, 0.9, (number % 4,)), Box(0.3, 0.1, 0.95, 0.6, (0, 3)))
            rows.append(
                SampleRow(
                    f"s{number}", media, 0.25, 2.75,
                    {"action": (number % 4,), "verb": (0, 2)[: number % 3], "noun": (1,)},
                    key_time_s=0.5 + 0.3 * number if key_frames else None,
                    actions=(TimedLabel(1, 0.3, 1.2), TimedLabel(3, 1.0, 2.0 + number / 10)),
                    boxes=boxes if key_frames else (),
                )
            )  # fmt: skip
        for split in ("train", "val"):
            writer.add_samples(split, rows)
    return Store.open(path)


def damage(path: Path, media: int) -> None:
    """Flip a byte near the end of a medium's video."""
    cut = Store.open(path).split("train").read_video(media, 0, 74)
    shard = path / "shards" / "00000.bin"
    data = bytearray(shard.read_bytes())
    place = data.find(bytes(cut.data[-200:]))
    assert place > 0
    data[place + 100] ^= 0xFF
    shard.write_bytes(bytes(data))


def digest(batch: Batch) -> str:
    """Digest of every value of a batch, 16 hexadecimal digits."""
    out = hashlib.sha256()
    for name in FIELDS:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().numpy()
            out.update(f"{name} {array.dtype} {array.shape}".encode())
            out.update(array.tobytes())
        else:
            out.update(f"{name} {value!r}".encode())
    return out.hexdigest()[:16]
