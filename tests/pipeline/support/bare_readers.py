"""Clips read by threads or worker processes, without a graph: nothing here imports torch, so that it starts fast.

Run as `python -m tests.pipeline.support.bare_readers STORE RESULT` it closes its standard streams first.
"""

import hashlib
import os
import sys
from pathlib import Path

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.plan import TrainPlan
from pipeline.source import HostClip, ThreadSource, Wanted
from pipeline.store.reader import Store, StoreSplit
from pipeline.workers.pool import PoolOptions, WorkerSource
from pipeline.workers.slots import SlotSpec, picture_bytes

SPEC = ClipSpec(num_frames=4, frame_stride=2)
CLIPS = 4


def digest(split: StoreSplit, num_workers: int) -> str:
    """Digest of planes and sound of the first clips of a split.

    Args:
        split: Of a store.
        num_workers: Processes that read; 0: threads.
    """
    plan = TrainPlan(split, SPEC, DataConfig(decoder="cpu"), seed=3)
    wanted = Wanted(SPEC.num_audio_samples, "cpu")
    if num_workers:
        slots = SlotSpec(picture_bytes(split, SPEC.num_frames, wanted), SPEC.num_audio_samples, with_negative=False)
        source = WorkerSource(split, plan, wanted, slots, PoolOptions(num_workers, 1, CLIPS, 600.0))
    else:
        source = ThreadSource(split, plan, wanted, num_threads=1, num_batches=1)
    found = hashlib.sha256()
    try:
        source.post(range(CLIPS))
        batch = source.take()
        assert batch is not None
        for clip in batch.clips:
            assert isinstance(clip, HostClip), clip
            for part in (clip.luma, clip.chroma, clip.audio):
                assert part is not None
                found.update(part.tobytes())
    finally:
        source.close()
    return found.hexdigest()


def main() -> None:
    """Write the digest of what a worker reads for a process without standard streams, or what went wrong."""
    split = Store.open(sys.argv[1]).split("train")
    assert "torch" not in sys.modules
    for number in range(3):
        os.close(number)
    try:
        text = digest(split, 1)
    except BaseException as error:
        text = repr(error)
    Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()
