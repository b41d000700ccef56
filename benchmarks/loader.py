"""What the loader gives without a model: `python -m benchmarks.loader [STORE] [--device cuda] [--out FILE]`.

Clips per second of the whole pipeline (read, cut, decode, resize, normalise, log-mel), the same without video and
without audio, and of each decoder that the store and the device allow, all in one run. Without a store it makes one of
352x256 noise-like video with sound, 10 s a clip, as Kinetics is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.loader import LoaderOptions, TrainLoader, choose_decoder
from pipeline.store.reader import Store
from pipeline.synthetic import SyntheticSpec, ensure_store

KINETICS = ClipSpec(num_frames=32, frame_stride=2)


def kinetics_like(folder: Path, codec: str, gop: int = 12) -> Path:
    """Make (or find) a store of 256 px, 10 s videos; returns its folder."""
    spec = SyntheticSpec(
        train_streams=8, val_streams=2, num_frames=300, size_px=256, codec=codec, gop=gop, num_classes=2
    )
    return ensure_store(folder, spec)


def clips_per_second(
    dataset: Dataset, config: DataConfig, options: LoaderOptions, *, batches: int, spec: ClipSpec = KINETICS
) -> dict[str, Any]:
    """Time batches after a warm-up of three.

    Args:
        dataset: Split to read.
        config: Decoder and threads.
        options: Batch size and device.
        batches: Timed batches.
        spec: Shape of the clips.

    Returns:
        clips_per_second, and percentiles of a batch's time in ms.
    """
    stream = TrainLoader(dataset, spec, config, options, seed=0).batches()
    times_s = []
    for number in range(batches + 3):
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
    }


def measure(dataset: Dataset, device: str, *, clips: int, batches: int, threads: int) -> list[dict[str, Any]]:
    """Return one row for each decoder that works here, and rows with a modality left out."""
    base = DataConfig(num_threads=threads, max_quarantined_share=0.0)
    half = torch.float16 if device != "cpu" else torch.float32
    options = LoaderOptions(clips_per_batch=clips, device=device, dtype=half)
    rows: list[dict[str, Any]] = []
    for decoder in ("dali", "pyav"):
        config = replace(base, decoder=decoder)
        try:
            choose_decoder(dataset, decoder, device)
        except ValueError as error:
            print(f"{decoder}: not here: {error}", file=sys.stderr)
            continue
        variants = {"all": options, "no audio": replace(options, want_audio=False)}
        if not rows:
            variants["no video"] = replace(options, want_video=False)
        for name, chosen in variants.items():
            speed = clips_per_second(dataset, config, chosen, batches=batches)
            rows.append({"decoder": decoder, "what": name, "device": device, "threads": threads, **speed})
    return rows


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("store", nargs="?", type=Path, help="a store; default: one made here")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--codec", choices=["vp9", "h264"], help="of the store made here; default: what the device decodes"
    )
    parser.add_argument("--clips", type=int, default=8, help="clips a batch")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; default standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        codec = options.codec or ("vp9" if options.device == "cpu" else "h264")
        path = options.store or kinetics_like(Path(folder), codec)
        dataset = Store.open(path).split(options.split)
        rows = measure(dataset, options.device, clips=options.clips, batches=options.batches, threads=options.threads)
    clip = vars(KINETICS) | {"target_fps": DataConfig.target_fps, "crop_size_px": DataConfig.crop_size_px}
    text = json.dumps({"clip": clip, "rows": rows}, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
