"""From the configuration to data sets, plans and loaders."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from experiments.cli.files import near_path
from experiments.config import Config
from experiments.engine.memory import require_memory
from experiments.engine.scoring import ClassSubset
from experiments.runtime import Runtime
from experiments.tasks.self_supervision import ROTATION_NAMES
from pipeline.annotations.layout import VAL_SHARE
from pipeline.batch import Batch, empty_frames
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.folder.dataset import PlainFolder
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.open import DataPathError, limits_of, open_source, resolve_path
from pipeline.plan import NegativeSchedule, Pretext
from pipeline.store.reader import Store


class DataSetupError(ValueError):
    """Data, model and batch size that do not fit each other."""


def resolve_data_path(config: Config, runtime: Runtime) -> Path:
    """Return the folder of the data; a synthetic set is made on first use, by rank 0 while the others wait.

    Raises:
        DataPathError: if data.path is empty, does not exist or is a file.
    """
    path = config.data.path
    if path.startswith("synthetic:") and runtime.world_size > 1:
        if runtime.is_main:
            resolve_path(path)
        dist.barrier(group=runtime.control)
    try:
        return resolve_path(path)
    except DataPathError as error:
        near = near_path(Path(path)) if path and not Path(path).exists() else ""
        raise DataPathError(f"{error}; {near}" if near else str(error)) from None


def split_of(source: Store | PlainFolder, name: str, key: str) -> Dataset:
    """Return a split of the data.

    Args:
        source: a store or a folder of plain videos.
        name: of the split.
        key: what names it, for the message: a key or an option.

    Raises:
        DataSetupError: there is no such split. ValueError: it is damaged.
    """
    if name not in source.splits:
        near = difflib.get_close_matches(name, [other for other in source.splits if other != "all"], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "choose one."
        if name == "val":
            hint = none_to_validate(source)
        elif isinstance(source, PlainFolder):
            hint += f" The folders train, val and test make splits; without any of them {VAL_SHARE:.0%} is val"
        raise DataSetupError(
            f"{key} ({name}) must be one of the splits {', '.join(source.splits)} of {source.path}; {hint}"
        )
    return source.split(name)


def none_to_validate(source: Store | PlainFolder) -> str:
    """Return what to do about data without a split val, as few videos may be: each is drawn by itself."""
    few = f"of few videos none may be drawn (each with a chance of {VAL_SHARE:.0%})"
    if isinstance(source, PlainFolder):
        path = source.path
        return f"{few}: put some into {path}/val/<class>/ and all others into {path}/train/<class>/, or choose one"
    return f"choose one. If it is made of a folder, {few}: prepare it again with --option val_fraction=0.3"


@dataclass(frozen=True)
class Splits:
    """The data of a run: two splits, and the files of a plain folder that cannot be used, with reasons."""

    train: Dataset
    val: Dataset
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Digest of both splits, 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.train.fingerprint}\n{self.val.fingerprint}".encode()).hexdigest()[:16]


def open_splits(path: Path, config: DataConfig) -> Splits:
    """Open the training and validation split of a store or of a folder of plain videos.

    Args:
        path: resolved.
        config: names of the splits.

    Raises:
        ValueError: for missing or damaged data, or no such split.
    """
    source = open_source(path, num_threads=config.num_threads, limits=limits_of(config))
    refused = source.refused if isinstance(source, PlainFolder) else ()
    train = split_of(source, config.train_split, "data.train_split")
    return Splits(train, split_of(source, config.val_split, "data.val_split"), refused)


def class_names(config: Config, dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the classes.

    Raises:
        DataSetupError: if the label set is unknown, has one class only, or its size is not model.num_classes (0 = any).
    """
    if config.train.task == "self_supervision":  # whatever the data is labelled with
        return ROTATION_NAMES
    label_set = config.data.label_set
    if not dataset.classes:
        raise DataSetupError(
            f"data.path ({config.data.path}) must hold labels; make a store with an annotation file, or put the "
            "videos of each class into a folder of its own: train/<class>/..., val/<class>/..."
        )
    if label_set not in dataset.classes:
        raise DataSetupError(f"data.label_set ({label_set}) must be one of {', '.join(dataset.classes)}; choose one")
    names = tuple(dataset.classes[label_set])
    if config.model.num_classes not in (0, len(names)):
        raise DataSetupError(
            f"model.num_classes ({config.model.num_classes}) must be {len(names)}, the classes of label set "
            f"{label_set!r} in {config.data.path}; leave it out, or set model.num_classes={len(names)}"
        )
    if len(names) == 1 and config.model.head == "softmax":
        raise DataSetupError(
            f"classes of label set {label_set!r} in {config.data.path} (1: {names[0]}) must be at least two: of one "
            "there is nothing to learn; add videos of something else, in a folder of their own"
        )
    return names


def name_differences(names: Sequence[str], trained: Sequence[str]) -> str:
    """Return how two lists of class names differ, in words, with the first three; empty if they are equal."""
    if list(names) == list(trained):
        return ""
    if len(names) != len(trained):
        return f"{len(names)} classes, not {len(trained)}"
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(names, trained, strict=True)) if a != b]
    shown = ", ".join(f"class {i} is {a!r}, not {b!r}" for i, a, b in pairs[:3])
    return f"{len(pairs)} of {len(names)} differ: {shown}{', ...' if len(pairs) > 3 else ''}"


def require_same_classes(config: Config, names: Sequence[str], trained: Sequence[str], name: str) -> None:
    """Check that a checkpoint (called `name`) was trained with the data's classes; raises DataSetupError if not."""
    differences = name_differences(names, trained)
    if trained and differences:
        raise DataSetupError(
            f"classes of label set {config.data.label_set!r} in {config.data.path} must be those that {name} was "
            f"trained with ({differences}); evaluate on data prepared with the same class list, or start a training "
            "on this data from the weights with train.init_from"
        )


def class_subset(config: Config, dataset: Dataset) -> ClassSubset | None:
    """Return the classes that an evaluation may predict (`eval.class_subset`), None for all.

    Raises:
        DataSetupError: if the data has no such class list, or one with other names than the classes of the labels.
    """
    key = config.eval.class_subset
    if not key:
        return None
    names = dataset.classes[config.data.label_set]
    if key not in dataset.classes:
        raise DataSetupError(
            f"eval.class_subset ({key}) must be one of the class lists {', '.join(dataset.classes)} of "
            f"{config.data.path}; choose one, or leave it empty"
        )
    strange = sorted(set(dataset.classes[key]) - set(names))
    if strange:
        raise DataSetupError(
            f"eval.class_subset ({key}) must hold classes of data.label_set={config.data.label_set} only, but "
            f"{len(strange)} are none, the first is {strange[0]!r}; choose another one"
        )
    return ClassSubset(key, tuple(name in set(dataset.classes[key]) for name in names))


def require_samples(config: Config, train_set: Dataset, val_set: Dataset) -> None:
    """Check that both splits hold samples; raises DataSetupError."""
    for key, dataset in (("train_split", train_set), ("val_split", val_set)):
        if len(dataset.samples) == 0:
            raise DataSetupError(
                f"split {dataset.split!r} of {config.data.path} (0 samples) must hold at least one; "
                f"name another one with data.{key}=..., or prepare the data with more videos"
            )


def require_labels(config: Config, dataset: Dataset) -> None:
    """Check that every training sample has exactly one label where the task needs one.

    Raises:
        DataSetupError: with the number of samples that do not, and the first of them.
    """
    if config.data.label_kind != "single":
        return  # boxes: see engine/boxes.py
    if config.train.task == "multilabel":
        raise DataSetupError("data.label_kind (single) must be multi_hot or timed for train.task=multilabel; set it")
    counts = np.diff(np.asarray(dataset.samples.labels(config.data.label_set).offsets))
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        raise DataSetupError(
            f"split {dataset.split!r}: {len(wrong)} of {len(counts)} samples have no single label in "
            f"{config.data.label_set!r}, the first is {dataset.samples.id(int(wrong[0]))}; each must have exactly one: "
            "leave them out of the annotation file, or use train.task=multilabel"
        )


def clips_per_rank(config: Config, world_size: int) -> int:
    """Return the clips of one rank in one step.

    Raises:
        DataSetupError: if clips_per_step does not divide by the ranks, or a rank's share not by the BN groups.
    """
    total, group = config.train.clips_per_step, config.model.clips_per_bn_group
    share, rest = divmod(total, world_size)
    if rest or share == 0:
        fitting = [w for w in range(1, min(total, 2 * world_size + 1024) + 1) if total % w == 0]
        near = sorted(sorted(fitting, key=lambda w: abs(w - world_size))[:3])
        raise DataSetupError(
            f"train.clips_per_step ({total}) must be a multiple of the world size ({world_size}); "
            f"use a world size of {', '.join(map(str, near))} or change train.clips_per_step"
        )
    if share > group and share % group:
        raise DataSetupError(
            f"clips per rank ({total} / {world_size} = {share}) must be at most model.clips_per_bn_group ({group}) "
            f"or a multiple of it; use train.clips_per_step={world_size * group * max(1, round(share / group))}"
        )
    return share


def passes_per_step(config: Config, world_size: int) -> int:
    """Return the passes of one rank in one step: as few as `train.max_clips_per_pass` allows, of equally many clips.

    Raises:
        DataSetupError: as `clips_per_rank`, or a pass would have less than one BN group.
    """
    share, most = clips_per_rank(config, world_size), config.train.max_clips_per_pass
    if most == 0 or share <= most:
        return 1
    group = min(config.model.clips_per_bn_group, share) if config.model.freeze == "none" else 1
    if most < group:
        raise DataSetupError(
            f"train.max_clips_per_pass ({most}) must be at least the {group} clips that share BN statistics "
            f"(model.clips_per_bn_group); use train.max_clips_per_pass={group}"
        )
    return next(k for k in range(2, share + 1) if share % k == 0 and share // k <= most and share // k % group == 0)


def small_group_warning(config: Config, clips: int) -> str:
    """Return the warning about statistics over fewer clips than one BN group, empty if there is none.

    Args:
        config: of the run.
        clips: of the ranks that form a group together, one of them or more (`model.sync_batch_norm`).
    """
    group = config.model.clips_per_bn_group
    if clips >= group or config.model.freeze != "none":
        return ""
    return (
        f"BN statistics are over {clips} clips, not model.clips_per_bn_group ({group}): there are no more together; "
        "for the paper's statistics raise train.clips_per_step, or let ranks form groups: model.sync_batch_norm=true"
    )


def _options(config: Config, runtime: Runtime, clips: int) -> LoaderOptions:
    half = runtime.device.type == "cuda" and config.runtime.precision != "fp32"
    return LoaderOptions(
        clips_per_batch=clips,
        device=str(runtime.device),
        dtype=torch.float16 if half else torch.float32,
        rank=runtime.rank,
        world_size=runtime.world_size,
        want_video=config.model.has_visual,
        want_audio=config.model.has_audio,
        num_classes=config.model.num_classes,
    )


def train_loader(config: Config, dataset: Dataset, runtime: Runtime, total_steps: int) -> TrainLoader:
    """Return the loader of the training split; hard negatives begin in the second half (paper, section A.8).

    Raises:
        DataSetupError: clips that ranks cannot share, frame rates that the model cannot have.
        BatchMemoryError: batches that are larger than the memory.
    """
    half_way = total_steps * config.train.clips_per_step // 2
    curriculum = config.data.negatives == "curriculum"
    negatives = NegativeSchedule(
        enabled=config.data.negatives != "none",
        hard_from_position=half_way if curriculum else 0,
        hard_share=config.data.hard_negative_share if curriculum else 0.0,
    )
    spec, data = ClipSpec.for_model(config.model), config.data
    passes = passes_per_step(config, runtime.world_size)
    options = _options(config, runtime, clips_per_rank(config, runtime.world_size) // passes)
    held = passes if passes > 1 else 0
    require_memory(
        "train.clips_per_step", spec, data.crop_size_px, data, options, with_negative=negatives.enabled, held=held
    )
    return TrainLoader(dataset, spec, data, options, seed=config.train.seed, negatives=negatives)


def eval_loader(config: Config, dataset: Dataset, runtime: Runtime, pretext: Pretext | None = None) -> EvalLoader:
    """Return the loader of an evaluation: `eval.clips_per_batch` views a batch (at least one temporal clip).

    Args:
        config: of the run.
        dataset: the split.
        runtime: of this process.
        pretext: what the self-supervised tasks ask.

    Raises:
        BatchMemoryError: for batches that are larger than the memory.
    """
    crops, views = max(1, config.views.num_crops), config.views
    options = _options(config, runtime, max(1, config.eval.clips_per_batch // crops))
    loader = EvalLoader(dataset, ClipSpec.for_model(config.model), config.data, options, views=views, pretext=pretext)
    most = min(options.clips_per_batch, loader.plan.num_positions) * crops
    whole = dataclasses.replace(options, clips_per_batch=most)
    require_memory("eval.clips_per_batch", loader.spec, views.crop_size_px, config.data, whole)
    return loader


def random_batch(config: Config, runtime: Runtime, clips: int) -> Batch:
    """Return one batch of noise with random labels, on the device (debug.synthetic_input)."""
    model, device = config.model, runtime.device
    generator = torch.Generator().manual_seed(config.train.seed + runtime.rank)
    size = config.data.crop_size_px
    options = _options(config, runtime, clips)
    shape = (clips, model.num_fast_frames, size, size)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frames = empty_frames(shape, options.dtype, device, pad_channels=options.memory_channels == 4)
    frames.copy_(noise(*shape, 3).permute(0, 4, 1, 2, 3))
    mel = (clips, 1, model.num_mel_frames, model.num_mel_bins)
    labels = torch.randint(model.num_classes, (clips,), generator=generator)
    if config.train.task == "multilabel":
        labels = torch.nn.functional.one_hot(labels, model.num_classes).float()
    turns = torch.randint(4, (clips,), generator=generator).to(device) if config.data.rotation else None
    flags = torch.ones(clips, dtype=torch.bool, device=device)
    rows = torch.arange(clips)
    return Batch(
        frames=frames if model.has_visual else None,
        log_mel=noise(*mel).to(device) if model.has_audio else None,
        negative_log_mel=noise(*mel).to(device) if config.data.negatives != "none" else None,
        has_audio=flags, has_negative=flags, is_substitute=~flags, labels=labels.to(device), rotation=turns,
        sample=rows, view=torch.zeros_like(rows), position=rows,
        ids=[f"random-{i}" for i in range(clips)], start_s=[0.0] * clips, **_random_boxes(config, clips, device),
    )  # fmt: skip


def _random_boxes(config: Config, clips: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return three boxes a clip, as large as AVA's persons, each with one class, where the task wants some."""
    if config.train.task != "detection":
        return {}
    each, side = 3, float(config.data.crop_size_px)
    entry = torch.arange(clips).repeat_interleave(each)
    corners = torch.tensor([[0.0, 0.1, 0.4, 0.9], [0.3, 0.1, 0.7, 1.0], [0.6, 0.2, 1.0, 0.8]]).repeat(clips, 1) * side
    labels = torch.nn.functional.one_hot(torch.arange(len(entry)) % config.model.num_classes, config.model.num_classes)
    return {
        "boxes": torch.cat([entry[:, None].float(), corners], 1).to(device),
        "box_labels": labels.float().to(device),
        "box_index": torch.arange(each).repeat(clips),
    }


def repeated(batch: Batch) -> Iterator[Batch]:
    """Yield the same batch without end."""
    while True:
        yield batch
