"""The store's format on disk, versions 1 and 2: names, limits, store.json, digests (docs/store_format.md)."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = "avsf-store"
VERSIONS = (1, 2)  # 2 says how the media were encoded; both are read
INFO_NAME, INDEX_NAME, SHARD_FOLDER = "store.json", "index.arrow", "shards"
MAX_SIDE_PX, MAX_FPS = 8192, 1000  # of what is stored
AUDIO_BLOCK_SAMPLES = 16_000  # samples per checksum: one second
CODECS = ("h264", "vp9", "mjpeg")
LABEL_PREFIX = "labels_"  # of the columns of a sample table that hold a label set
SPLIT_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
FILE_RULE = re.compile(rf"{INDEX_NAME}|samples-[A-Za-z0-9][A-Za-z0-9_.-]*\.arrow|{SHARD_FOLDER}/[0-9]{{5}}\.bin")
SET_RULE = re.compile(r"[a-z][a-z0-9_]*")


class StoreError(ValueError):
    """A store that cannot be read or written: names the path, the value, the rule and the remedy."""


def sample_file(split: str) -> str:
    """File name of a split's sample table."""
    return f"samples-{split}.arrow"


def shard_file(number: int) -> str:
    """Path of a shard inside the store."""
    return f"{SHARD_FOLDER}/{number:05d}.bin"


@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 (hex) of one file of a store."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Encoding:
    """How the media of a store were encoded.

    Args:
        quality: rate factor (h264, vp9) or quantiser scale (mjpeg). fastdecode: h264 without CABAC and deblocking.
        max_fps: rate that faster sources were reduced to, such as "15"; "" = none was.
        copied_if_fit: streams that had the store's form were copied as they were.
    """

    quality: int
    fastdecode: bool = True
    max_fps: str = ""
    copied_if_fit: bool = True

    def __post_init__(self) -> None:
        for name, hint in (("quality", int), ("fastdecode", bool), ("max_fps", str), ("copied_if_fit", bool)):
            if type(getattr(self, name)) is not hint:
                raise TypeError(f"encoding.{name} ({getattr(self, name)!r})")


@dataclass(frozen=True)
class StoreInfo:
    """Contents of store.json.

    Args:
        video_codec: "h264", "vp9" or "mjpeg". gop: frames per fragment asked of the encoder.
        short_side_px: of the stored video.
        sample_rate_hz: of the audio. dataset: its name. classes: label set -> class names, index = class id.
        files: path inside the store -> size and digest, every file but store.json.
        encoding: how the media were encoded; None in a store of version 1, which does not say.
    """

    video_codec: str
    gop: int
    short_side_px: int
    dataset: str
    classes: dict[str, tuple[str, ...]]
    sample_rate_hz: int = 16_000
    files: dict[str, FileDigest] = field(default_factory=dict)
    encoding: Encoding | None = None

    @property
    def version(self) -> int:
        """Of the format."""
        return 1 if self.encoding is None else 2

    def to_bytes(self) -> bytes:
        """Canonical bytes of store.json; "sha256" is the digest of the same document without that key."""
        document = {"format": FORMAT, "version": self.version} | asdict(self)
        if self.encoding is None:
            del document["encoding"]
        return _canonical(document | {"sha256": hashlib.sha256(_canonical(document)).hexdigest()})

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted(name[8:-6] for name in self.files if name.startswith("samples-")))


def _canonical(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_info(raw: bytes, path: Path) -> StoreInfo:
    """Read store.json strictly: every byte of it is covered by its own digest.

    Raises:
        StoreError: not this format, another version, a wrong type, or bytes that differ from the canonical form.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: {error}; it must be JSON as the store writer left it; restore it") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise StoreError(f"{path}: format ({found!r}) must be {FORMAT!r}; point at a store made by this package")
    if document.get("version") not in VERSIONS or isinstance(document["version"], bool):
        raise StoreError(
            f"{path}: version ({document.get('version')!r}) must be {' or '.join(map(str, VERSIONS))}; "
            "make the store again, or use the release that wrote it"
        )
    try:
        info = _info_from(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{path}: field {error} must be there with its right type; restore the file") from error
    if info.to_bytes() != raw:
        raise StoreError(
            f"{path}: sha256 ({document.get('sha256')!r}) must match its contents; it was changed: restore it"
        )
    bad = [name for name in info.files if not FILE_RULE.fullmatch(name)]
    if bad or INDEX_NAME not in info.files:
        raise StoreError(
            f"{path}: files ({bad or 'no ' + INDEX_NAME}) must be the names of version {info.version}; restore it"
        )
    if info.video_codec not in CODECS or info.sample_rate_hz != 16_000:
        raise StoreError(
            f"{path}: video_codec ({info.video_codec}) and sample_rate_hz ({info.sample_rate_hz}) "
            f"must be one of {CODECS} and 16000; make the store again"
        )
    if info.video_codec == "mjpeg" and info.encoding is None:
        raise StoreError(f"{path}: version ({info.version}) must be 2 for mjpeg; make the store again")
    return info


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(f"number ({value!r})")
    return value


def _info_from(document: dict[str, Any]) -> StoreInfo:
    files = {name: FileDigest(_integer(d["bytes"]), str(d["sha256"])) for name, d in document["files"].items()}
    return StoreInfo(
        video_codec=str(document["video_codec"]),
        gop=_integer(document["gop"]),
        short_side_px=_integer(document["short_side_px"]),
        dataset=str(document["dataset"]),
        classes={str(k): tuple(str(name) for name in names) for k, names in document["classes"].items()},
        sample_rate_hz=_integer(document["sample_rate_hz"]),
        files=files,
        encoding=Encoding(**document["encoding"]) if document["version"] == 2 else None,
    )


def digest_file(path: Path, progress: Callable[[int], None] | None = None) -> FileDigest:
    """Size and SHA-256 of a file, read in pieces of 4 MiB; `progress` gets the bytes of each piece."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileDigest(size, digest.hexdigest())
