"""Two loaders over one runner: planned clips go through source and graph and leave as Batch.

loader = TrainLoader(open_dataset("store", "train"), ClipSpec.for_model(model_config))
for batch in loader: ...  # without end; loader.batches(step) goes on from a step

for batch in EvalLoader(open_dataset("store", "val"), ClipSpec.for_model(model_config)): ...  # every view once
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch

from pipeline.batch import Batch
from pipeline.clip import ClipSpec
from pipeline.collate import BatchSpec, collate
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import Dataset
from pipeline.feed import Feed, check_process, open_source, planes_stream, threads_told
from pipeline.frames.device import DeviceFrameMaker
from pipeline.frames.maker import FrameMaker, Maker, choose_frames
from pipeline.graph import GraphSpec, graph_outputs
from pipeline.nvdec.choice import Chosen, choose_decoder
from pipeline.nvdec.source import SplitSource
from pipeline.options import LoaderOptions, LoaderStats, check_device
from pipeline.plan import EvalPlan, NegativeSchedule, Pretext, TrainPlan
from pipeline.source import MIB, ClipSource, HostClip, Planner, TakenBatch, Unreadable, Wanted

__all__ = ["Batches", "EvalLoader", "LoaderOptions", "LoaderStats", "QuarantineError", "TrainLoader"]

SUBSTITUTE_TRIES = 100
DALI_BATCHES = 2  # one in the graph while another is used; the others that are kept ahead are with the readers
Batches = Generator[Batch, None, None]


class QuarantineError(ValueError):
    """More of a split is unreadable than the configuration allows."""


class _Runner(ABC):
    """Reads, decodes and collates planned clips; the two loaders say which clips, and what an unreadable one becomes.

    Attributes:
        dataset: The split.
        spec: Shape of every clip.
        config: Decoder, threads, prefetch, labels.
        options: Batch size, device, rank.
        frames: Who makes frames of what is decoded: "fused" (one operation) or "graph" (DALI's operators).
        decoder: Who decodes: "cpu", "nvdec", "dali", or "both" of the first two.
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
        check_device(self.options)
        known = dataset.samples.label_sets
        if known and self.config.label_set not in known:
            raise ValueError(
                f"data.label_set ({self.config.label_set}) must be one of {', '.join(known)}; choose one, as with "
                f"DataConfig(label_set={next(iter(known))!r})"
            )
        self.frames = choose_frames(self.config.frames, self.config.decoder, self.options.device)
        if self.frames == "fused" and self.options.device_id is None:  # DALI, which auto may mean, gives no planes
            self.decoder: Chosen = "cpu"
        else:
            self.decoder = choose_decoder(dataset, self.config.decoder, self.options.device)
        self.stats = LoaderStats()
        self._unreadable: dict[str, str] = {}
        self._source: ClipSource | None = None  # of the batches begun last

    @property
    def quarantine(self) -> list[tuple[str, str]]:
        """Distinct samples that could not be read, with the first reason."""
        return list(self._unreadable.items())

    @property
    def fingerprint(self) -> str:
        """Digest of the data this loader reads."""
        return self.dataset.fingerprint

    @property
    def decoding(self) -> dict[str, float]:
        """Clips by who decoded them, and clips per second of each side as measured; empty where one side does all."""
        source = self._source
        if not isinstance(source, SplitSource) or not source.splits:
            return {}
        found = {f"{side}_clips": float(count) for side, count in vars(source.counts).items()}
        if source.rates is not None:
            found |= {f"{side[:-6]}_clips_per_second": round(rate, 1) for side, rate in vars(source.rates).items()}
        return found

    @property
    def batches_ready(self) -> int:
        """Batches that the readers of the batches begun last have ready for the graph; 0: it waits for them."""
        return 0 if self._source is None else self._source.ready()

    def __iter__(self) -> Batches:
        """Yield batches from the beginning."""
        return self.batches()

    @abstractmethod
    def batches(self) -> Batches:
        """Yield the batches of this rank."""

    @abstractmethod
    def _fill(self, item: Unreadable, batch: TakenBatch, place: int, source: ClipSource) -> HostClip | None:
        """Return the clip that takes the slot of an unreadable one, None where it stays empty."""

    def _run(
        self, batches: Iterator[Sequence[int]], planner: Planner, num_crops: int, want_negative: bool = False
    ) -> Batches:
        """Keep two batches with DALI and `prefetch` with the readers ahead of the caller.

        Args:
            batches: Positions of each batch.
            planner: What the clips there are.
            num_crops: Of each clip.
            want_negative: Whether clips have out-of-sync sound.
        """
        spec, batch_spec = self._graph_spec(num_crops, want_negative), self._batch_spec()
        with threads_told():
            source = open_source(self.dataset, planner, self._wanted(), spec, self.config, self.decoder)
        stream = planes_stream(source)
        spec = replace(spec, planes_stream=None if stream is None else stream.cuda_stream)
        maker = self._frame_maker(stream)
        self._source = source
        feed = Feed(source, batches, spec, lambda batch: self._readable(batch, source), maker)
        outputs, process = graph_outputs(spec, feed), os.getpid()
        try:
            while True:
                with threads_told():
                    made = next(outputs, None)
                if made is None:
                    return
                clips, frames = feed.leave()
                self.stats.device_wait_s += feed.take_device_wait()
                batch = collate(clips, made | frames, batch_spec)
                substitutes = sum(clip.plan.substitute_for >= 0 for clip in clips)
                self._count_handed_out(len(clips), substitutes)
                yield batch
                check_process(process)
        finally:
            if os.getpid() == process:  # in a fork they are the parent's
                try:
                    outputs.close()  # the graph reads the source's memory
                finally:
                    feed.close()

    def _count_handed_out(self, clips: int, substitutes: int) -> None:
        """Count the clips of a batch when it is handed out, not when it is read ahead."""
        self.stats.substituted += substitutes
        self.stats.quarantined += substitutes
        self.stats.yielded += clips - substitutes

    def _wanted(self) -> Wanted:
        return Wanted(
            num_audio_samples=self.spec.num_audio_samples,
            decoder="dali" if self.decoder == "dali" else "cpu",
            video=self.options.want_video,
            audio=self.options.want_audio,
            max_clip_bytes=self.config.clip_memory_mib * MIB,
        )

    def _frame_maker(self, stream: torch.cuda.Stream | None = None) -> Maker | None:
        """Who makes frames beside the graph, of planes in that stream's order; None where the graph does, or nobody."""
        options = self.options
        if self.frames == "graph" or not options.want_video:
            return None
        half = options.dtype == torch.float16
        if options.device_id is not None:
            device = torch.device("cuda", options.device_id)
            return DeviceFrameMaker(half=half, channels=options.memory_channels, device=device, stream=stream)
        return FrameMaker(half=half, channels=options.memory_channels, num_threads=self.config.num_threads)

    def _graph_spec(self, num_crops: int, want_negative: bool) -> GraphSpec:
        options = self.options
        return GraphSpec(
            clip=self.spec,
            max_clips=options.clips_per_batch,
            num_crops=num_crops,
            device_id=options.device_id,
            decoder="dali" if self.decoder == "dali" else "cpu",
            half=options.dtype == torch.float16,
            pad_channels=options.memory_channels == 4,
            want_video=options.want_video and self.frames == "graph",
            want_audio=options.want_audio,
            want_negative=want_negative and options.want_audio,
            num_threads=self.config.num_threads,
            prefetch=min(DALI_BATCHES, self.config.prefetch_batches),
        )

    def _batch_spec(self) -> BatchSpec:
        return BatchSpec(
            device=torch.device(self.options.device),
            label_kind=self.config.label_kind,
            num_classes=self.options.num_classes or len(self.dataset.classes.get(self.config.label_set, ())),
            rotation=self.config.rotation,
        )

    def _readable(self, batch: TakenBatch, source: ClipSource) -> list[HostClip]:
        """Quarantine what cannot be read, and fill its slot if the loader has something to fill it with."""
        clips: list[HostClip] = []
        for place, item in enumerate(batch.clips):
            if isinstance(item, Unreadable):
                self._quarantine(item)
                filled = self._fill(item, batch, place, source)
                clips += [filled] if filled is not None else []
                self.stats.quarantined += filled is None  # of a batch that may be handed out to nobody
            else:
                clips.append(item)
        return clips

    def _quarantine(self, item: Unreadable) -> None:
        if item.plan.id in self._unreadable:
            return
        self._unreadable[item.plan.id] = item.reason
        self.require_few(len(self._unreadable), item.reason)

    def require_few(self, unreadable: int, reason: str) -> None:
        """Raise QuarantineError where more of the split cannot be read than `data.max_quarantined_share` allows.

        Args:
            unreadable: Distinct samples, of this rank or of all.
            reason: Of one of them.
        """
        total, share = len(self.dataset.samples), self.config.max_quarantined_share
        if unreadable > (max(1, share * total) if share > 0 else 0):  # one bad clip of a small set is no trend
            raise QuarantineError(
                f"{unreadable} of {total} samples cannot be read, more than data.max_quarantined_share "
                f"({share}); the last: {reason}; or raise the share"
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
        ValueError: an empty split, a label set or device that is not there, a seed that is none, or an unusable
            combination of store, decoder and device.
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
        if negatives is not None and not isinstance(negatives, NegativeSchedule):
            raise TypeError(
                f"negatives ({negatives!r}) must be a NegativeSchedule, such as NegativeSchedule(enabled=True); "
                "its fields say from which position on there are hard ones, and how many"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed ({seed!r}) must be a whole number, at least 0 and less than 2**63; choose another")
        self.plan = TrainPlan(dataset, spec, self.config, seed, negatives)

    def __len__(self) -> int:
        raise TypeError(
            "a TrainLoader has no length: it goes on without end; use plan.samples_per_epoch, or an EvalLoader"
        )

    def batches(self, start_step: int = 0) -> Batches:
        """Yield the batches of this rank without end, from `start_step` on.

        Step s covers positions s*G .. (s+1)*G - 1 with G = clips_per_batch * world_size; each rank takes a contiguous
        slice, so that two ranks of 8 clips and one of 16 see the same clips in the same order.

        Raises:
            ValueError: `start_step` is no whole number, or less than 0.
        """
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step ({start_step!r}) must be a whole number, at least 0; count steps from 0")
        return self._run(self._steps(start_step), self.plan, num_crops=1, want_negative=self.plan.negatives.enabled)

    def _steps(self, step: int) -> Iterator[range]:
        """Yield this rank's positions of each step, without end."""
        size, rank, world = self.options.clips_per_batch, self.options.rank, self.options.world_size
        while True:
            first = (step * world + rank) * size
            yield range(first, first + size)
            step += 1

    def _fill(self, item: Unreadable, batch: TakenBatch, place: int, source: ClipSource) -> HostClip:
        """Return the first substitute of the plan that can be read."""
        for attempt in range(1, SUBSTITUTE_TRIES + 1):
            clip = source.again(batch, place, attempt)
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
        pretext: Rotations and out-of-sync audio of the self-supervised tasks; none by default.

    Raises:
        ValueError: a label set or device that is not there, or an unusable combination of store, decoder and device.
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
        pretext: Pretext | None = None,
    ) -> None:
        super().__init__(dataset, spec, config, options)
        if views is not None and not isinstance(views, ViewConfig):
            raise TypeError(f"views ({views!r}) must be a ViewConfig, such as ViewConfig(num_clips=10, num_crops=3)")
        self.plan = EvalPlan(dataset, spec, self.config, views or ViewConfig(), pretext)

    def batches(self) -> Batches:
        """Yield this rank's share of an evaluation; over all ranks every position comes exactly once.

        Nothing is padded, so ranks may get different numbers of batches and the last ones may be smaller; a batch holds
        pictures of one size only.
        """
        wanted = self.plan.pretext.negatives != "none"
        crops = max(1, self.plan.views.num_crops)
        return self._run(self._equal_sizes(), self.plan, num_crops=crops, want_negative=wanted)

    def __len__(self) -> int:
        """Batches of this rank, if every clip can be read; one whose clips are all unreadable is left out."""
        if self.plan.views.num_crops:
            return -(-len(self._positions()) // self.options.clips_per_batch)
        return sum(1 for _ in self._equal_sizes())

    def _positions(self) -> range:
        """Return this rank's share of the positions."""
        total, rank, world = self.plan.num_positions, self.options.rank, self.options.world_size
        return range(total * rank // world, total * (rank + 1) // world)

    def _equal_sizes(self) -> Iterator[list[int]]:
        """Yield the positions of each batch."""
        batch: list[int] = []
        size = (0, 0)
        for position in self._positions():
            own = self.plan.size_of(position)
            if batch and (len(batch) == self.options.clips_per_batch or own != size):
                yield batch
                batch = []
            batch.append(position)
            size = own
        if batch:
            yield batch

    def _fill(self, item: Unreadable, batch: TakenBatch, place: int, source: ClipSource) -> None:
        """Leave the slot empty: an evaluation scores what was planned and nothing else."""
