"""Two loaders over one runner: planned clips go through source and graph and leave as Batch.

loader = TrainLoader(open_dataset("store", "train"), ClipSpec.for_model(model_config))
for batch in loader: ...  # without end; loader.batches(step) goes on from a step

for batch in EvalLoader(open_dataset("store", "val"), ClipSpec.for_model(model_config)): ...  # every view once
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.clip import ClipPlan, ClipSpec
from pipeline.collate import BatchSpec, collate
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import Dataset, Decoder
from pipeline.graph import GraphSpec, build_graph, host_inputs, output_names, stream_argument
from pipeline.plan import EvalPlan, NegativeSchedule, TrainPlan
from pipeline.source import ClipSource, HostClip, Unreadable

SUBSTITUTE_TRIES = 100
MIN_NVDEC_PX = 128  # in both dimensions; NVDEC refuses smaller pictures
Batches = Generator[Batch, None, None]

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
    """

    yielded: int = 0
    substituted: int = 0
    quarantined: int = 0


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made and where they go.

    Args:
        clips_per_batch: Clips of this rank in a batch, at least 1.
        device: "cpu" or "cuda:N".
        dtype: torch.float16 or torch.float32 frames.
        rank: This process among `world_size`.
        world_size: Number of processes.
        want_video: Whether the model takes frames.
        want_audio: Whether the model takes sound.
        num_classes: Length of multi-hot labels; 0 takes the data set's.
        pad_channels: Frames of four channels in memory, of which the batch shows three; None: on CUDA only.
    """

    clips_per_batch: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    want_video: bool = True
    want_audio: bool = True
    num_classes: int = 0
    pad_channels: bool | None = None

    def __post_init__(self) -> None:
        rules = {
            "clips_per_batch": (self.clips_per_batch >= 1, "at least 1"),
            "rank": (0 <= self.rank < self.world_size, f"at least 0 and less than world_size ({self.world_size})"),
            "dtype": (self.dtype in (torch.float16, torch.float32), "torch.float16 or torch.float32"),
            "want_video": (self.want_video or self.want_audio, "True where want_audio is False"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} ({getattr(self, name)}) of LoaderOptions must be {rule}")

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


class _Runner(ABC):
    """Reads, decodes and collates planned clips; the two loaders say which clips, and what an unreadable one becomes.

    Attributes:
        dataset: The split.
        spec: Shape of every clip.
        config: Decoder, threads, prefetch, labels.
        options: Batch size, device, rank.
        decoder: Who decodes.
        stats: Counts since the loader was made.
    """

    def __init__(
        self, dataset: Dataset, spec: ClipSpec, config: DataConfig | None, options: LoaderOptions | None
    ) -> None:
        if not hasattr(dataset, "samples"):
            raise TypeError(
                f"dataset ({type(dataset).__name__}) must be one split of a data set; "
                "use open_dataset(path, split), or .split(name) of what was opened"
            )
        self.dataset, self.spec = dataset, spec
        self.config, self.options = config or DataConfig(), options or LoaderOptions()
        for value, kind in ((spec, ClipSpec), (self.config, DataConfig), (self.options, LoaderOptions)):
            if not isinstance(value, kind):
                order = "a loader takes dataset, spec, config, options; ClipSpec.for_model(model_config) gives the spec"
                raise TypeError(f"{type(value).__name__} must be a {kind.__name__}: {order}")
        self.decoder = choose_decoder(dataset, self.config.decoder, self.options.device)
        self.stats = LoaderStats()
        self._unreadable: dict[str, str] = {}

    @property
    def quarantine(self) -> list[tuple[str, str]]:
        """Distinct samples that could not be read, with the first reason."""
        return list(self._unreadable.items())

    @property
    def fingerprint(self) -> str:
        """Digest of the data this loader reads."""
        return self.dataset.fingerprint

    def __iter__(self) -> Batches:
        """Yield batches from the beginning."""
        return self.batches()

    @abstractmethod
    def batches(self) -> Batches:
        """Yield the batches of this rank."""

    @abstractmethod
    def _fill(self, item: Unreadable, source: ClipSource) -> HostClip | None:
        """Return the clip that takes the slot of an unreadable one, None where it stays empty."""

    def _run(self, plans: Iterator[list[ClipPlan]], num_crops: int, want_negative: bool = False) -> Batches:
        """Keep DALI `prefetch` batches ahead of the caller and the threads as many ahead of DALI."""
        spec, batch_spec = self._graph_spec(num_crops, want_negative), self._batch_spec()
        source = ClipSource(
            self.dataset,
            num_audio_samples=spec.clip.num_audio_samples,
            decoder=self.decoder,
            want_video=spec.want_video,
            want_audio=spec.want_audio,
            num_threads=self.config.num_threads,
        )
        scheduled: deque[list[HostClip]] = deque()
        reading = source.read_ahead(plans, self.config.prefetch_batches)

        def next_inputs() -> tuple[list[Any], ...]:
            """Return the inputs of the next batch that has a readable clip; its clips are put in `scheduled`."""
            clips: list[HostClip] = []
            while not clips:  # a batch of an evaluation may be quarantined as a whole
                clips = self._readable(next(reading), source)
            scheduled.append(clips)
            return host_inputs(spec, clips)

        try:
            pipe = build_graph(spec, next_inputs)
            while True:
                try:
                    outputs = pipe.run(*stream_argument(spec))
                except StopIteration:
                    return
                clips = scheduled.popleft()
                batch = collate(clips, dict(zip(output_names(spec), outputs, strict=True)), batch_spec)
                substitutes = sum(clip.plan.substitute_for >= 0 for clip in clips)
                self.stats.substituted += substitutes  # counted when handed out, not when read ahead
                self.stats.yielded += len(clips) - substitutes
                yield batch
        finally:
            source.close()

    def _graph_spec(self, num_crops: int, want_negative: bool) -> GraphSpec:
        options = self.options
        return GraphSpec(
            clip=self.spec,
            max_clips=options.clips_per_batch,
            num_crops=num_crops,
            device_id=options.device_id,
            decoder=self.decoder,
            half=options.dtype == torch.float16,
            pad_channels=options.memory_channels == 4,
            want_video=options.want_video,
            want_audio=options.want_audio,
            want_negative=want_negative and options.want_audio,
            num_threads=self.config.num_threads,
            prefetch=self.config.prefetch_batches,
        )

    def _batch_spec(self) -> BatchSpec:
        return BatchSpec(
            device=torch.device(self.options.device),
            label_kind=self.config.label_kind,
            num_classes=self.options.num_classes or len(self.dataset.classes.get(self.config.label_set, ())),
            rotation=self.config.rotation,
        )

    def _readable(self, read: list[HostClip | Unreadable], source: ClipSource) -> list[HostClip]:
        """Quarantine what cannot be read, and fill its slot if the loader has something to fill it with."""
        clips: list[HostClip] = []
        for item in read:
            if isinstance(item, Unreadable):
                self._quarantine(item)
                filled = self._fill(item, source)
                clips += [filled] if filled is not None else []
            else:
                clips.append(item)
        return clips

    def _quarantine(self, item: Unreadable) -> None:
        self.stats.quarantined += 1
        if item.plan.id in self._unreadable:
            return
        self._unreadable[item.plan.id] = item.reason
        unreadable, total = len(self._unreadable), len(self.dataset.samples)
        share = self.config.max_quarantined_share
        if unreadable > (max(1, share * total) if share > 0 else 0):  # one bad clip of a small set is no trend
            raise QuarantineError(
                f"{unreadable} of {total} samples cannot be read, more than data.max_quarantined_share "
                f"({share}); the last: {item.reason}; or raise the share"
            )


class TrainLoader(_Runner):
    """Yields training batches of a split without end, a pure function of (seed, step).

    Args:
        dataset: Split to draw from.
        spec: Shape of every clip.
        config: How clips are drawn, decoded and labelled; the defaults are the paper's.
        options: Batch size, device, rank.
        seed: Seed of the run.
        negatives: Schedule of out-of-sync audio; none by default.

    Raises:
        ValueError: an empty split, or an unusable combination of store, decoder and device.
        TypeError: `dataset` is not one split, or another argument is of another kind.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: ClipSpec,
        config: DataConfig | None = None,
        options: LoaderOptions | None = None,
        *,
        seed: int = 0,
        negatives: NegativeSchedule | None = None,
    ) -> None:
        super().__init__(dataset, spec, config, options)
        self.plan = TrainPlan(dataset, spec, self.config, seed, negatives)

    def __len__(self) -> int:
        raise TypeError(
            "a TrainLoader has no length: it goes on without end; use plan.samples_per_epoch, or an EvalLoader"
        )

    def batches(self, start_step: int = 0) -> Batches:
        """Yield the batches of this rank without end, from `start_step` on.

        Step s covers positions s*G .. (s+1)*G - 1 with G = clips_per_batch * world_size; each rank takes a contiguous
        slice, so that two ranks of 8 clips and one of 16 see the same clips in the same order.
        """
        return self._run(self._steps(start_step), num_crops=1, want_negative=self.plan.negatives.enabled)

    def _steps(self, step: int) -> Iterator[list[ClipPlan]]:
        """Yield this rank's clips of each step, without end."""
        size, rank, world = self.options.clips_per_batch, self.options.rank, self.options.world_size
        while True:
            first = (step * world + rank) * size
            yield [self.plan.clip(position) for position in range(first, first + size)]
            step += 1

    def _fill(self, item: Unreadable, source: ClipSource) -> HostClip:
        """Return the first substitute of the plan that can be read."""
        for attempt in range(SUBSTITUTE_TRIES):
            clip = source.read(self.plan.substitute(item.plan.position, attempt))
            if isinstance(clip, HostClip):
                return clip
        raise QuarantineError(
            f"position {item.plan.position}: {SUBSTITUTE_TRIES} substitutes in a row cannot be read; "
            f"the planned clip: {item.reason}"
        )


class EvalLoader(_Runner):
    """Yields every view of a split exactly once over all ranks.

    Args:
        dataset: Split to evaluate.
        spec: Shape of every clip.
        config: Frame rate, decoder and labels; crop, jitter, flip and negatives are training's and not looked at.
        options: Batch size in temporal clips, device, rank.
        views: Clips, crops and their size; the default is the paper's 10 x 3.

    Raises:
        ValueError: an unusable combination of store, decoder and device.
        TypeError: `dataset` is not one split, or another argument is of another kind.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: ClipSpec,
        config: DataConfig | None = None,
        options: LoaderOptions | None = None,
        *,
        views: ViewConfig | None = None,
    ) -> None:
        super().__init__(dataset, spec, config, options)
        self.plan = EvalPlan(dataset, spec, self.config, views or ViewConfig())

    def batches(self) -> Batches:
        """Yield this rank's share of an evaluation; over all ranks every position comes exactly once.

        Nothing is padded, so ranks may get different numbers of batches and the last ones may be smaller; a batch holds
        pictures of one size only.
        """
        total, rank, world = self.plan.num_positions, self.options.rank, self.options.world_size
        positions = range(total * rank // world, total * (rank + 1) // world)
        return self._run(self._equal_sizes(positions), num_crops=max(1, self.plan.views.num_crops))

    def _equal_sizes(self, positions: Iterable[int]) -> Iterator[list[ClipPlan]]:
        batch: list[ClipPlan] = []
        for plan in map(self.plan.clip, positions):
            if batch and (len(batch) == self.options.clips_per_batch or plan.size_px != batch[0].size_px):
                yield batch
                batch = []
            batch.append(plan)
        if batch:
            yield batch

    def _fill(self, item: Unreadable, source: ClipSource) -> None:
        """Leave the slot empty: an evaluation scores what was planned and nothing else."""


def choose_decoder(dataset: Dataset, wanted: str, device: str) -> Decoder:
    """Return who decodes a data set on a device.

    Where a GPU would decode but some pictures are smaller than NVDEC takes, "auto" means the CPU, and the log says why.

    Raises:
        ValueError: DALI was asked for where it cannot decode.
    """
    on_gpu = torch.device(device).type == "cuda"
    possible = "dali" in dataset.decoders and (on_gpu or dataset.video_codec == "vp9")
    if wanted == "dali" and not possible:
        raise ValueError(
            f"data.decoder (dali) cannot decode {dataset.video_codec or 'plain files'} on {device}: "
            "DALI's CPU decoder takes VP9 cuts of a store only; use data.decoder=cpu or prepare a VP9 store"
        )
    if not possible or wanted == "cpu":
        return "cpu"
    refused = too_small_for_nvdec(dataset) if on_gpu else ""
    if refused and wanted == "dali":
        raise ValueError(f"data.decoder (dali) cannot decode on {device}: {refused}; use data.decoder=cpu")
    if refused:
        _warn_once(f"videos of split {dataset.split!r} are decoded by the CPU, not by the GPU: {refused}")
    return "cpu" if refused else "dali"


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
