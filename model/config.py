"""Every symbol of the paper as a name, once: the configuration of an AVSlowFast model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Final, get_args, get_type_hints

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

_CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "pathways": (("slow", "fast"), ("slow", "fast", "audio"), ("audio",)),
    "depth": tuple(STAGE_BLOCKS),
    "fusion": ("none", "a_fs", "a_f_s", "av_nonlocal"),
    "audio_block": ("parallel", "table1"),
    "audio_res2_stride": (1, 2),
    "slow_frame_sampling": ("stride", "linspace"),
    "drop_pathway_mode": ("zeros", "running_average", "laterals_only"),
    "sync_loss": ("none", "contrastive", "classification"),
    "head": ("softmax", "sigmoid", "detection", "ssl"),
    "freeze": ("none", "bn_statistics", "bn", "backbone"),
    "backend": ("auto", "fused", "reference"),
}

_KINDS: Final = {int: "whole number", float: "finite number", str: "name", bool: "true-or-false value"}


class ModelConfigError(ValueError):
    """A model configuration that describes no model; the message gives the value, the rule and a remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """One model of the family; the defaults are AVSlowFast R50 4x16 of Table 1 with A->FS fusion."""

    num_classes: int = 400
    pathways: tuple[str, ...] = ("slow", "fast", "audio")
    depth: int = 50  # 14, 26, 50, 101, 152: see STAGE_BLOCKS
    width: int = 64  # channels of Slow conv1; every other width follows from it
    num_frames: int = 4  # T, frames of Slow
    frame_stride: int = 16  # tau, source frames between two frames of Slow
    alpha_fast: int = 8  # alpha_F, Fast frames per Slow frame
    alpha_audio: int = 32  # alpha_A, log-mel frames per Slow frame
    beta_fast: float = 1 / 8  # beta_F, Fast channels / Slow channels
    beta_audio: float = 1 / 2  # beta_A, Audio channels / Slow channels
    num_mel_bins: int = 80
    slow_frame_sampling: str = "stride"  # "linspace": as the released SlowFast weights were trained
    res4_temporal_blocks: int = 0  # blocks of res4 (Slow, Fast) with 3 temporal taps; 0 = all of them
    nonlocal_blocks: tuple[int, ...] = ()  # blocks of Slow's res4 (from 0) that a Non-local block follows
    lateral_stages: tuple[str, ...] = ("res3", "res4")  # F->S after these stages
    lateral_kernel: int = 5  # temporal taps of F->S; 7 in the released 8x8 R50 weights
    fusion: str = "a_fs"  # how audio enters vision; "none": only at pool5, which is always there
    fusion_stages: tuple[str, ...] = ("res3", "res4")  # audio enters vision after these stages
    audio_block: str = "parallel"  # "table1": Table 1 read literally
    audio_res2_stride: int = 1  # 2: as the text of section 3.4 says
    drop_pathway_rate: float = 0.8  # P_d
    drop_pathway_mode: str = "zeros"  # "running_average", or "laterals_only": audio still enters the classifier
    sync_loss: str = "none"
    sync_levels: tuple[str, ...] = ("res3", "res4", "res5")
    sync_weight: float = 1.0  # per level
    head: str = "softmax"
    dropout_rate: float = 0.5
    pool_window: int = 7  # the head averages 7x7 windows, stride 1 (7 = 224 px / 32)
    clips_per_bn_group: int = 8  # BN statistics over this many clips
    freeze: str = "none"  # "bn_statistics", "bn" (and its scale and shift), "backbone" (linear probe)
    activation_checkpointing: bool = False
    backend: str = "auto"  # of the fused ops; "auto" follows what kernels.set_backend chose

    def __post_init__(self) -> None:
        for field in fields(self):  # YAML and JSON give lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        self.validate()

    # Derived values ---------------------------------------------------------------------------------------------

    @property
    def has_visual(self) -> bool:
        """Whether the model sees frames."""
        return "slow" in self.pathways

    @property
    def has_audio(self) -> bool:
        """Whether the model hears."""
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

    # Checks -----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every rule between the keys.

        Raises:
            ModelConfigError: on the first broken rule.
        """
        for name, kind in _hints().items():
            _rule_of_type(name, getattr(self, name), kind)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _rule(value in choices, name, value, f"be one of {', '.join(map(str, choices))}")
        for name in ("num_classes", "width", "num_frames", "frame_stride", "alpha_fast", "alpha_audio", "num_mel_bins"):
            _rule(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        for name in ("pool_window", "clips_per_bn_group", "lateral_kernel"):
            _rule(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        for name in ("drop_pathway_rate", "dropout_rate"):
            _rule(0 <= getattr(self, name) <= 1, name, getattr(self, name), "lie in [0, 1]")
        _rule(self.sync_weight >= 0, "sync_weight", self.sync_weight, "be at least 0; sync_loss=none switches it off")
        _rule(
            self.lateral_kernel % 2 == 1, "lateral_kernel", self.lateral_kernel, "be odd, so that frames stay centred"
        )
        for pathway in ("fast", "audio"):
            exact = self.width * (self.beta_fast if pathway == "fast" else self.beta_audio)
            _rule(
                exact >= 2 and math.isclose(exact, round(exact)),
                f"width x beta_{pathway}",
                exact,
                "be a whole number of channels, at least 2",
            )
        res4 = self.stage_blocks[2]
        _rule(
            0 <= self.res4_temporal_blocks <= res4,
            "res4_temporal_blocks",
            self.res4_temporal_blocks,
            f"lie in [0, {res4}]",
        )
        outside = [b for b in self.nonlocal_blocks if not 0 <= b < res4]
        _rule(not outside, "nonlocal_blocks", self.nonlocal_blocks, f"lie in [0, {res4 - 1}], the blocks of res4")
        self._validate_fusion()
        self._validate_sync()

    def _validate_fusion(self) -> None:
        for name in ("lateral_stages", "fusion_stages"):
            stages = getattr(self, name)
            remedy = f"name stages of {', '.join(LATERAL_STAGES)} (audio always joins at pool5)"
            _rule(set(stages) <= set(LATERAL_STAGES), name, stages, remedy)
        for stage in self.audio_fusion_stages:
            remedy = f"hold {stage}: audio is fused into the F->S lateral there"
            _rule(stage in self.lateral_stages, "lateral_stages", self.lateral_stages, remedy)
            _rule(
                self.lateral_stride(stage) >= 1,
                "alpha_audio",
                self.alpha_audio,
                f"give audio at {stage} a multiple of the time steps of the visual map it joins",
            )
        if self.has_audio and not self.has_visual:
            _rule(
                self.head in ("softmax", "sigmoid"), "head", self.head, "be softmax or sigmoid for an audio-only model"
            )

    def lateral_stride(self, stage: str) -> float:
        """Stride s of the audio lateral at `stage`: its time steps per step of the map that audio is added to.

        16 after res3 and 8 after res4 for 4x16 (facts of section 3.3); a value below 1 or a fraction is refused.
        """
        audio_steps = self.num_mel_frames / self.audio_stride(stage)
        steps = self.num_fast_frames if self.fusion == "a_f_s" else self.num_frames
        stride = audio_steps / steps
        return int(stride) if stride == int(stride) else 0.5

    def _validate_sync(self) -> None:
        if self.sync_loss == "none":
            return
        _rule(self.pathways == ("slow", "fast", "audio"), "pathways", self.pathways, "be all three for a sync_loss")
        allowed = ("pool5",) if self.fusion == "none" else ("res2", "res3", "res4", "res5", "pool5")
        ok = bool(self.sync_levels) and set(self.sync_levels) <= set(allowed)
        _rule(ok, "sync_levels", self.sync_levels, f"name levels of {', '.join(allowed)} for fusion {self.fusion}")
        for (
            level
        ) in self.active_sync_levels:  # the other forms have nothing of that stride at a level that is not fused
            if self.fusion == "a_fs" and level != "pool5":
                steps = self.num_mel_frames / self.audio_stride(level)
                remedy = (
                    f"name levels where audio's time steps are a multiple of num_frames ({self.num_frames}); "
                    f"{level} has {steps:g}: raise alpha_audio ({self.alpha_audio}) or leave the level out"
                )
                _rule(self.lateral_stride(level) >= 1, "sync_levels", self.sync_levels, remedy)

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON types; `ModelConfig.from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read `to_dict`'s form.

        Raises:
            ModelConfigError: on an unknown key or a broken rule.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        _rule(not unknown, "keys", unknown, f"be fields of ModelConfig: {', '.join(f.name for f in fields(cls))}")
        return cls(**values)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(ModelConfig)


def _rule_of_type(name: str, value: object, kind: Any) -> None:
    """Raise unless `value` is what the field's annotation says, a tuple[...] without repetition."""
    (item, *more) = get_args(kind) or (kind,)
    if more:  # tuple[item, ...]
        rule = f"be a list of {_KINDS[item]}s"
        _rule(isinstance(value, tuple) and all(_is(item, v) for v in value), name, repr(value), rule)
        assert isinstance(value, tuple)
        _rule(len(set(value)) == len(value), name, value, "name nothing twice")
    else:
        _rule(_is(item, value), name, repr(value), f"be a {_KINDS[item]}")


def _is(kind: type, value: object) -> bool:
    """Whether value is of this kind: whole numbers are numbers as well, true and false are not, nor are nan and inf."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _rule(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ModelConfigError(f"{name} ({value}) must {rule}")
