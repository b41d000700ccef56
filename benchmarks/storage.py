"""What a store's settings cost and keep: `python -m benchmarks.storage [--quick] [--out FILE]`.

The same videos (340x256, 10 s, H.264 with a key frame every 250 frames, about 450 kbit/s; or --videos FOLDER) become a
store with each setting. Each row says: bytes of 10 s of video, CPU seconds to make them, KiB read and frames decoded
for a training clip (32 frames at stride 2 of 30 fps), CPU milliseconds to read and decode it, and PSNR of luma against
the source scaled to the stored size. Clips are read in turn from all stores. What a GPU's decoders take is unmeasured.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from benchmarks.ingest import clocks, since
from benchmarks.kernel_timing import check_out
from benchmarks.peers.clips import GOPS, make_videos
from benchmarks.result_rows import given_arguments, provenance, tell_rows
from pipeline.annotations import read
from pipeline.clip import ClipPlan, ClipSpec
from pipeline.config import DataConfig
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.media.fragments import ENCODERS, MOVFLAGS, encoder_options, parse_fragments
from pipeline.media.picture import PictureConverter, Size, Turn
from pipeline.plan import TrainPlan
from pipeline.store.reader import Store, StoreSplit
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter

SPEC = ClipSpec(num_frames=32, frame_stride=2)
PSNR_FRAMES = 24  # of each video
SYNTHETIC = "synthetic, grain"


@dataclass(frozen=True)
class Setting:
    """A row: its name, what ingest is asked for, and B-frames, which no store has."""

    name: str
    asked: TranscodeSettings = field(default_factory=TranscodeSettings)
    b_frames: int = 0


def settings() -> list[Setting]:
    """The settings that are compared: around x264's rate factor 23, the codecs, and half the frame rate."""
    base = TranscodeSettings(quality=23)
    h264 = [Setting(f"H.264, CRF {crf}, GOP 12", replace(base, quality=crf)) for crf in (20, 23, 26)]
    return [
        *h264,
        Setting("H.264, CRF 23, GOP 8", replace(base, gop=8)),
        Setting("H.264, CRF 23, GOP 16", replace(base, gop=16)),
        Setting("H.264, CRF 23, GOP 12, no fastdecode", replace(base, fastdecode=False)),
        Setting("H.264, CRF 23, GOP 12, 2 B-frames", base, b_frames=2),
        Setting("H.264, CRF 23, GOP 12, 15 fps", replace(base, max_fps="15")),
        Setting("VP9, CRF 24, GOP 12", TranscodeSettings(codec="vp9", quality=24)),
        Setting("VP9, CRF 33, GOP 12", TranscodeSettings(codec="vp9", quality=33)),
        Setting("MJPEG, scale 4", TranscodeSettings(codec="mjpeg", quality=4)),
        Setting("MJPEG, scale 8", TranscodeSettings(codec="mjpeg", quality=8)),
    ]


def stored_pictures(path: Path, size: Size) -> Iterator[Any]:
    """Decoded pictures of a video, scaled as ingest scales them (PyAV frames)."""
    converter = PictureConverter(size, Turn())
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield converter.convert(frame)


def make_store(setting: Setting, videos: Path, out: Path) -> float:
    """Make a store of all videos of a folder; returns the CPU seconds that it took, sound included."""
    began = clocks()
    if setting.b_frames:
        _with_b_frames(setting, videos, out)
    else:
        asked = replace(setting.asked, copy_fit_streams=False)
        report = ingest(read("folder", None, videos, {"val_fraction": "0"}), videos, out, asked, None, IngestOptions(1))
        assert report.counts["refused"] == 0, report.lines()
    return since(began)[1]


def _with_b_frames(setting: Setting, videos: Path, out: Path) -> None:
    """Write a store with B-frames, which ingest does not offer: for the comparison alone, without sound."""
    asked = setting.asked
    options = encoder_options(asked.codec, asked.frames_per_fragment, asked.rate_factor, b_frames=setting.b_frames)
    with StoreWriter(
        out, video_codec=asked.codec, gop=asked.frames_per_fragment, short_side_px=256, dataset="b-frames", classes={}
    ) as writer:
        rows = []
        for path in sorted(videos.iterdir()):
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                fps = Fraction(stream.average_rate or 30)
                width, height = (-(-side // 16) * 16 for side in (stream.width, stream.height))
                size = Size(width, height, stream.width, stream.height)
            made = out.parent / f"{out.name}-{path.stem}.mp4"
            with av.open(str(made), "w", options={"movflags": MOVFLAGS}) as target:
                video = target.add_stream(ENCODERS[asked.codec], rate=fps, options=options)
                video.width, video.height, video.pix_fmt = width, height, "yuv420p"
                for number, picture in enumerate(stored_pictures(path, size)):
                    picture.pts, picture.time_base, picture.pict_type = number, 1 / fps, 0
                    target.mux(video.encode(picture))
                target.mux(video.encode(None))
            fragments = parse_fragments(made.read_bytes(), fps=fps, width=width, height=height)
            made.unlink()
            media = writer.add_media(path.name, writer.add_video(fragments), source=path.name)
            rows.append(SampleRow(path.name, media, 0.0, float(fragments.num_frames / fps)))
        writer.add_samples("train", rows)


def psnr(store: StoreSplit, videos: Path) -> float:
    """Mean PSNR of luma over frames of all videos, dB, against the source scaled to the stored size."""
    found = []
    for media in range(len(store.media)):
        table = store.media
        size = Size(int(table.width[media]), int(table.height[media]), 0, 0)
        source = [_luma(frame) for frame in stored_pictures(videos / table.id(media).split("#")[0], size)]
        numbers = np.unique(np.linspace(0, int(table.num_frames[media]) - 1, PSNR_FRAMES).astype(np.int64))
        luma, _ = store.read_frames(media, numbers)
        step = len(source) / int(table.num_frames[media])
        for number, picture in zip(numbers.tolist(), luma, strict=True):
            near = int(number * step)  # of another rate, either neighbour may be the one that was kept
            span = range(max(near - 1, 0), min(near + 3, len(source))) if step != 1 else [number]
            others = [source[n] for n in span]
            found.append(max(_psnr(picture[..., 0], other) for other in others))
    return float(np.mean(found))


def _luma(frame: Any) -> NDArray[np.uint8]:
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width].copy()


def _psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(float(error), 1e-9)))


def decoded_for(store: StoreSplit, clip: ClipPlan) -> tuple[int, int]:
    """Bytes read and frames decoded for a clip's pictures."""
    numbers = np.unique(clip.frames)
    if store.video_codec == "mjpeg":
        rows = store.store.index_columns()["fragment_bytes"].row(clip.media)
        return int(rows[numbers].sum()), len(numbers)
    cut = store.read_video(clip.media, int(numbers[0]), int(numbers[-1]))
    return cut.data.nbytes, int(numbers[-1]) - cut.first_frame + 1


def decode_ms(stores: Sequence[StoreSplit], num_clips: int) -> tuple[list[float], list[tuple[float, float]]]:
    """CPU milliseconds of a clip for each store, and KiB read and frames decoded; clips in turn from all."""
    plans = [TrainPlan(store, SPEC, DataConfig(), seed=0) for store in stores]
    cpu, cost = [[] for _ in stores], [[] for _ in stores]  # type: list[list[float]], list[list[tuple[int, int]]]
    for position in range(num_clips + 1):
        for place, (store, plan) in enumerate(zip(stores, plans, strict=True)):
            clip = plan.clip(position)
            began = time.process_time()
            store.read_frames(clip.media, np.asarray(clip.frames))
            if position:  # the first one makes the decoder
                cpu[place].append((time.process_time() - began) * 1e3)
                cost[place].append(decoded_for(store, clip))
    means = [np.mean(np.asarray(values, np.float64), 0) for values in cost]
    return [float(np.median(values)) for values in cpu], [(float(m[0]) / 1024, float(m[1])) for m in means]


def dali_ms(store: StoreSplit, num_clips: int) -> float:
    """CPU milliseconds of a clip with DALI's decoder on the CPU (VP9)."""
    from nvidia.dali import Pipeline, fn, types

    plan = TrainPlan(store, SPEC, DataConfig(), seed=0)
    cuts = []
    for clip in map(plan.clip, range(num_clips + 1)):
        numbers = np.asarray(clip.frames, np.int32)
        cut = store.read_video(clip.media, int(numbers[0]), int(numbers[-1]))
        cuts.append((cut.data, numbers - np.int32(cut.first_frame)))
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipe:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        pipe.set_outputs(fn.decoders.video(data, frames=frames, device="cpu", pad_mode="none", build_index=False))
    pipe.build()
    times = []
    for encoded, numbers in cuts:
        began = time.process_time()
        pipe.feed_input("data", [encoded])
        pipe.feed_input("frames", [numbers])
        pipe.run()
        times.append((time.process_time() - began) * 1e3)
    return float(np.median(times[1:]))


def measure(videos: Path, folder: Path, chosen: Sequence[Setting], num_clips: int) -> list[dict[str, Any]]:
    """Make the stores and return a row for each."""
    seconds, made = [], []
    for number, setting in enumerate(chosen):
        out = folder / f"store{number}"
        seconds.append(make_store(setting, videos, out))
        made.append(Store.open(out).split("train"))
        print(f"{setting.name}: made in {seconds[-1]:.1f} CPU s", file=sys.stderr, flush=True)
    cpu_ms, cost = decode_ms(made, num_clips)
    rows = []
    for place, (setting, store) in enumerate(zip(chosen, made, strict=True)):
        columns, table = store.store.index_columns(), store.media
        length_s = sum(table.duration_s(media) for media in range(len(table)))
        encoding = store.store.info.encoding
        rows.append({
            "setting": setting.name,
            "encoding": vars(encoding) if encoding else None,
            "mib_per_10_s": round(float(columns["fragment_bytes"].values.sum()) / 2**20 / length_s * 10, 3),
            "cpu_s_to_make_10_s": round(seconds[place] / length_s * 10, 2),
            "kib_per_clip": round(cost[place][0], 1),
            "frames_decoded_per_clip": round(cost[place][1], 1),
            "cpu_ms_per_clip": round(cpu_ms[place], 2),
            "dali_cpu_ms_per_clip": round(dali_ms(store, num_clips), 2) if store.video_codec == "vp9" else None,
            "nvdec_clips_per_s": None,
            "psnr_db": round(psnr(store, videos), 2),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.storage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, help="folder of videos at constant rate, such as real ones")
    parser.add_argument("--material", default=SYNTHETIC, help="what the videos are, for the table")
    parser.add_argument("--count", type=int, default=6, help="videos made here")
    parser.add_argument("--clips", type=int, default=60, help="timed, of each store")
    parser.add_argument("--quick", action="store_true", help="two videos, ten clips")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        if options.clips < 1 or options.count < 1:
            raise ValueError(f"--clips ({options.clips}) and --count ({options.count}) must be at least 1")
    except ValueError as problem:
        parser.error(str(problem))
    count, clips = (2, 10) if options.quick else (options.count, options.clips)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        videos = options.videos or make_videos(folder / "videos", count, GOPS[:1])[GOPS[0]]
        source_bytes = sum(path.stat().st_size for path in videos.iterdir())
        rows = measure(videos.absolute(), folder, settings(), clips)
    source = provenance("benchmarks.storage", "cpu", given_arguments(arguments))
    common = {"benchmark": "storage", "material": options.material, "source_mib": round(source_bytes / 2**20, 2)}
    tell_rows(rows, options.out, common, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
