"""Mutated media through the transcoder, many in one confined child: started by media/test_fuzz.py.

Run as `python -m tests.pipeline.support.fuzz_media FOLDER FIRST_SEED END_SEED MEMORY_BYTES`. `FOLDER/at-FIRST` holds
the number of the input in work, so that the parent knows which one ended a child; stdout gets a line every 200
inputs, with the number of inputs of each base and class.
"""

import json
import os
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.report import class_of
from pipeline.ingest.transcode import transcode
from pipeline.ingest.worker import confine_process
from pipeline.media.probe import Limits
from tests.pipeline.support import media_zoo as zoo

LIMITS = Limits(max_side_px=1024, max_pixels=1 << 20, max_duration_s=30, max_gap_s=2)
SMALL = {"size": (48, 32), "seconds": 0.32, "rate_hz": 16000, "layout": "mono"}
BASES: dict[str, dict[str, object]] = {
    "h264_aac.mp4": {"options": {"movflags": "faststart"}},
    "h264_fragments.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}, "audio": None},
    "hevc_aac.mp4": {"video": "libx265", "size": (128, 96)},  # x265 itself breaks the heap on 48x32
    "vp8_vorbis.webm": {"video": "libvpx", "audio": "vorbis", "layout": "stereo"},
    "vp9_opus.webm": {"video": "libvpx-vp9", "audio": "libopus"},
    "mpeg4_mp3.avi": {"video": "mpeg4", "audio": "libmp3lame"},
    "mjpeg_pcm.avi": {"video": "mjpeg", "audio": "pcm_s16le", "pixel_format": "yuvj420p"},
    "h264_pcm.mov": {"audio": "pcm_s16le"},
    "h264_aac.ts": {"format": "mpegts"},
    "h264_aac.flv": {},
    "mpeg2_mp2.mpg": {"video": "mpeg2video", "audio": "mp2", "format": "mpeg"},
    "h264_flac.mkv": {"audio": "flac"},
}
VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def make_bases(folder: Path) -> None:
    """Write the small files that are mutated."""
    for name, options in BASES.items():
        zoo.make(folder / name, **(SMALL | options))  # type: ignore[arg-type]


def mutate(bases: list[bytes], seed: int) -> bytes:
    """One input: a pure function of the bases and the seed; half of the changes fall on the first 2 KiB (headers)."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    data = bytearray(bases[seed % len(bases)])

    def place() -> int:
        end = len(data) if generator.random() < 0.5 else min(len(data), 2048)
        return int(generator.integers(end))

    for _ in range(int(generator.integers(1, 9))):
        kind = int(generator.integers(7))
        at = place()
        if kind <= 1:
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            data[at] = int(generator.integers(256))
        elif kind == 3:
            value = struct.pack(
                ">I" if generator.random() < 0.5 else "<I", VALUES[int(generator.integers(len(VALUES)))]
            )
            data[at : at + 4] = value[-min(4, len(data) - at) :]
        elif kind == 4:
            del data[at : at + int(generator.integers(1, 64))]
        elif kind == 5:
            other = bases[int(generator.integers(len(bases)))]
            start = int(generator.integers(len(other)))
            data[at:at] = other[start : start + int(generator.integers(1, 256))]
        else:
            del data[max(at, 64) :]
        if len(data) < 8:
            break
    return bytes(data)


def main() -> None:
    """Feed the inputs of a range of seeds."""
    folder, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = tuple(BASES)
    bases = [(folder / name).read_bytes() for name in names]
    confine_process(int(sys.argv[4]))
    settings = TranscodeSettings(limits=LIMITS, short_side_px=64)
    path, out, classes = folder / f"input-{first}", folder / f"out-{first}", Counter[str]()
    at = os.open(folder / f"at-{first}", os.O_CREAT | os.O_WRONLY, 0o600)
    for seed in range(first, end):
        os.pwrite(at, struct.pack("<Q", seed), 0)
        path.write_bytes(mutate(bases, seed))
        item = transcode(path, out, settings)
        assert bool(item.refused) != out.exists(), seed
        out.unlink(missing_ok=True)
        classes[f"{names[seed % len(names)]} {class_of(item)}"] += 1
        if (seed + 1 - first) % 200 == 0 or seed + 1 == end:
            print(json.dumps({"done": seed + 1, "classes": classes}), flush=True)


if __name__ == "__main__":
    main()
