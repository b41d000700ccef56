"""Runs the plan through source and graph and yields Batch; quarantines what cannot be read."""

import functools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.clip import ClipPlan
from pipeline.collate import assemble
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.graph import GraphSpec, build_graph, graph_inputs, output_names
from pipeline.plan import TrainPlan
from pipeline.source import ClipSource, HostClip, Unreadable
from pipeline.views import EvalPlan

SUBSTITUTE_TRIES = 100
MIN_NVDEC_PX = 128  # in both dimensions; NVDEC refuses smaller pictures

log = logging.getLogger(__name__)


class QuarantineError(ValueError):
    """More of a split is unreadable than the configuration allows."""


@dataclass
class LoaderStats:
    """What a loader did since it was made.

    Args:
        yielded: Clips handed out that are what the plan said (temporal clips; crops are not counted apart).
        substituted: Slots of unreadable clips that another clip filled (training).
        quarantined: Clips left out (evaluation) or replaced (training).
        wait_s: Seconds the caller waited for batches.
    """

    yielded: int = 0
    substituted: int = 0
    quarantined: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made and where they go.

    Args:
        clips_per_batch: Clips of this rank in a batch.
        device: "cpu" or "cuda:N".
        dtype: torch.float16 or torch.float32 frames.
        rank: This process among `world_size`.
        world_size: Number of processes.
        want_video: Whether the model takes frames.
        want_audio: Whether the model takes sound.
        num_classes: Length of multi-hot labels; 0 takes the data set's.
        pad_channels: Frames of four channels in memory, of which the batch shows three; None: on CUDA only.
    """

    clips_per_batch: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    want_video: bool = True
    want_audio: bool = True
    num_classes: int = 0
    pad_channels: bool | None = None

    @property
    def memory_channels(self) -> int:
        """Channels of the frames in memory, 3 or 4."""
        padded = self.device_id is not None if self.pad_channels is None else self.pad_channels
        return 4 if padded else 3

    @property
    def device_id(self) -> int | None:
        """CUDA device number, None on the CPU."""
        device = torch.device(self.device)
        return None if device.type == "cpu" else (device.index or 0)


@dataclass
class Loader:
    """Yields batches of a plan.

    Args:
        plan: What to read: `TrainPlan` for `train`, `EvalPlan` for `evaluate`.
        config: Decoder, threads, prefetch, labels.
        options: Batch size, device, rank.

    Raises:
        ValueError: an unusable combination of store, decoder and device.
    """

    plan: TrainPlan | EvalPlan
    config: DataConfig
    options: LoaderOptions
    stats: LoaderStats = field(default_factory=LoaderStats)
    quarantine: list[tuple[str, str]] = field(default_factory=list)  # distinct samples with their first reason
    _quarantined: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.decode = choose_decoder(self.plan.dataset, self.config.decoder, self.options.device)

    @property
    def fingerprint(self) -> str:
        """Digest of the data this loader reads."""
        return self.plan.dataset.fingerprint

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of this rank for ever, from `start_step` on.

        Step s covers positions s*G .. (s+1)*G - 1 with G = clips_per_batch * world_size; each rank takes a contiguous
        slice, so that two ranks of 8 clips and one of 16 see the same clips in the same order.
        """
        size, rank, world = self.options.clips_per_batch, self.options.rank, self.options.world_size

        def steps() -> Iterator[list[ClipPlan]]:
            """Yield this rank's clips of each step, without end."""
            step = start_step
            while True:
                first = (step * world + rank) * size
                yield [self.plan.clip(position) for position in range(first, first + size)]
                step += 1

        yield from self._run(steps())

    def evaluate(self) -> Iterator[Batch]:
        """Yield this rank's share of an evaluation; over all ranks every position comes exactly once.

        Nothing is padded, so ranks may get different numbers of batches and the last ones may be smaller; a batch holds
        pictures of one size only.
        """
        assert isinstance(self.plan, EvalPlan)
        total, rank, world = self.plan.num_positions, self.options.rank, self.options.world_size
        positions = range(total * rank // world, total * (rank + 1) // world)
        yield from self._run(self._equal_sizes(positions))

    def _equal_sizes(self, positions: Iterable[int]) -> Iterator[list[ClipPlan]]:
        batch: list[ClipPlan] = []
        for plan in map(self.plan.clip, positions):
            if batch and (len(batch) == self.options.clips_per_batch or plan.size_px != batch[0].size_px):
                yield batch
                batch = []
            batch.append(plan)
        if batch:
            yield batch

    def _run(self, batches: Iterator[list[ClipPlan]]) -> Iterator[Batch]:
        """Keep DALI `prefetch` batches ahead of the caller and the threads as many ahead of DALI."""
        spec = self._graph_spec()
        source = ClipSource(
            self.plan.dataset,
            num_audio_samples=spec.clip.num_audio_samples,
            decode=self.decode == "pyav",
            want_video=spec.want_video,
            want_audio=spec.want_audio or spec.want_negative,
            num_threads=self.config.num_threads,
        )
        scheduled: deque[list[HostClip]] = deque()
        reading = source.read_ahead(batches, self.config.prefetch_batches)

        def next_inputs() -> tuple[list[Any], ...]:
            """Return the inputs of the next batch that has a readable clip; its clips are put in `scheduled`."""
            clips: list[HostClip] = []
            while not clips:  # a batch of an evaluation may be quarantined as a whole
                clips = self._readable(next(reading), source)
            scheduled.append(clips)
            return tuple(host_inputs(spec, clips).values())

        try:
            pipe = build_graph(spec, next_inputs)
            while True:
                began = time.perf_counter()
                try:
                    outputs = pipe.run(*stream_argument(spec))
                except StopIteration:
                    return
                tensors = dict(zip(output_names(spec), outputs, strict=True))
                clips = scheduled.popleft()
                batch = assemble(clips, tensors, self.plan, self.config, self.options)
                substitutes = sum(clip.plan.substitute_for >= 0 for clip in clips)
                self.stats.substituted += substitutes  # counted when handed out, not when read ahead
                self.stats.yielded += len(clips) - substitutes
                self.stats.wait_s += time.perf_counter() - began
                yield batch
        finally:
            source.close()

    def _graph_spec(self) -> GraphSpec:
        options, training = self.options, isinstance(self.plan, TrainPlan)
        negatives = isinstance(self.plan, TrainPlan) and self.plan.negatives.enabled
        return GraphSpec(
            clip=self.plan.spec,
            max_clips=options.clips_per_batch,
            num_crops=1 if training else max(1, self.plan.views.num_crops),  # type: ignore[union-attr]
            device_id=options.device_id,
            decode="yuv" if self.decode == "pyav" else "dali",
            half=options.dtype == torch.float16,
            pad_channels=options.memory_channels == 4,
            want_video=options.want_video,
            want_audio=options.want_audio,
            want_negative=negatives and options.want_audio,
            num_threads=self.config.num_threads,
            prefetch=self.config.prefetch_batches,
        )

    def _readable(self, read: list[HostClip | Unreadable], source: ClipSource) -> list[HostClip]:
        """Quarantine what cannot be read; in training fill its slot with the plan's substitute."""
        clips: list[HostClip] = []
        for item in read:
            if isinstance(item, HostClip):
                clips.append(item)
                continue
            self._quarantine(item)
            if isinstance(self.plan, TrainPlan):
                clips.append(self._substitute(item, source))
        return clips

    def _substitute(self, item: Unreadable, source: ClipSource) -> HostClip:
        assert isinstance(self.plan, TrainPlan)
        for attempt in range(SUBSTITUTE_TRIES):
            clip = source.read(self.plan.substitute(item.plan.position, attempt))
            if isinstance(clip, HostClip):
                return clip
        raise QuarantineError(
            f"position {item.plan.position}: {SUBSTITUTE_TRIES} substitutes in a row cannot be read; "
            f"the planned clip: {item.reason}"
        )

    def _quarantine(self, item: Unreadable) -> None:
        self.stats.quarantined += 1
        name = self.plan.dataset.samples.id(item.plan.sample)
        if name in self._quarantined:
            return
        self._quarantined.add(name)
        self.quarantine.append((name, item.reason))
        unreadable, total = len(self._quarantined), len(self.plan.dataset.samples)
        share = self.config.max_quarantined_share
        if unreadable > (max(1, share * total) if share > 0 else 0):  # one bad clip of a small set is no trend
            raise QuarantineError(
                f"{unreadable} of {total} samples cannot be read, more than data.max_quarantined_share "
                f"({share}); the last: {item.reason}; or raise the share"
            )


def choose_decoder(dataset: Dataset, wanted: str, device: str) -> str:
    """Return "dali" or "pyav" for a data set on a device.

    Where a GPU would decode but some pictures are smaller than NVDEC takes, "auto" means PyAV, and the log says why.

    Raises:
        ValueError: DALI was asked for where it cannot decode.
    """
    on_gpu = torch.device(device).type == "cuda"
    possible = dataset.payload == "bytes" and (on_gpu or dataset.video_codec == "vp9")
    if wanted == "dali" and not possible:
        raise ValueError(
            f"data.decoder (dali) cannot decode {dataset.video_codec} from {dataset.payload} on {device}: "
            "DALI's CPU decoder takes VP9 cuts of a store only; use data.decoder=pyav or prepare a VP9 store"
        )
    if not possible or wanted == "pyav":
        return "pyav"
    refused = too_small_for_nvdec(dataset) if on_gpu else ""
    if refused and wanted == "dali":
        raise ValueError(f"data.decoder (dali) cannot decode on {device}: {refused}; use data.decoder=pyav")
    if refused:
        _warn_once(f"videos of split {dataset.split!r} are decoded by the CPU (PyAV), not by the GPU: {refused}")
    return "pyav" if refused else "dali"


def too_small_for_nvdec(dataset: Dataset) -> str:
    """Return which videos of a split NVDEC refuses, in words; empty if there are none."""
    table = dataset.media
    media = np.unique(np.asarray(dataset.samples.media))
    small = media[np.minimum(np.asarray(table.width)[media], np.asarray(table.height)[media]) < MIN_NVDEC_PX]
    if not len(small):
        return ""
    first = int(small[0])
    return (
        f"{len(small)} of {len(media)} videos are smaller than {MIN_NVDEC_PX}x{MIN_NVDEC_PX} px, the least that NVDEC "
        f"takes, the first is {table.id(first)} ({table.width[first]}x{table.height[first]})"
    )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def stream_argument(spec: GraphSpec) -> tuple[int, ...]:
    """Return the stream that reads the outputs: buffers are handed over and freed in its order."""
    return () if spec.device_id is None else (torch.cuda.current_stream(spec.device_id).cuda_stream,)


def host_inputs(spec: GraphSpec, clips: list[HostClip]) -> dict[str, list[Any]]:
    """Return the arrays of one batch for each of `graph_inputs`, in its order."""

    def array(name: str, clip: HostClip) -> Any:
        """Return one input of one clip."""
        plan = clip.plan
        if name.startswith("window"):
            window = plan.crops[int(name.removeprefix("window"))]
            corners = [[window.top, window.left], [window.top + window.height, window.left + window.width]]
            return np.array(corners, np.float32)
        values = {
            "size": lambda: np.array(plan.size_px, np.float32),
            "mirror": lambda: np.array(plan.flip, np.int32),
            "encoded": lambda: clip.data,
            "frame_numbers": lambda: clip.frames,
            "luma": lambda: clip.luma,
            "chroma": lambda: clip.chroma,
            "audio": lambda: clip.audio,
            "has_audio": lambda: np.array(clip.has_audio, np.float32),
            "negative": lambda: clip.audio if clip.negative is None else clip.negative,
            "has_negative": lambda: np.array(clip.negative is not None, np.float32),
        }
        return values[name]()

    return {name: [array(name, clip) for clip in clips] for name in graph_inputs(spec)}
