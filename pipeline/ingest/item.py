"""What ingest is asked for and what it says of one file: settings, shape of the store, and the item that came out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from pipeline.media.probe import Limits
from pipeline.store.format import Encoding

DEFAULT_QUALITY = {"h264": 23, "vp9": 24, "mjpeg": 4}
BEST_QUALITY = {"h264": 0, "vp9": 0, "mjpeg": 1}
WORST_QUALITY = {"h264": 51, "vp9": 63, "mjpeg": 31}
MAX_GOP, DEFAULT_GOP = 16, 12


class IngestError(ValueError):
    """Ingest cannot go on; the message says what to do."""


@dataclass(frozen=True)
class TranscodeSettings:
    """What a store holds; all but clip_s, which only widens annotated spans, is part of the key of finished items.

    Args:
        codec: "h264" (CPUs and GPUs), "vp9" (DALI decodes it on a CPU as well), or "mjpeg" (whole pictures: large, the
            quickest to read). gop: frames a fragment, 1 to 16; None = 12, and 1 for mjpeg, which has no other.
        short_side_px: upper bound, sources are never scaled up.
        quality: rate factor (h264, vp9) or quantiser scale (mjpeg) of the encoder, None = `DEFAULT_QUALITY`.
        fastdecode: H.264 without CABAC and deblocking.
        max_fps: sources above it are reduced, None keeps their rate. clip_s: shorter media are called short.
        copy_fit_streams: copy streams that already have the store's form.
        min_decodable: share of the claimed duration or packets that must decode; less is refused.
        limits: on headers.
    """

    codec: str = "h264"
    gop: int | None = None
    short_side_px: int = 256
    quality: int | None = None
    fastdecode: bool = True
    max_fps: str | None = None
    clip_s: float = 2.13
    copy_fit_streams: bool = True
    min_decodable: float = 0.5
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.codec not in DEFAULT_QUALITY:
            raise ValueError(f"codec ({self.codec!r}) must be one of {sorted(DEFAULT_QUALITY)}")
        most = 1 if self.codec == "mjpeg" else MAX_GOP
        if self.gop is None:
            object.__setattr__(self, "gop", min(DEFAULT_GOP, most))
        if not 1 <= self.frames_per_fragment <= most:
            what = "1 frame for mjpeg" if most == 1 else f"1 to {most} frames; {DEFAULT_GOP} is the default"
            raise ValueError(f"gop ({self.gop}) must be {what}")
        if not self.fastdecode and self.codec != "h264":
            raise ValueError(f"fastdecode (off) must be on for codec {self.codec}, which has no such tuning; leave it")
        if not 16 <= self.short_side_px <= 4320:
            raise ValueError(f"short_side_px ({self.short_side_px}) must be 16 to 4320; 256 is the default")
        best, worst, usual = (table[self.codec] for table in (BEST_QUALITY, WORST_QUALITY, DEFAULT_QUALITY))
        if self.quality is not None and not best <= self.quality <= worst:
            rule = f"must be {best} to {worst} for {self.codec}; {usual} is the default"
            raise ValueError(f"quality ({self.quality}) {rule}")
        if self.max_fps is not None and not _is_rate(self.max_fps):
            raise ValueError(f"max_fps ({self.max_fps}) must be 1 to 1000, or none; write 30 or 30000/1001")
        if not 0 <= self.clip_s < math.inf:
            raise ValueError(f"clip_s ({self.clip_s:g}) must be seconds from 0 on; the default is 2.13")
        if not 0 <= self.min_decodable <= 1:
            raise ValueError(f"min_decodable ({self.min_decodable:g}) must be a share from 0 to 1; the default is 0.5")

    @property
    def frames_per_fragment(self) -> int:
        """The GOP as a number."""
        assert self.gop is not None
        return self.gop

    @property
    def rate_factor(self) -> int:
        """The quality as a number."""
        return DEFAULT_QUALITY[self.codec] if self.quality is None else self.quality

    @property
    def encoding(self) -> Encoding:
        """What a store says of how it was made."""
        return Encoding(self.rate_factor, self.fastdecode, self.max_fps or "", self.copy_fit_streams)

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TranscodeSettings:
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"limits": Limits(**values["limits"])})


def _is_rate(text: str) -> bool:
    try:
        return 1 <= Fraction(text) <= 1000
    except (ValueError, ZeroDivisionError):
        return False


@dataclass(frozen=True)
class StoreShape:
    """How items are laid out: bound of a shard, and the windows on long videos (`plan_windows`)."""

    shard_bytes: int = 256 << 20
    chunk_s: float = 60.0
    overlap_s: float = 12.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 1 << 16 <= self.shard_bytes < 2**31:
            raise ValueError(f"shards ({self.shard_bytes} bytes) must be 64 KiB to 2047 MiB; 256 MiB is the default")
        check_windows(self.chunk_s, self.overlap_s)


def check_windows(chunk_s: float, overlap_s: float) -> None:
    """Raise ValueError unless chunks are long enough for their overlap, or 0."""
    if not 0 <= chunk_s < math.inf or not 0 <= overlap_s < math.inf:
        raise ValueError(f"chunks ({chunk_s:g} s) and overlap ({overlap_s:g} s) must be seconds >= 0; 60 and 12 suit")
    if chunk_s and overlap_s > chunk_s / 2:
        raise ValueError(f"overlap ({overlap_s:g} s) must be at most half of the chunks ({chunk_s:g} s)")


@dataclass(frozen=True, slots=True)
class Item:
    """What became of one input file.

    Args:
        refused: reason, or empty. for_resources: for lack of time or memory, or after a crash: higher limits may help,
            so an interrupted run that goes on tries the file again.
        repairs: changes beyond plain transcoding. notes: what else is worth knowing. warnings: what may not be what
            was wanted, and lies in the choice of streams or in colours.
        silent: why there is no audio, or empty. short: less than one clip long.
        num_frames, fps_num, fps_den, width, height, display_width, display_height: of the stored video.
        num_samples: of the audio, which ends where the source's does. first_sample: before it there is only the silence
            that was put before the source's audio. origin_s: when a player of the source shows the first frame.
        mp4_bytes: the payload file is that many bytes of fragmented MP4, then the PCM. bytes, sha256: of all of it.
        copied: the stream was not encoded again. decoded_frames: of the source. left_out_s: of the source, not read as
            nothing there is annotated.
    """

    refused: str = ""
    for_resources: bool = False
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    silent: str = ""
    short: bool = False
    num_frames: int = 0
    fps_num: int = 0
    fps_den: int = 1
    width: int = 0
    height: int = 0
    display_width: int = 0
    display_height: int = 0
    num_samples: int = 0
    first_sample: int = 0
    origin_s: float = 0.0
    mp4_bytes: int = 0
    bytes: int = 0
    sha256: str = ""
    copied: bool = False
    decoded_frames: int = 0
    left_out_s: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Item:
        """Inverse of `dataclasses.asdict` through JSON."""
        return cls(**values | {name: tuple(values.get(name, ())) for name in ("repairs", "notes", "warnings")})
