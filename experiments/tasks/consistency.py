"""Whether the settings of a training fit its task: head, kind of labels, losses, views."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config

_FITTING: Mapping[str, tuple[tuple[str, ...], str]] = {  # task -> kinds of labels, head
    "classification": (("single",), "softmax"),
    "multilabel": (("multi_hot", "timed"), "sigmoid"),
    "detection": (("boxes",), "detection"),
    "self_supervision": (("single",), "ssl"),
}


def check_consistency(config: Config) -> None:
    """Check that task, head, kind of labels and losses of a training fit each other.

    Args:
        config: of a training.

    Raises:
        ConfigError: two of them contradict each other; names both and what to set.
    """
    data, model, task = config.data, config.model, config.train.task
    kinds, head = _FITTING[task]
    if data.rotation and model.head != "ssl":
        raise ConfigError(f"data.rotation (true) must have model.head=ssl, not {model.head}; set data.rotation=false")
    if model.freeze == "backbone" and not config.train.init_from:
        raise ConfigError(
            "train.init_from ('') must name trained weights for model.freeze=backbone (only the classifier "
            "learns); set it, or model.freeze=none"
        )
    if data.label_kind not in kinds:
        raise ConfigError(
            f"data.label_kind ({data.label_kind}) must be {' or '.join(kinds)} for train.task={task}; set it"
        )
    if model.sync_batch_norm and config.runtime.compile:
        raise ConfigError(
            "model.sync_batch_norm (true) must have runtime.compile=false: ranks meet inside every normalisation, "
            "which torch.compile cannot hold; set one of them to false"
        )
    if config.eval.class_subset and task == "multilabel":
        raise ConfigError(
            f"eval.class_subset ({config.eval.class_subset}) must be empty for train.task={task}, where "
            "every class has a score of its own; leave it out"
        )
    if model.head != head:
        raise ConfigError(f"model.head ({model.head}) must be {head} for train.task={task}; set model.head={head}")
    if task == "detection":
        _check_detection(config)
    if task == "self_supervision":
        _check_self_supervision(config)
    if model.sync_loss == "none" and data.negatives != "none":
        raise ConfigError(
            f"data.negatives ({data.negatives}) must be none without a loss that uses them; "
            "set model.sync_loss=contrastive or classification, or data.negatives=none"
        )
    if model.sync_loss != "none" and data.negatives == "none":
        raise ConfigError(
            f"model.sync_loss ({model.sync_loss}) must have out-of-sync audio to compare with, data.negatives is none; "
            "set data.negatives=easy or curriculum, or model.sync_loss=none"
        )


def _check_self_supervision(config: Config) -> None:
    """Check that there is something to learn, and that it can be turned; raises ConfigError."""
    if not config.data.rotation and config.model.sync_loss == "none":
        raise ConfigError(
            "data.rotation (false) and model.sync_loss (none) must not both be off for train.task=self_supervision: "
            "nothing would be learnt; set data.rotation=true, or model.sync_loss=contrastive with data.negatives"
        )
    if config.data.rotation and config.views.num_crops != 1:
        raise ConfigError(
            f"views.num_crops ({config.views.num_crops}) must be 1 for data.rotation: a clip is turned as a "
            "whole, in a square; set views.num_crops=1"
        )
    if config.eval.class_subset:
        raise ConfigError("eval.class_subset must be empty for train.task=self_supervision; leave it out")


def _check_detection(config: Config) -> None:
    """Check what a detection rules out besides; raises ConfigError."""
    if config.views.num_crops != 0:
        raise ConfigError(
            f"views.num_crops ({config.views.num_crops}) must be 0 (the whole frame) for train.task=detection: a crop "
            "cuts persons off; set views.num_crops=0"
        )
    if config.model.sync_loss != "none":
        raise ConfigError(
            f"model.sync_loss ({config.model.sync_loss}) must be none for train.task=detection, whose loss is of boxes "
            "alone; set model.sync_loss=none"
        )
