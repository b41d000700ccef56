"""Settings of the data pipeline; the defaults are the paper's training on Kinetics."""

import dataclasses
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.dataset import Decoder

_RULES = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
LabelKind = Literal["single", "multi_hot", "timed", "boxes"]
ClipRule = Literal["ends", "pyslowfast", "offset"]
BoxSource = Literal["detected", "ground_truth"]


@dataclass(frozen=True)
class DataConfig:
    """What is read and how a clip is drawn from it (paper section 4, "Training" and "Inference").

    Args:
        path: A store, a folder of plain videos, or `synthetic:quickstart`, which is made on first use.
        train_split: Split to train on.
        val_split: Split to evaluate on.
        label_set: Which labels, where a data set has several (EPIC-Kitchens: verb, noun).
        label_kind: single: one class; multi_hot: all of a sample; timed: those inside the clip (Charades); boxes: the
            labels belong to boxes (AVA), a clip has none of its own.
        target_fps: Rate that the model's frame stride counts in.
        crop_size_px: Side of the training crop.
        jitter_min_px: Least short side after scale jitter.
        jitter_max_px: Largest short side after scale jitter.
        flip: Mirror half of the training clips.
        rotation: Turn each training clip by a random multiple of 90 degrees (self-supervised task).
        negatives: Out-of-sync audio: none, easy (another video), curriculum (hard ones in the second half).
        hard_negative_share: Share of hard negatives once they begin.
        shuffle: full, or shard by shard (sequential reading from object storage or disks).
        shuffle_shards: Shards mixed together when shuffling by shard.
        decoder: cpu (FFmpeg), nvdec (decoders that live on), dali (DALI's own: VP9 on a CPU, NVDEC on a GPU), or auto:
            NVDEC and CPU at once where there is NVDEC (docs/decoders.md).
        frames: Who makes frames of decoded pictures: fused (one operation, on a GPU one kernel), graph (DALI's
            operators), or auto: on a CPU fused where it is built and data.decoder is auto or cpu, on a GPU the graph.
        num_threads: Threads for reading, for decoding where there are no workers, and for DALI.
        num_workers: Worker processes that decode on the CPU; 0: threads of the training process; -1: chosen from the
            CPUs that are free (on a GPU all but one, on a CPU half of them; threads where there is one CPU only).
        clip_deadline_s: Longest that a worker may take for one clip, in seconds.
        clip_memory_mib: Most that the pictures of one clip may take, and what a worker may allocate for it, in MiB.
        prefetch_batches: Batches kept ahead of the model.
        max_quarantined_share: Stop when more than this share of a split cannot be read.
    """

    path: str = ""
    train_split: str = "train"
    val_split: str = "val"
    label_set: str = "action"
    label_kind: LabelKind = "single"
    target_fps: float = field(default=30.0, metadata={"gt": 0.0, "le": 1000.0})
    crop_size_px: int = field(default=224, metadata={"ge": 16, "le": 16_384})
    jitter_min_px: int = field(default=256, metadata={"ge": 16, "le": 16_384})
    jitter_max_px: int = field(default=320, metadata={"ge": 16, "le": 16_384})
    flip: bool = True
    rotation: bool = False
    negatives: Literal["none", "easy", "curriculum"] = "none"
    hard_negative_share: float = field(default=0.25, metadata={"ge": 0.0, "le": 1.0})
    shuffle: Literal["full", "shard"] = "full"
    shuffle_shards: int = field(default=8, metadata={"ge": 1, "le": 1_000_000})
    decoder: Literal["auto", Decoder] = field(default="auto", metadata={"renamed": {"pyav": "cpu"}})
    frames: Literal["auto", "fused", "graph"] = "auto"
    num_threads: int = field(default=4, metadata={"ge": 1, "le": 512})
    num_workers: int = field(default=-1, metadata={"ge": -1, "le": 512})
    clip_deadline_s: float = field(default=60.0, metadata={"gt": 0.0, "le": 86400.0})
    clip_memory_mib: int = field(default=1024, metadata={"ge": 16, "le": 1_048_576})
    prefetch_batches: int = field(default=2, metadata={"ge": 1, "le": 64})
    max_quarantined_share: float = field(default=0.05, metadata={"ge": 0.0, "le": 1.0})

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        self.validate()

    def validate(self) -> None:
        """Check the keys against each other.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if not self.crop_size_px <= self.jitter_min_px <= self.jitter_max_px:
            raise ValueError(
                f"data.crop_size_px ({self.crop_size_px}) <= data.jitter_min_px ({self.jitter_min_px}) <= "
                f"data.jitter_max_px ({self.jitter_max_px}) must hold; raise the jitter range"
            )


@dataclass(frozen=True)
class ViewConfig:
    """Views of an evaluation (paper section 4, "Inference": 10 clips x 3 crops of 256).

    Args:
        num_clips: Temporal clips a sample; a key frame (AVA) has one, whatever is set here.
        num_crops: Spatial crops a clip: 1 (centre) or 3 along the longer side; 0 takes the whole frame (AVA).
        crop_size_px: Short side after resizing, and side of the crops.
        clip_rule: Start of clip i of K in a segment of N frames, clips of n: ends: round(i * (N - n) / (K - 1)), so
            the last clip reaches the end; pyslowfast: (N - n) * i / K; offset: i * floor((N - n) / (K - 1)).
        boxes: Which boxes of a key frame are scored (AVA): detected, those of a person detector, which is the paper's
            protocol; ground_truth, the labelled ones, where nobody detected any.
    """

    num_clips: int = field(default=10, metadata={"ge": 1})
    num_crops: int = 3
    crop_size_px: int = field(default=256, metadata={"ge": 16, "le": 16_384})
    clip_rule: ClipRule = "ends"
    boxes: BoxSource = "detected"

    def __post_init__(self) -> None:
        check_fields(self, "views.")
        self.validate()

    def validate(self) -> None:
        """Check what no range says.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if self.num_crops not in (0, 1, 3):
            raise ValueError(f"views.num_crops ({self.num_crops}) must be 0 (whole frame), 1 (centre) or 3; choose one")


def check_fields(config: Any, prefix: str) -> None:
    """Check every field of a dataclass against its type and its metadata (`ge`, `gt`, `le`, `lt`).

    A configuration that is read from YAML was checked by the same rules, with file and line in the message.

    Args:
        config: Instance of a dataclass of int, float, bool, str and Literal fields; `renamed` in the metadata of a
            Literal gives old values their new names.
        prefix: Written before the name of a field in messages.

    Raises:
        ValueError: with key, value, rule and remedy.
    """
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        key, value, hint = f"{prefix}{item.name}", getattr(config, item.name), hints[item.name]
        if get_origin(hint) is Literal:
            new = item.metadata.get("renamed", {}).get(value) if isinstance(value, str) else None
            if new is not None:
                raise ValueError(f"{key} ({value}) is called {new} now; write {key}={new}")
            if value not in get_args(hint):
                raise ValueError(f"{key} ({value}) must be one of: {', '.join(map(str, get_args(hint)))}; choose one")
            continue
        kinds = (int, float) if hint is float else (hint,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{key} ({value!r}) must be of type {hint.__name__}; correct it")
        for rule, (holds, words) in _RULES.items():
            if rule in item.metadata and not holds(value, item.metadata[rule]):
                raise ValueError(f"{key} ({value}) must be {words} {item.metadata[rule]}; change it")


def data_path_problem(path: str) -> str:
    """Return what is wrong with a `data.path` at which there is no folder, as a sentence; empty where there is one.

    Args:
        path: as it was given; of a synthetic set, which is made on first use, nothing is wrong.
    """
    if not path:
        return "data.path ('') must name a store or a folder of videos; set data.path=..."
    if path.startswith("synthetic:") or Path(path).is_dir():
        return ""
    if not Path(path).exists():
        return f"data.path ({path}) must exist; make a store with: python -m experiments.prepare"
    return f"data.path ({path}) must be a folder, not a file: a store or a folder of videos; set it"
