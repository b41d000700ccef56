"""Every setting of a run, with its default, in frozen dataclasses; loaded by one strict reader.

The sections `data`, `views` and `model` belong to their packages; the rest is here. docs/configuration.md explains all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from experiments.cli.strict_yaml import ConfigError, Entry, apply_override, build, read_config_text, read_tree
from model.config import ModelConfig
from model.variants import VARIANTS
from pipeline.config import DataConfig, ViewConfig

CONFIG_VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimConfig:
    """SGD and its learning rate, which is a pure function of the step (paper, section 4.1)."""

    lr: float = field(default=0.1, metadata={"gt": 0.0, "le": 1000.0})  # peak, for lr_clips clips a step
    lr_clips: int = field(default=0, metadata={"ge": 0})  # 0 = lr is that of train.clips_per_step, whatever it is
    momentum: float = field(default=0.9, metadata={"ge": 0.0, "lt": 1.0})
    nesterov: bool = False
    weight_decay: float = field(default=1e-4, metadata={"ge": 0.0, "le": 1.0})  # 0 on BN whatever is given here
    schedule: Literal["cosine", "steps"] = "cosine"
    warmup_steps: int = field(default=0, metadata={"ge": 0})
    warmup_share: float = field(default=0.0, metadata={"ge": 0.0, "le": 0.5})  # of the training, instead of steps
    warmup_start_lr: float = field(default=0.0, metadata={"ge": 0.0})
    milestones: tuple[float, ...] = field(default=(), metadata={"gt": 0.0, "lt": 1.0})  # shares; "steps" only
    milestone_factor: float = field(default=0.1, metadata={"gt": 0.0, "le": 1.0})
    max_grad_norm: float = field(default=0.0, metadata={"ge": 0.0})  # 0 = gradients are not clipped
    bad_step: Literal["stop", "skip"] = "stop"  # nan or inf in loss or gradients, or a spike: end, or leave it out
    spike_ratio: float = field(default=0.0, metadata={"ge": 0.0})  # gradient norm / its usual value; 0 = any finite one
    backend: Literal["torch", "apex"] = "torch"  # apex: FusedSGD of NVIDIA apex, CUDA only

    def validate(self) -> None:
        """Check the keys against each other.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(f"milestones ({list(self.milestones)}) must be given with schedule: steps, and only there")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones ({list(self.milestones)}) must rise; sort them")
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and warmup_share ({self.warmup_share:g}) must not both be > 0; "
                "set one of them to 0"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov (true) must have momentum > 0; set optim.momentum")
        if 0 < self.spike_ratio <= 1:
            raise ValueError(f"spike_ratio ({self.spike_ratio}) must be 0 (off) or more than 1, such as 10; correct it")
        if self.backend == "apex" and (self.bad_step == "skip" or self.spike_ratio > 0):
            raise ValueError("bad_step (skip) and spike_ratio must have backend: torch; apex's FusedSGD skips no step")

    def warmup(self, total_steps: int) -> int:
        """Return the steps of the warm-up: as given, but a tenth of a training that is not twice as long.

        Args:
            total_steps: of the training.
        """
        steps = int(self.warmup_share * total_steps + 1e-6) if self.warmup_share else self.warmup_steps
        return steps if 2 * steps <= total_steps else total_steps // 10


@dataclass(frozen=True)
class TrainConfig:
    """What is trained for how long."""

    task: Literal["classification", "multilabel", "detection", "self_supervision"] = "classification"
    seed: int = field(default=0, metadata={"ge": 0, "lt": 2**31})
    clips_per_step: int = field(default=64, metadata={"ge": 1})  # over all ranks
    max_clips_per_pass: int = field(default=0, metadata={"ge": 0})  # of a rank, forward and backward; 0 = all at once
    steps: int = field(default=0, metadata={"ge": 0})  # exactly one of steps and epochs is > 0
    epochs: float = field(default=0.0, metadata={"ge": 0.0})
    log_interval_steps: int = field(default=10, metadata={"ge": 1})
    init_from: str = ""  # run, checkpoint, exported model or released SlowFast weights to start from; empty = random
    fresh: bool = False  # move an existing run folder aside instead of continuing it

    def validate(self) -> None:
        """Check the keys against each other.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if (self.steps > 0) == (self.epochs > 0):
            remedy = "set the other to 0, train.steps=0 or train.epochs=0" if self.steps else "set one of them"
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs}): exactly one must be > 0; {remedy}")

    def total_steps(self, num_samples: int) -> int:
        """Return the number of optimizer steps of the training.

        Args:
            num_samples: of the training split.
        """
        return self.steps if self.steps > 0 else max(1, round(self.epochs * num_samples / self.clips_per_step))


@dataclass(frozen=True)
class EvalConfig:
    """When and how to evaluate; the clips and crops are in the section `views`."""

    interval_steps: int = field(default=0, metadata={"ge": 0})  # 0 = at the end only
    clips_per_batch: int = field(default=16, metadata={"ge": 1})  # views per rank and forward pass
    # samples of the training split that are scored as validation is, at most as many as that has; 0 = none
    train_samples: int = field(default=200, metadata={"ge": 0})
    class_subset: str = ""  # class list of the data whose classes alone can be predicted; empty = all
    # 0 = moving averages as they are; the paper's code: 200
    precise_bn_batches: int = field(default=0, metadata={"ge": 0})


@dataclass(frozen=True)
class RuntimeConfig:
    """Device and arithmetic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # the whole step as CUDA graphs; auto: where it can be
    deterministic: bool = False
    num_threads: int = field(default=0, metadata={"ge": 0})  # torch's, per process; 0 = cores, as far as usable
    collective_timeout_s: float = field(default=180.0, metadata={"gt": 0.0})
    compare_ranks_steps: int = field(default=500, metadata={"ge": 0})  # weights, by bits; 0 = before checkpoints


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    interval_steps: int = field(default=1000, metadata={"ge": 0})  # 0 = at the end and on a stop signal only
    keep: int = field(default=2, metadata={"ge": 1})  # newest ones; the best one is kept beside them


@dataclass(frozen=True)
class TrackingConfig:
    """Where the metrics go besides metrics.jsonl."""

    backend: Literal["mlflow", "none"] = "mlflow"
    uri: str = ""  # empty = sqlite file in output_dir; else http://host:port or sqlite:///path
    experiment: str = "avslowfast"
    system_metrics_interval_s: float = field(default=10.0, metadata={"ge": 0.0})  # 0 = off
    flush_timeout_s: float = field(default=30.0, metadata={"ge": 0.0})  # wait for the server at a run's end, at most

    def validate(self) -> None:
        """Check the address of the server.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if self.backend == "none":
            return
        try:
            parts = urlsplit(self.uri)
            known = bool(parts.hostname and parts.port != 0) if parts.scheme in ("http", "https") else not self.uri
        except ValueError:  # a port that is no number
            known = False
        if not known and not re.fullmatch(r"sqlite:///.+", self.uri):
            raise ValueError(
                f"uri ({self.uri}) must be empty (a file in output_dir), http://host:port, https://host or "
                "sqlite:///path; correct it, or set tracking.backend=none"
            )


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """The model, and how often the training loop drops its audio."""

    num_classes: int = field(default=0, metadata={"ge": 0})  # 0 = as many as the data has
    drop_pathway_rate: float = field(default=0.8, metadata={"ge": 0.0, "le": 1.0})  # P_d (paper, section 3.5)
    # What a clip without sound is: one whose audio is dropped, or one whose spectrogram is the mean of the data.
    clips_without_sound: Literal["dropped", "mean_spectrum"] = "dropped"
    sync_batch_norm: bool = False  # ranks with fewer clips than a BN group form groups together

    @property
    def drops_silence(self) -> bool:
        """Whether the model is told which clips have sound; an audio-only model has nothing else to go by."""
        return self.clips_without_sound == "dropped" and self.has_audio and self.has_visual


def _presets() -> dict[str, ModelSection]:
    """Return the variants by name. A linear probe has fixed features: there is no pathway whose pace is to be tuned."""
    sections = {}
    for name, variant in VARIANTS.items():
        rate = 0.0 if variant.freeze == "backbone" else ModelSection.drop_pathway_rate
        sections[name] = ModelSection(**vars(variant), drop_pathway_rate=rate)
    return sections


PRESETS = _presets()
# As files and command lines choose them: the number of classes is the data's, unless it is set.
_OPEN_PRESETS = {
    name: section if section.head == "ssl" else dataclasses.replace(section, num_classes=0)
    for name, section in PRESETS.items()
}


@dataclass(frozen=True)
class DebugConfig:
    """Switches for looking into a problem."""

    synthetic_input: bool = False  # one random batch made once: the upper bound without the loader
    overfit_one_batch: bool = False  # the first batch again and again: the loss must go to 0
    sync_warnings: bool = False  # CUDA: warn at every hidden synchronization
    profile_steps: int = field(default=0, metadata={"ge": 0})  # steps to trace, a few after the start; 0 = none


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    version: int = CONFIG_VERSION
    name: str = ""  # empty = name of the YAML file
    output_dir: str = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def validate(self) -> None:
        """Check version, name and what concerns several sections.

        Raises:
            ValueError: with key, value, rule and remedy.
        """
        if self.version != CONFIG_VERSION:
            raise ValueError(
                f"version ({self.version}) must be {CONFIG_VERSION}; see docs/configuration.md for what changed"
            )
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(f"name ({self.name}) must be letters, digits, '.', '_' and '-'; it names a folder")

    def with_num_classes(self, count: int, *, always: bool = False) -> Config:
        """Return the configuration with this number of classes (0 = any) where it has none of its own, or always."""
        if self.model.num_classes and not always:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_classes=count))

    @property
    def scaled_optim(self) -> OptimConfig:
        """The section `optim` with the rate of this run: `lr` x train.clips_per_step / `lr_clips` (linear scaling)."""
        optim = self.optim
        if optim.lr_clips == 0:
            return optim
        return dataclasses.replace(optim, lr=optim.lr * self.train.clips_per_step / optim.lr_clips, lr_clips=0)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.output_dir) / self.name


# Keys that change neither the weights nor the scores: they may differ when a run is continued, and between nodes. What
# lies at data.path is held to by its fingerprint.
OPERATIONAL_KEYS = (
    "version", "name", "output_dir", "tracking", "checkpoint", "train.fresh", "train.log_interval_steps",
    "optim.bad_step", "runtime.compare_ranks_steps", "eval.clips_per_batch", "eval.train_samples",
    "runtime.collective_timeout_s", "runtime.cuda_graph", "debug.sync_warnings", "debug.profile_steps",
    "data.path", "data.num_threads", "data.num_workers", "data.clip_deadline_s", "data.prefetch_batches",
    "data.max_quarantined_share",
)  # fmt: skip


def load_config(path: Path, overrides: Sequence[str] = (), *, warn: bool = True) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: the file.
        overrides: `section.key=value` texts.
        warn: of keys of the file that differ from the variant of an override.

    Returns:
        The checked configuration, its name filled in, `~` of its paths replaced by the home folder.

    Raises:
        ConfigError: with file and line (or the override) for what is unknown, ill-typed or out of range.
    """
    root = read_tree(read_config_text(path), str(path))
    for override in overrides:
        apply_override(root, override)
    config = build(Config, root, presets={"model": ("variant", _OPEN_PRESETS)})
    if warn:
        _warn_of_kept_keys(root, config, path)
    config = dataclasses.replace(
        config,
        output_dir=os.path.expanduser(config.output_dir),
        data=dataclasses.replace(config.data, path=os.path.expanduser(config.data.path)),
        train=dataclasses.replace(config.train, init_from=os.path.expanduser(config.train.init_from)),
    )
    return config if config.name else dataclasses.replace(config, name=path.stem)


def _warn_of_kept_keys(root: Entry, config: Config, path: Path) -> None:
    """Say which keys of the file differ from those of a variant that the command line names."""
    model = root.value.get("model") if isinstance(root.value, dict) else None
    entries = model.value if model is not None and isinstance(model.value, dict) else {}
    variant = entries.get("variant")
    if variant is None or not variant.where.startswith("override"):
        return
    assert isinstance(variant.value, str)
    own = [key for key, entry in entries.items() if not entry.where.startswith("override")]
    preset = PRESETS[variant.value]
    kept = [
        f"{key}: {getattr(config.model, key)} ({getattr(preset, key)})"
        for key in own
        if getattr(config.model, key) != getattr(preset, key)
    ]
    if kept:
        log.warning(
            "model.variant=%s: %s sets other values of its own than the variant's, which stay: %s",
            variant.value, path, ", ".join(kept),
        )  # fmt: skip


def resolved_yaml(config: Config) -> str:
    """Return the configuration with every key written out, as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys.

    Args:
        values: mappings to any depth.
        prefix: put before every key.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        flat.update(flatten(value, f"{full}.") if isinstance(value, Mapping) and value else {full: value})
    return flat


def flat_config(config: Config) -> dict[str, Any]:
    """Return every key of the configuration with its value, dotted: {"train.steps": 100, ...}."""
    return flatten(_plain(dataclasses.asdict(config)))


def decisive_keys(config: Config) -> dict[str, Any]:
    """Return the keys that decide weights and scores (all but OPERATIONAL_KEYS)."""
    flat = flat_config(config)
    return {k: v for k, v in flat.items() if not any(k == o or k.startswith(o + ".") for o in OPERATIONAL_KEYS)}


def config_digest(config: Config) -> str:
    """Return 16 hexadecimal digits that change when, and only when, a decisive key changes."""
    return hashlib.sha256(json.dumps(decisive_keys(config), sort_keys=True).encode()).hexdigest()[:16]


def differing_keys(ours: Config, theirs: Config) -> list[str]:
    """Return a line `key: old -> new` for every decisive key that differs.

    Args:
        ours: the new configuration.
        theirs: the old one.
    """
    new, old = decisive_keys(ours), decisive_keys(theirs)
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"a config value of type {type(value).__name__} cannot be written to YAML")
