"""What every evaluation clip is: temporal clips and spatial crops of each sample, without randomness."""

import math
from typing import Protocol

import numpy as np

from pipeline.clip import ClipPlan, ClipSpec
from pipeline.config import ViewConfig
from pipeline.dataset import Dataset
from pipeline.plan import centred_start
from pipeline.windows import audio_start, clip_frames, start_range, view_starts, view_windows


class Plan(Protocol):
    """What the loader needs to know of a plan."""

    @property
    def dataset(self) -> Dataset: ...
    @property
    def spec(self) -> ClipSpec: ...
    def clip(self, position: int) -> ClipPlan:
        """Return the clip at a position."""
        ...


class EvalPlan:
    """Plans the views of an evaluation: position p is temporal clip p % K of sample p // K.

    The crops of a temporal clip belong to one position, so that it is decoded once for all of them.

    Args:
        dataset: Split to evaluate.
        spec: Shape of every clip (its crop size is replaced by the views').
        views: Clips, crops and rules.
    """

    def __init__(self, dataset: Dataset, spec: ClipSpec, views: ViewConfig) -> None:
        views.validate()
        self.dataset, self.spec, self.views = dataset, spec, views
        timed = np.isfinite(np.asarray(dataset.samples.key_time_s))
        self._key_frames = len(timed) > 0 and bool(timed.all())

    @property
    def clips_per_sample(self) -> int:
        """Temporal clips of a sample: one where samples are key frames (AVA), whatever the views say."""
        return 1 if self._key_frames else self.views.num_clips

    @property
    def views_per_sample(self) -> int:
        """Temporal clips x spatial crops of a sample: how often each comes in an evaluation."""
        return self.clips_per_sample * max(1, self.views.num_crops)

    @property
    def num_positions(self) -> int:
        """Temporal clips of the whole evaluation."""
        return len(self.dataset.samples) * self.clips_per_sample

    def clip(self, position: int) -> ClipPlan:
        """Return temporal clip `position % K` of sample `position // K` with all its crops."""
        sample, view = divmod(position, self.clips_per_sample)
        table, samples = self.dataset.media, self.dataset.samples
        media = int(samples.media[sample])
        start = self._start_frame(sample, media, view)
        start_s = start / table.fps(media)
        windows, size = view_windows(table, media, self.views.num_crops, self.views.crop_size_px)
        return ClipPlan(
            position=position,
            epoch=0,
            sample=sample,
            media=media,
            start_s=start_s,
            end_s=start_s + (self.spec.num_frames - 1) * self.spec.frame_step_s,
            frames=clip_frames(table, media, start, self.spec),
            audio_start=audio_start(start_s, self.spec),
            crops=windows,
            size_px=size,
            view=view,
        )

    def _start_frame(self, sample: int, media: int, view: int) -> int:
        samples = self.dataset.samples
        key_time = float(samples.key_time_s[sample])
        if not math.isnan(key_time):
            return centred_start(self.dataset, media, key_time, self.spec)
        segment = (float(samples.start_s[sample]), float(samples.end_s[sample]))
        low, high = start_range(self.dataset.media, media, segment, self.spec)
        return view_starts(low, high, self.clips_per_sample, self.views.clip_rule)[view]
