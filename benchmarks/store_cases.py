"""Material for benchmarks/store.py: plain videos with sound, their store, and an index of a million clips."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.format import (
    INDEX_NAME,
    INFO_NAME,
    SHARD_FOLDER,
    FileDigest,
    StoreInfo,
    digest_file,
    sample_file,
    shard_file,
)
from pipeline.store.schemas import index_schema, sample_schema, write_arrow
from pipeline.store.writer import SampleRow, StoreWriter

FPS, WIDTH_PX, HEIGHT_PX, RATE_HZ = 30, 352, 256, 16_000
NUM_SOUNDS = 64
QUALITY = {"vp9": 33, "h264": 23}  # rate factors of about the same quality


def pictures(seed: int, num_frames: int) -> Iterator[NDArray[np.uint8]]:
    """A soft texture that drifts, two boxes that move over it, and a little noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    soft: NDArray[Any] = np.kron(rng.integers(0, 160, (HEIGHT_PX // 32, WIDTH_PX // 32, 3)), np.ones((32, 32, 1)))
    for axis in (0, 1):
        soft = np.mean([np.roll(soft, shift, axis) for shift in range(16)], 0)
    texture = (soft + rng.integers(0, 40, (HEIGHT_PX, WIDTH_PX, 1))).astype(np.uint8)
    noise = rng.integers(0, 3, (HEIGHT_PX, WIDTH_PX, 1)).astype(np.uint8)
    for number in range(num_frames):
        picture = np.roll(texture, number // 2, 1) + np.roll(noise, 17 * number, 1)
        for box in range(2):
            y, x = (40 + 90 * box + number) % (HEIGHT_PX - 48), (30 + 3 * number * (1 + box)) % (WIDTH_PX - 48)
            picture[y : y + 48, x : x + 48] = texture[:48, :48] // 2 + 60 * box
        yield picture


def sound(seed: int, seconds: float) -> NDArray[np.int16]:
    """Noise and a tone, (count,) int16 at 16 kHz."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    tone = 5000 * np.sin(2 * np.pi * (200 + 20 * (seed % 40)) * time_s)
    return np.asarray(tone + rng.normal(0, 500, len(time_s)), np.int16)


def write_plain(path: Path, seed: int, num_frames: int) -> None:
    """One MP4 as the web has them: H.264, GOP 250, B-frames, AAC 48 kHz."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": "250", "threads": "1"})
        video.width, video.height, video.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        audio = container.add_stream("aac", rate=48_000)
        audio.layout = "mono"
        for picture in pictures(seed, num_frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        samples = np.repeat(sound(seed, num_frames / FPS), 3).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        container.mux(video.encode(None))


def fragments(seed: int, num_frames: int, codec: str) -> FragmentedVideo:
    """The same pictures in the store's form."""
    frames = pictures(seed, num_frames)
    return encode_fragments(
        frames, fps=Fraction(FPS), width=WIDTH_PX, height=HEIGHT_PX, codec=codec, quality=QUALITY[codec]
    )


def make_sources(
    root: Path, num_videos: int, num_frames: int, codecs: Sequence[str], num_threads: int
) -> dict[str, Path]:
    """The same videos as a folder of plain files ("plain") and as a store for each codec; returns the paths."""
    plain = root / "plain"
    plain.mkdir(parents=True)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda seed: write_plain(plain / f"{seed:04d}.mp4", seed, num_frames), range(num_videos)))
        for codec in codecs:
            with StoreWriter(
                root / codec, video_codec=codec, gop=12, short_side_px=HEIGHT_PX, dataset="benchmark", classes={}
            ) as writer:
                videos = pool.map(lambda seed, codec=codec: fragments(seed, num_frames, codec), range(num_videos))
                for seed, video in enumerate(videos):
                    audio = writer.add_audio(sound(seed, num_frames / FPS))
                    media = writer.add_media(f"{seed:04d}", writer.add_video(video), audio)
                    writer.add_samples("all", [SampleRow(f"{seed:04d}", media, 0.0, num_frames / FPS)])
    return {"plain": plain} | {codec: root / codec for codec in codecs}


def make_million(path: Path, count: int, num_frames: int = 300) -> Path:
    """A store of `count` rows that point at the same bytes: a full-size index without the disk space.

    Every row has its own id, fragment table and labels, as a real index has; reads return valid bytes. The sound lies
    there `NUM_SOUNDS` times: rows that share its bytes are one video to the plan, and no negative of each other.
    """
    (path / SHARD_FOLDER).mkdir(parents=True)
    with StoreWriter(
        path / "one", video_codec="vp9", gop=12, short_side_px=HEIGHT_PX, dataset="one", classes={}
    ) as writer:
        reference = writer.add_video(fragments(0, num_frames, "vp9"))
        audio = writer.add_audio(sound(0, num_frames / FPS))
        writer.add_media("one", reference, audio)
    (path / "one" / shard_file(0)).rename(path / shard_file(0))
    with pa.memory_map(str(path / "one" / INDEX_NAME)) as source:
        row = pa.ipc.open_file(source).get_batch(0)
        columns = {item.name: _repeated(row.column(item.name), item, count) for item in index_schema()}
        columns["audio_offset"] = _sounds(path / shard_file(0), row, count)
    files = {INDEX_NAME: write_arrow(path / INDEX_NAME, index_schema(), list(columns.values()))}
    labels = np.random.default_rng(0).integers(0, 400, count).astype(np.int32)
    schema = sample_schema(["action"])
    values = {
        "id": _names(count),
        "media": pa.array(np.arange(count, dtype=np.int64)),
        "start_s": pa.array(np.zeros(count)),
        "end_s": pa.array(np.full(count, num_frames / FPS)),
        "key_time_s": pa.array(np.full(count, np.nan)),
        "labels_action": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), pa.array(labels)),
    }
    none = pa.array(np.zeros(count + 1, np.int32))
    table = [
        values[item.name] if item.name in values else pa.ListArray.from_arrays(none, pa.array([], item.type.value_type))
        for item in schema
    ]
    files[sample_file("train")] = write_arrow(path / sample_file("train"), schema, table)
    files[shard_file(0)] = digest_file(path / shard_file(0))
    _drop(path / "one")
    classes = {"action": tuple(f"class {i:03d}" for i in range(400))}
    info = StoreInfo("vp9", 12, HEIGHT_PX, "million", classes, files=_sorted(files))
    (path / INFO_NAME).write_bytes(info.to_bytes())
    return path


def _repeated(column: pa.Array, item: pa.Field, count: int) -> pa.Array:
    if item.name == "id":
        return _names(count)
    if pa.types.is_string(item.type):
        return pa.array([column[0].as_py()] * count, item.type)
    if pa.types.is_list(item.type):
        values = column.values.to_numpy()
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * len(values))
        return pa.ListArray.from_arrays(offsets, pa.array(np.tile(values, count)))
    return pa.array(np.repeat(column.to_numpy(), count))


def _sounds(shard: Path, row: pa.RecordBatch, count: int) -> pa.Array:
    """Repeat the sound of the one medium at the end of its shard; offsets of `count` rows, in turn."""
    offset, size = row.column("audio_offset")[0].as_py(), 2 * row.column("num_samples")[0].as_py()
    begin = shard.stat().st_size
    with shard.open("r+b") as file:
        file.seek(offset)
        samples = file.read(size)
        file.seek(0, 2)
        file.write(samples * (NUM_SOUNDS - 1))
    places = np.array([offset, *(begin + size * i for i in range(NUM_SOUNDS - 1))], np.int64)
    return pa.array(places[np.arange(count) % NUM_SOUNDS]).cast(row.column("audio_offset").type)


def _names(count: int) -> pa.Array:
    return pa.array([f"clip-{i:08d}" for i in range(count)])


def _sorted(files: dict[str, FileDigest]) -> dict[str, FileDigest]:
    return dict(sorted(files.items()))


def _drop(folder: Path) -> None:
    for item in sorted(folder.rglob("*"), reverse=True):
        item.rmdir() if item.is_dir() else item.unlink()
    folder.rmdir()
