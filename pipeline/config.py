"""Settings of the data pipeline; the defaults are the paper's training on Kinetics."""

from dataclasses import dataclass

LABEL_KINDS = ("single", "multi_hot", "timed", "boxes")
DECODERS = ("auto", "dali", "pyav")
SHUFFLES = ("full", "shard")
NEGATIVES = ("none", "easy", "curriculum")
CLIP_RULES = ("ends", "pyslowfast", "offset")


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
        decoder: dali (VP9 on a CPU, NVDEC on a GPU), pyav (CPU threads), or auto.
        num_threads: Threads for reading and decoding, and for DALI.
        prefetch_batches: Batches kept ahead of the model.
        max_quarantined_share: Stop when more than this share of a split cannot be read.
    """

    path: str = ""
    train_split: str = "train"
    val_split: str = "val"
    label_set: str = "action"
    label_kind: str = "single"
    target_fps: float = 30.0
    crop_size_px: int = 224
    jitter_min_px: int = 256
    jitter_max_px: int = 320
    flip: bool = True
    rotation: bool = False
    negatives: str = "none"
    hard_negative_share: float = 0.25
    shuffle: str = "full"
    shuffle_shards: int = 8
    decoder: str = "auto"
    num_threads: int = 4
    prefetch_batches: int = 2
    max_quarantined_share: float = 0.05

    def validate(self) -> None:
        """Check what no type can say.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        choices = {
            "label_kind": LABEL_KINDS,
            "decoder": DECODERS,
            "shuffle": SHUFFLES,
            "negatives": NEGATIVES,
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"data.{key} ({getattr(self, key)!r}) must be one of {', '.join(allowed)}")
        if not 16 <= self.crop_size_px <= self.jitter_min_px <= self.jitter_max_px:
            raise ValueError(
                f"data.crop_size_px ({self.crop_size_px}) <= data.jitter_min_px ({self.jitter_min_px}) <= "
                f"data.jitter_max_px ({self.jitter_max_px}) must hold, from 16 on; raise the jitter range"
            )
        limits = {"target_fps": 1000, "shuffle_shards": 1_000_000, "num_threads": 512, "prefetch_batches": 64}
        for key, most in limits.items():
            if not 0 < getattr(self, key) <= most:
                raise ValueError(f"data.{key} ({getattr(self, key)}) must be positive and at most {most}")
        for key in ("hard_negative_share", "max_quarantined_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key} ({getattr(self, key)}) must be in 0..1")


@dataclass(frozen=True)
class ViewConfig:
    """Views of an evaluation (paper section 4, "Inference": 10 clips x 3 crops of 256).

    Args:
        num_clips: Temporal clips a sample; a key frame (AVA) has one, whatever is set here.
        num_crops: Spatial crops a clip: 1 (centre) or 3 along the longer side; 0 takes the whole frame (AVA).
        crop_size_px: Short side after resizing, and side of the crops.
        clip_rule: Start of clip i of K in a segment of N frames, clips of n: ends: round(i * (N - n) / (K - 1)), so
            the last clip reaches the end; pyslowfast: (N - n) * i / K; offset: i * floor((N - n) / (K - 1)).
    """

    num_clips: int = 10
    num_crops: int = 3
    crop_size_px: int = 256
    clip_rule: str = "ends"

    def validate(self) -> None:
        """Check ranges and choices.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if self.num_clips < 1:
            raise ValueError(f"num_clips ({self.num_clips}) must be at least 1")
        if self.num_crops not in (0, 1, 3):
            raise ValueError(f"num_crops ({self.num_crops}) must be 0 (whole frame), 1 (centre) or 3")
        if self.crop_size_px < 16:
            raise ValueError(f"crop_size_px ({self.crop_size_px}) must be at least 16")
        if self.clip_rule not in CLIP_RULES:
            raise ValueError(f"clip_rule ({self.clip_rule!r}) must be one of {', '.join(CLIP_RULES)}")
