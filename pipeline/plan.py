"""What every clip is: in training a pure function of (seed, position), in an evaluation of the position alone.

Training positions form one endless stream; epoch e is positions e*S .. (e+1)*S - 1 of a split of S samples, and holds
each sample once. Step s of a run with G clips a step covers positions s*G .. (s+1)*G - 1, whatever the number of ranks,
so any step can be resumed, steps may span two epochs, and the world size may change between runs.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipPlan, ClipSpec, ClipTimes, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import SAMPLE_RATE_HZ, Dataset, sample_shards
from pipeline.draw import Purpose, generator
from pipeline.labels import clip_boxes, clip_labels
from pipeline.windows import (
    audio_start,
    centred_start,
    clip_frames,
    crop_window,
    sound_starts,
    start_range,
    view_starts,
    view_windows,
)

MIN_HARD_SHIFT_S = 0.5  # paper section A.8: hard negatives are at least 0.5 s away
NEGATIVE_TRIES = 32


@dataclass(frozen=True)
class NegativeSchedule:
    """When out-of-sync audio is drawn and how hard it is (paper sections 3.5 and A.8).

    Args:
        enabled: Whether clips carry a negative at all.
        hard_from_position: First position of the stream with hard ones; earlier all are easy.
        hard_share: Share of hard ones from there on.
    """

    enabled: bool = False
    hard_from_position: int = 0
    hard_share: float = 0.0


class TrainPlan:
    """Plans the clips of training.

    Args:
        dataset: Split to draw from.
        spec: Shape of every clip.
        config: Frame rate, crop size, jitter, flip, rotation, labels, shuffling.
        seed: Seed of the run.
        negatives: Schedule of out-of-sync audio.

    Raises:
        ValueError: the split is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: ClipSpec,
        config: DataConfig,
        seed: int,
        negatives: NegativeSchedule | None = None,
    ) -> None:
        if len(dataset.samples) == 0:
            raise ValueError(f"split {dataset.split!r} has 0 samples and must have at least one; prepare it again")
        self.dataset, self.spec, self.config, self.seed = dataset, spec, config, seed
        self.times = spec.at(config.target_fps)
        self.negatives = negatives or NegativeSchedule()
        self._order_epoch, self._order = -1, np.zeros(0, np.int32)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the order of an epoch, which another process makes for itself."""
        return vars(self) | {"_order_epoch": -1, "_order": np.zeros(0, np.int32)}

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the split."""
        return len(self.dataset.samples)

    def order(self, epoch: int) -> NDArray[np.int32]:
        """Return the samples of an epoch in the order of its positions, (S,) int32."""
        if epoch != self._order_epoch:
            rng = generator(self.seed, Purpose.ORDER, epoch)
            self._order_epoch, self._order = -1, np.zeros(0, np.int32)  # never two epochs in memory
            order = np.arange(self.samples_per_epoch, dtype=np.int32)
            rng.shuffle(order)
            if self.config.shuffle == "shard":
                shards = sample_shards(self.dataset)
                group_of_shard = rng.permutation(int(shards.max()) + 1) // self.config.shuffle_shards
                order = order[np.argsort(group_of_shard[shards[order]], kind="stable")]
            self._order_epoch, self._order = epoch, order
        return self._order

    def at(self, position: int, attempt: int) -> ClipPlan:
        """Return the clip at a position (attempt 0), or the substitute number `attempt` that fills its slot."""
        return self.clip(position) if attempt == 0 else self.substitute(position, attempt - 1)

    def clip(self, position: int) -> ClipPlan:
        """Return the clip at a position of the stream."""
        epoch, place = divmod(position, self.samples_per_epoch)
        return self._draw(int(self.order(epoch)[place]), epoch, position, Purpose.CLIP, 0)

    def substitute(self, position: int, attempt: int) -> ClipPlan:
        """Return the clip that fills the slot of an unreadable one; `attempt` counts from 0 until one can be read."""
        planned = self.clip(position)
        rng = generator(self.seed, Purpose.SUBSTITUTE, planned.epoch, position, attempt)
        sample = int(rng.integers(self.samples_per_epoch))
        plan = self._draw(sample, planned.epoch, position, Purpose.SUBSTITUTE, attempt + 1)
        return dataclasses.replace(plan, substitute_for=planned.sample)

    def _draw(self, sample: int, epoch: int, position: int, purpose: Purpose, attempt: int) -> ClipPlan:
        rng = generator(self.seed, purpose, epoch, position, attempt)
        table, samples = self.dataset.media, self.dataset.samples
        media = int(samples.media[sample])
        start = self._start_frame(sample, media, rng)
        start_s = start / table.fps(media)
        end_s = start_s + (self.times.num_frames - 1) * self.times.frame_step_s
        window, size = self._training_crop(media, rng)
        flip = bool(rng.random() < 0.5) and self.config.flip
        rotation = int(rng.integers(4)) if self.config.rotation else 0
        first_audio = audio_start(start_s, self.times)
        negative_media, negative_start = self._negative(sample, media, first_audio, epoch, position)
        return ClipPlan(
            position=position,
            epoch=epoch,
            sample=sample,
            id=samples.id(sample),
            media=media,
            start_s=start_s,
            end_s=end_s,
            frames=clip_frames(table, media, start, self.times),
            audio_start=first_audio,
            crops=(window,),
            size_px=size,
            flip=flip,
            rotation=rotation,
            labels=clip_labels(samples, sample, self.config, (start_s, end_s)),
            boxes=clip_boxes(self.dataset, sample, (window,), size, flip, rotation),
            negative_media=negative_media,
            negative_start=negative_start,
        )

    def _start_frame(self, sample: int, media: int, rng: np.random.Generator) -> int:
        samples = self.dataset.samples
        key_time = float(samples.key_time_s[sample])
        if not math.isnan(key_time):
            return centred_start(self.dataset.media, media, key_time, self.times)
        segment = (float(samples.start_s[sample]), float(samples.end_s[sample]))
        low, high = start_range(self.dataset.media, media, segment, self.times)
        return int(rng.integers(low, high + 1))

    def _training_crop(self, media: int, rng: np.random.Generator) -> tuple[CropWindow, tuple[int, int]]:
        """Return the window of a random crop after scale jitter, and the size of the input."""
        short_side = int(rng.integers(self.config.jitter_min_px, self.config.jitter_max_px + 1))
        size = (self.config.crop_size_px, self.config.crop_size_px)
        at = (float(rng.random()), float(rng.random()))
        return crop_window(self.dataset.media, media, short_side, size, at), size

    def _negative(self, sample: int, media: int, first_audio: int, epoch: int, position: int) -> tuple[int, int]:
        """Return medium and first sample of the out-of-sync audio; medium -1 where there is none."""
        schedule = self.negatives
        if not schedule.enabled:
            return -1, 0
        rng = generator(self.seed, Purpose.NEGATIVE, epoch, position, sample)
        hard = bool(rng.random() < schedule.hard_share) and position >= schedule.hard_from_position
        if hard:
            start = hard_negative_start(self.dataset, self.times, media, first_audio, rng)
            if start is not None:
                return media, start
        return easy_negative(self.dataset, self.times, media, rng)


def hard_negative_start(
    dataset: Dataset, times: ClipTimes, media: int, first_audio: int, rng: np.random.Generator
) -> int | None:
    """Return a window wholly inside the medium's sound and at least 0.5 s away; None if there is no room."""
    first, end = dataset.sound_range(media)
    last = end - times.num_audio_samples
    shift = math.ceil(MIN_HARD_SHIFT_S * SAMPLE_RATE_HZ)
    before = max(0, min(first_audio - shift, last) - first + 1)  # starts first .. first_audio - shift
    first_after = max(first_audio + shift, first)
    after = max(0, last - first_after + 1)
    if before + after == 0:
        return None
    choice = int(rng.integers(before + after))
    return first + choice if choice < before else first_after + choice - before


def easy_negative(dataset: Dataset, times: ClipTimes, media: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return a window of another video's sound; tries are bounded, a set of one video has none (-1)."""
    table, samples = dataset.media, dataset.samples
    for _ in range(NEGATIVE_TRIES):
        other = int(rng.integers(len(samples)))
        candidate = int(samples.media[other])
        if table.num_samples[candidate] == 0 or dataset.same_video(candidate, media):
            continue
        sound = dataset.sound_range(candidate)
        if sound[0] == sound[1]:
            continue  # a track of nothing but silence
        span = (samples.start_s[other], samples.end_s[other])
        segment = (math.floor(span[0] * SAMPLE_RATE_HZ), math.floor(span[1] * SAMPLE_RATE_HZ))
        low, high = sound_starts(sound, segment, times.num_audio_samples)
        return candidate, int(rng.integers(low, high + 1))
    return -1, 0


@dataclass(frozen=True)
class Pretext:
    """What an evaluation of the self-supervised tasks asks of every clip (section 6); the same for every model.

    Args:
        rotation: turn each clip by a multiple of 90 degrees that its position decides.
        negatives: "easy": the sound of another video; "hard": of the same one, at least 0.5 s away, none where there
            is no room; "shifted": of the same one, `shift_s` later, or earlier where there is more sound; "none".
        shift_s: how far, seconds.
    """

    rotation: bool = False
    negatives: Literal["none", "easy", "hard", "shifted"] = "none"
    shift_s: float = 0.0


class EvalPlan:
    """Plans the views of an evaluation: position p is temporal clip p % K of sample p // K.

    The crops of a temporal clip belong to one position, so that it is decoded once for all of them.

    Args:
        dataset: Split to evaluate.
        spec: Shape of every clip.
        config: Frame rate and labels.
        views: Clips, crops, their size and rules, and which boxes.
        pretext: Rotations and out-of-sync audio, for the self-supervised tasks; none by default.

    Raises:
        ValueError: boxes are wanted that the split does not have.
    """

    def __init__(
        self, dataset: Dataset, spec: ClipSpec, config: DataConfig, views: ViewConfig, pretext: Pretext | None = None
    ) -> None:
        self.dataset, self.spec, self.config, self.views = dataset, spec, config, views
        self.pretext = pretext or Pretext()
        self.times = spec.at(config.target_fps)
        timed = np.isfinite(np.asarray(dataset.samples.key_time_s))
        self._key_frames = len(timed) > 0 and bool(timed.all())
        if config.label_kind == "boxes":
            require_boxes(dataset, labelled=views.boxes == "ground_truth")

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

    def at(self, position: int, attempt: int) -> ClipPlan:
        """Return the clip at a position; an evaluation has no substitutes."""
        assert attempt == 0
        return self.clip(position)

    def size_of(self, position: int) -> tuple[int, int]:
        """Return height and width of the views at a position, as `clip` does, without planning the rest."""
        if self.views.num_crops:
            return self.views.crop_size_px, self.views.crop_size_px
        media = int(self.dataset.samples.media[position // self.clips_per_sample])
        return view_windows(self.dataset.media, media, self.views.num_crops, self.views.crop_size_px)[1]

    def clip(self, position: int) -> ClipPlan:
        """Return temporal clip `position % K` of sample `position // K` with all its crops."""
        sample, view = divmod(position, self.clips_per_sample)
        table, samples = self.dataset.media, self.dataset.samples
        media = int(samples.media[sample])
        start = self._start_frame(sample, media, view)
        start_s = start / table.fps(media)
        windows, size = view_windows(table, media, self.views.num_crops, self.views.crop_size_px)
        first_audio = audio_start(start_s, self.times)
        turn = int(generator(0, Purpose.ROTATION, position).integers(4)) if self.pretext.rotation else 0
        negative_media, negative_start = self._negative(media, first_audio, position)
        return ClipPlan(
            position=position,
            epoch=0,
            sample=sample,
            id=samples.id(sample),
            media=media,
            start_s=start_s,
            end_s=start_s + (self.times.num_frames - 1) * self.times.frame_step_s,
            frames=clip_frames(table, media, start, self.times),
            audio_start=first_audio,
            crops=windows,
            size_px=size,
            labels=clip_labels(samples, sample, self.config, None),
            rotation=turn,
            boxes=clip_boxes(
                self.dataset,
                sample,
                windows,
                size,
                flip=False,
                rotation=turn,
                labelled=self.views.boxes == "ground_truth",
            ),
            view=view,
            negative_media=negative_media,
            negative_start=negative_start,
        )

    def _negative(self, media: int, first_audio: int, position: int) -> tuple[int, int]:
        """Return medium and first sample of the out-of-sync audio; medium -1 where there is none."""
        kind, rng = self.pretext.negatives, generator(0, Purpose.NEGATIVE, position)
        if kind == "shifted":
            return self._shifted(media, first_audio)
        if kind == "easy":
            return easy_negative(self.dataset, self.times, media, rng)
        start = hard_negative_start(self.dataset, self.times, media, first_audio, rng) if kind == "hard" else None
        return (-1, 0) if start is None else (media, start)

    def _shifted(self, media: int, first_audio: int) -> tuple[int, int]:
        """Return the window of sound that lies `shift_s` away, on the side where the medium has more sound."""
        first, last = self.dataset.sound_range(media)
        count, shift = self.times.num_audio_samples, round(self.pretext.shift_s * SAMPLE_RATE_HZ)

        def held(start: int) -> int:
            return min(start + count, last) - max(start, first)

        start = max((first_audio + shift, first_audio - shift), key=held)  # later, where both hold the same
        return (media, start) if held(start) > 0 else (-1, 0)

    def _start_frame(self, sample: int, media: int, view: int) -> int:
        samples = self.dataset.samples
        key_time = float(samples.key_time_s[sample])
        if not math.isnan(key_time):
            return centred_start(self.dataset.media, media, key_time, self.times)
        segment = (float(samples.start_s[sample]), float(samples.end_s[sample]))
        low, high = start_range(self.dataset.media, media, segment, self.times)
        return view_starts(low, high, self.clips_per_sample, self.views.clip_rule)[view]


def require_boxes(dataset: Dataset, *, labelled: bool) -> None:
    """Raise ValueError unless a split has any boxes with labels, or any without (those of a person detector)."""
    if not has_boxes(dataset, labelled=labelled):
        if labelled:
            wanted, remedy = "labelled boxes", "prepare it with its ground truth"
        else:
            wanted, remedy = (
                "detected boxes (boxes without labels)",
                "put a file of them beside the ground truth and prepare it again, or score the labelled ones: "
                "views.boxes=ground_truth",
            )
        total = len(_label_counts(dataset))
        raise ValueError(f"split {dataset.split!r} has no {wanted} among its {total} boxes; {remedy}")


def has_boxes(dataset: Dataset, *, labelled: bool) -> bool:
    """Return whether a split has any boxes with labels, or any without."""
    return bool(((_label_counts(dataset) > 0) == labelled).any())


def _label_counts(dataset: Dataset) -> NDArray[Any]:
    """Labels of each box of a split, (R,)."""
    columns = dataset.samples.box_columns
    return np.zeros(0) if columns is None else np.asarray(columns[1].values)
