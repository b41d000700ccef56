"""What the loader gives without a model: `python -m benchmarks.loader [STORE] [--device cuda] [--out FILE]`.

Clips per second of the whole pipeline (read, cut, decode, resize, normalise, log-mel), the same without video and
without audio, and of each decoder that the store and the device allow, all in one run. Without a store it makes one of
256 px noise-like video with sound, 10 s a clip; --keep leaves it for the next run. Rows are appended as they come.
`python -m benchmarks.loader --peers [--quick]` compares it with other loaders instead (benchmarks/peers/compare.py).
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from benchmarks.decoder_load import DecoderLoad
from benchmarks.kernel_timing import check_out
from benchmarks.result_rows import given_arguments, provenance, tell_rows
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.nvdec.choice import choose_decoder
from pipeline.store.reader import Store
from pipeline.synthetic import SyntheticSpec, ensure_store

KINETICS = ClipSpec(num_frames=32, frame_stride=2)
TIMED_S = 10.0  # of one row, once three batches are timed
WHAT = ("all", "no audio", "no video")


def kinetics_like(folder: Path, codec: str, gop: int = 12, *, streams: int = 8, frames: int = 300) -> Path:
    """Make (or find) a store of 256 px videos, 10 s at 300 frames; returns its folder."""
    spec = SyntheticSpec(
        train_streams=streams, val_streams=2, num_frames=frames, size_px=256, codec=codec, gop=gop, num_classes=2
    )
    return ensure_store(folder, spec)


def clips_per_second(
    dataset: Dataset,
    config: DataConfig,
    options: LoaderOptions,
    *,
    batches: int,
    spec: ClipSpec = KINETICS,
    timed_s: float = TIMED_S,
) -> dict[str, Any]:
    """Time batches after a warm-up of three.

    Args:
        dataset: Split to read.
        config: Decoder and threads.
        options: Batch size and device.
        batches: Timed batches, fewer once `timed_s` are over.
        spec: Shape of the clips.
        timed_s: Seconds after which a row ends, once three batches are timed.

    Returns:
        clips_per_second, percentiles of a batch's time in ms, who decoded, and how busy NVDEC was.
    """
    loader = TrainLoader(dataset, spec, config, options, seed=0)
    stream = loader.batches()
    times_s: list[float] = []
    with DecoderLoad(options.device) as load:
        for number in range(batches + 3):
            if len(times_s) >= 3 and sum(times_s) > timed_s:
                break
            began = time.perf_counter()
            next(stream)
            if options.device_id is not None:
                torch.cuda.synchronize(options.device_id)
            if number >= 3:
                times_s.append(time.perf_counter() - began)
    stream.close()
    quantiles = statistics.quantiles(times_s, n=20)
    return {
        "clips_per_second": round(options.clips_per_batch * len(times_s) / sum(times_s), 2),
        "batch_ms_p50": round(statistics.median(times_s) * 1e3, 2),
        "batch_ms_p95": round(quantiles[18] * 1e3, 2),
        "batches": len(times_s),
        "decoded_by": loader.decoder,
        **loader.decoding,
        **load.row(),
    }


def measure(
    dataset: Dataset,
    device: str,
    *,
    clips: int,
    batches: int,
    threads: int,
    decoders: Sequence[str],
    workers: Sequence[int] = (-1,),
    what: Sequence[str] = WHAT,
    timed_s: float = TIMED_S,
) -> Iterator[dict[str, Any]]:
    """Yield one row for each decoder that works here and each number of workers, and rows with a modality left out.

    Args:
        dataset: split to read.
        device: "cpu" or "cuda:0".
        clips: a batch.
        batches: timed at most.
        threads: of the loader.
        decoders: in order, of `every_decoder` or "auto".
        workers: processes that decode; -1 lets the loader choose.
        what: of `WHAT`; "no video" comes for the first decoder only, which has no part in it.
        timed_s: seconds of a row.
    """
    base = DataConfig(num_threads=threads, max_quarantined_share=0.0)
    half = torch.float16 if device != "cpu" else torch.float32
    options = LoaderOptions(clips_per_batch=clips, device=device, dtype=half)
    first = True
    for decoder in decoders:
        config = replace(base, decoder=decoder)  # type: ignore[arg-type]
        try:
            choose_decoder(dataset, decoder, device)
        except ValueError as error:
            print(f"{decoder}: not here: {error}", file=sys.stderr)
            continue
        variants = {"all": options, "no audio": replace(options, want_audio=False)}
        if first:
            variants["no video"] = replace(options, want_video=False)
        first = False
        sizes = {"device": device, "threads": threads, "clips": clips}
        for count in workers:
            own = replace(config, num_workers=count)
            for name in (name for name in variants if name in what):
                speed = clips_per_second(dataset, own, variants[name], batches=batches, timed_s=timed_s)
                yield {"decoder": decoder, "what": name, **sizes, "workers": count, **speed}


def every_decoder() -> tuple[str, ...]:
    """Decoders that `data.decoder` can name, "auto" left out."""
    (hint,) = (get_type_hints(DataConfig)[f.name] for f in fields(DataConfig) if f.name == "decoder")
    names = [str(name) for name in get_args(hint) if name != "auto"]
    return tuple(names) or ("cpu", "dali")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("store", nargs="?", type=Path, help="a store; default: one made here")
    parser.add_argument("--peers", action="store_true", help="compare with other loaders: benchmarks.peers.compare")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--codec", choices=["vp9", "h264"], help="of the store made here; default: what the device decodes"
    )
    parser.add_argument("--streams", type=int, default=8, help="videos of the store made here")
    parser.add_argument("--frames", type=int, default=300, help="frames of each of them")
    parser.add_argument("--keep", type=Path, help="folder of stores made here; default: a temporary one")
    parser.add_argument("--decoders", nargs="+", default=list(every_decoder()), choices=(*every_decoder(), "auto"))
    parser.add_argument("--workers", nargs="+", type=int, default=[-1], help="processes that decode; -1: by the CPUs")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="modalities")
    parser.add_argument("--seconds", type=float, default=TIMED_S, help="of a row, once three batches are timed")
    parser.add_argument("--clips", type=int, default=8, help="clips a batch")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to append rows to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    given = given_arguments(arguments)
    if "--peers" in given:
        from benchmarks.peers.compare import main as against_peers

        return against_peers([argument for argument in given if argument != "--peers"])
    parser = _parser()
    options = parser.parse_args(given)
    try:
        check_out(options.out)
        for name in ("clips", "batches", "threads", "streams", "frames"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} ({getattr(options, name)}) must be at least 1")
    except ValueError as problem:
        parser.error(str(problem))
    clip = vars(KINETICS) | {"target_fps": DataConfig.target_fps, "crop_size_px": DataConfig.crop_size_px}
    source = provenance("benchmarks.loader", options.device.partition(":")[0], given_arguments(arguments))
    with tempfile.TemporaryDirectory() as folder:
        codec = options.codec or ("vp9" if options.device == "cpu" else "h264")
        root = options.keep or Path(folder)
        path = options.store or kinetics_like(root, codec, streams=options.streams, frames=options.frames)
        dataset = Store.open(path).split(options.split)
        common = {"benchmark": "loader", "store": path.name, "codec": codec, "clip": clip}
        sizes = {"clips": options.clips, "batches": options.batches, "threads": options.threads}
        chosen = {"decoders": options.decoders, "workers": options.workers, "what": options.what}
        rows = measure(dataset, options.device, **sizes, **chosen, timed_s=options.seconds)
        tell_rows(rows, options.out, common, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
