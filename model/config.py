"""Every symbol of the paper as a name, once: the configuration of an AVSlowFast model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

from model.config_rules import ModelConfigError, check_fields, require

__all__ = ["ModelConfig", "ModelConfigError"]

# Blocks of res2, res3, res4, res5 by ResNet depth (14 and 26 are the bottleneck layouts for small machines).
STAGE_BLOCKS: Final[dict[int, tuple[int, int, int, int]]] = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGES: Final = ("pool1", "res2", "res3", "res4", "res5")  # where a stage ends, in order; pool5 is the head
RES_STAGES: Final = STAGES[1:]
LATERAL_STAGES: Final = STAGES[:-1]  # a lateral after res5 would feed nothing
EXPANSION: Final = 4  # a bottleneck's output has 4x its inner width
LATERAL_RATIO: Final = 2  # F->S gives 2 C_f channels (section 3.3 of the SlowFast paper)
SYNC_EMBEDDING: Final = 64

LateralStage = Literal["pool1", "res2", "res3", "res4"]  # LATERAL_STAGES
SyncLevel = Literal["res2", "res3", "res4", "res5", "pool5"]
_SHARE: Final = {"ge": 0.0, "le": 1.0}
_COUNT: Final = {"ge": 1}
_FORMER_KEYS: Final = ("drop_pathway_rate",)  # of older exports; the training loop's
_PATHWAYS: Final = (("slow", "fast"), ("slow", "fast", "audio"), ("audio",))
_PATHWAY_NAMES: Final = "[slow, fast], [slow, fast, audio] and [audio]"


@dataclass(frozen=True)
class ModelConfig:
    """One model of the family; the defaults are AVSlowFast R50 4x16 of Table 1 with A->FS fusion.

    DropPathway's rate P_d is the training loop's (`drop_pathway.should_drop`): the model is told of every drop.

    Raises:
        ModelConfigError: for values that describe no model.
    """

    num_classes: int = field(default=400, metadata=_COUNT)
    pathways: tuple[Literal["slow", "fast", "audio"], ...] = ("slow", "fast", "audio")
    depth: Literal[14, 26, 50, 101, 152] = 50  # see STAGE_BLOCKS
    width: int = field(default=64, metadata=_COUNT)  # channels of Slow conv1; every other width follows from it
    num_frames: int = field(default=4, metadata=_COUNT)  # T, frames of Slow
    frame_stride: int = field(default=16, metadata=_COUNT)  # tau, source frames between two frames of Slow
    alpha_fast: int = field(default=8, metadata=_COUNT)  # alpha_F, Fast frames per Slow frame
    alpha_audio: int = field(default=32, metadata=_COUNT)  # alpha_A, log-mel frames per Slow frame
    beta_fast: float = 1 / 8  # beta_F, Fast channels / Slow channels
    beta_audio: float = 1 / 2  # beta_A, Audio channels / Slow channels
    num_mel_bins: int = field(default=80, metadata=_COUNT)
    slow_frame_sampling: Literal["stride", "linspace"] = "stride"  # linspace: as released SlowFast weights were trained
    # Blocks of res4 (Slow, Fast) with 3 temporal taps; 0 = all of them.
    res4_temporal_blocks: int = field(default=0, metadata={"ge": 0})
    # Blocks of Slow's res4 (from 0) that a Non-local block follows.
    nonlocal_blocks: tuple[int, ...] = field(default=(), metadata={"ge": 0})
    lateral_stages: tuple[LateralStage, ...] = ("res3", "res4")  # F->S after these stages
    lateral_kernel: int = field(default=5, metadata=_COUNT)  # temporal taps of F->S; 7 in the released 8x8 R50 weights
    # How audio enters vision; "none": only at pool5, which is always there.
    fusion: Literal["none", "a_fs", "a_f_s", "av_nonlocal"] = "a_fs"
    # Audio enters vision after these stages.
    fusion_stages: tuple[LateralStage, ...] = field(
        default=("res3", "res4"), metadata={"hint": "audio always joins at pool5"}
    )
    audio_block: Literal["parallel", "table1"] = "parallel"  # "table1": Table 1 read literally
    audio_res2_stride: Literal[1, 2] = 1  # 2: as the text of section 3.4 says
    # What stands in for audio in a dropped step; "laterals_only": audio still enters the classifier.
    drop_pathway_mode: Literal["zeros", "running_average", "laterals_only"] = "zeros"
    sync_loss: Literal["none", "contrastive", "classification"] = "none"
    sync_levels: tuple[SyncLevel, ...] = ("res3", "res4", "res5")
    sync_weight: float = field(default=1.0, metadata={"ge": 0.0})  # per level
    head: Literal["softmax", "sigmoid", "detection", "ssl"] = "softmax"
    dropout_rate: float = field(default=0.5, metadata=_SHARE)
    pool_window: int = field(default=7, metadata=_COUNT)  # the head averages 7x7 windows, stride 1 (7 = 224 px / 32)
    clips_per_bn_group: int = field(default=8, metadata=_COUNT)  # BN statistics over this many clips
    # "bn_statistics", "bn" (and its scale and shift), "backbone" (linear probe).
    freeze: Literal["none", "bn_statistics", "bn", "backbone"] = "none"
    activation_checkpointing: bool = False
    backend: Literal["auto", "fused", "reference"] = "auto"  # of the fused ops; "auto" follows kernels.set_backend

    def __post_init__(self) -> None:
        for item in fields(self):  # YAML and JSON give lists
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
        check_fields(self)
        self.validate()

    # Derived values ---------------------------------------------------------------------------------------------

    @property
    def has_visual(self) -> bool:
        """Whether the model sees frames."""
        return "slow" in self.pathways

    @property
    def has_audio(self) -> bool:
        """Whether the model has an Audio pathway."""
        return "audio" in self.pathways

    @property
    def num_fast_frames(self) -> int:
        """Frames of one clip as the model takes it: alpha_F T."""
        return self.alpha_fast * self.num_frames

    @property
    def num_mel_frames(self) -> int:
        """Log-mel frames of one clip: alpha_A T (128 for 4x16 and 8x8)."""
        return self.alpha_audio * self.num_frames

    @property
    def stage_blocks(self) -> tuple[int, int, int, int]:
        """Residual blocks of res2 to res5."""
        return STAGE_BLOCKS[self.depth]

    @property
    def audio_fusion_stages(self) -> tuple[str, ...]:
        """Stages after which audio enters vision, in order; none for fusion "none" or a model without audio."""
        if self.fusion == "none" or not (self.has_audio and self.has_visual):
            return ()
        return tuple(s for s in STAGES if s in self.fusion_stages)

    @property
    def active_sync_levels(self) -> tuple[str, ...]:
        """Synchronization levels that are built, in order; none without a synchronization loss."""
        return tuple(s for s in (*STAGES, "pool5") if s in self.sync_levels) if self.sync_loss != "none" else ()

    def channels(self, pathway: str, stage: str) -> int:
        """Channels that `pathway` has at the end of `stage`, without laterals (Table 1)."""
        base = self.base_channels(pathway)
        return base if stage == "pool1" else EXPANSION * base << RES_STAGES.index(stage)

    def base_channels(self, pathway: str) -> int:
        """Channels of conv1: 64 (Slow), 8 (Fast), 32 (Audio) by default."""
        return round(self.width * {"slow": 1.0, "fast": self.beta_fast, "audio": self.beta_audio}[pathway])

    def audio_stride(self, stage: str) -> int:
        """Log-mel frames per time step of Audio at the end of `stage`."""
        steps = {"pool1": 0, "res2": 0, "res3": 1, "res4": 2, "res5": 3}[stage]
        return (1 if stage == "pool1" else self.audio_res2_stride) << steps

    def lateral_stride(self, stage: str) -> int | None:
        """Stride s of the audio lateral at `stage`: its time steps per step of the map that audio is added to.

        16 after res3 and 8 after res4 for 4x16 (facts of section 3.3).

        Returns:
            s; None where the steps of audio are no multiple of the map's.
        """
        steps = self.num_fast_frames if self.fusion == "a_f_s" else self.num_frames
        stride, rest = divmod(self.num_mel_frames, self.audio_stride(stage) * steps)
        return None if rest else stride

    # Checks -----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check what concerns several keys, or more of one than its annotation says.

        Raises:
            ModelConfigError: on the first broken rule.
        """
        require(self.pathways in _PATHWAYS, "pathways", self.pathways, f"be one of {_PATHWAY_NAMES}")
        require(
            self.lateral_kernel % 2 == 1, "lateral_kernel", self.lateral_kernel, "be odd, so that frames stay centred"
        )
        for pathway in ("fast", "audio"):
            exact = self.width * (self.beta_fast if pathway == "fast" else self.beta_audio)
            whole = exact >= 2 and math.isclose(exact, round(exact))
            require(whole, f"width x beta_{pathway}", exact, "be a whole number of channels, at least 2")
        res4 = self.stage_blocks[2]
        inside = self.res4_temporal_blocks <= res4
        require(inside, "res4_temporal_blocks", self.res4_temporal_blocks, f"lie in [0, {res4}]")
        outside = [b for b in self.nonlocal_blocks if b >= res4]
        require(not outside, "nonlocal_blocks", self.nonlocal_blocks, f"lie in [0, {res4 - 1}], the blocks of res4")
        self._validate_fusion()
        self._validate_sync()

    def _validate_fusion(self) -> None:
        for stage in self.audio_fusion_stages:
            remedy = f"hold {stage}: audio is fused into the F->S lateral there"
            require(stage in self.lateral_stages, "lateral_stages", self.lateral_stages, remedy)
            remedy = f"give audio at {stage} a multiple of the time steps of the visual map it joins"
            require(self.lateral_stride(stage) is not None, "alpha_audio", self.alpha_audio, remedy)
        if self.has_audio and not self.has_visual:
            classifies = self.head in ("softmax", "sigmoid")
            require(classifies, "head", self.head, "be softmax or sigmoid for an audio-only model")

    def _validate_sync(self) -> None:
        if self.sync_loss == "none":
            return
        require(self.pathways == ("slow", "fast", "audio"), "pathways", self.pathways, "be all three for a sync_loss")
        allowed = ("pool5",) if self.fusion == "none" else get_args(SyncLevel)
        ok = bool(self.sync_levels) and set(self.sync_levels) <= set(allowed)
        require(ok, "sync_levels", self.sync_levels, f"name levels of {', '.join(allowed)} for fusion {self.fusion}")
        if self.fusion != "a_fs":  # the other forms have nothing of that stride at a level that is not fused
            return
        for level in self.active_sync_levels:
            if level == "pool5":
                continue
            steps = self.num_mel_frames / self.audio_stride(level)
            remedy = (
                f"name levels where audio's time steps are a multiple of num_frames ({self.num_frames}); "
                f"{level} has {steps:g}: raise alpha_audio ({self.alpha_audio}) or leave the level out"
            )
            require(self.lateral_stride(level) is not None, "sync_levels", self.sync_levels, remedy)

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON types; `ModelConfig.from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(ModelConfig)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read `to_dict`'s form, also of a version that had the training loop's drop_pathway_rate in it.

        Raises:
            ModelConfigError: on an unknown key or a broken rule.
        """
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - {*names, *_FORMER_KEYS})
        require(not unknown, "keys", unknown, f"be fields of ModelConfig: {', '.join(names)}")
        return cls(**{key: value for key, value in values.items() if key in names})
