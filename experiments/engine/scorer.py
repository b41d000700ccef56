"""A trained model that scores batches, wherever it comes from: a run, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import Config
from experiments.engine.data import class_subset, resolve_data_path
from experiments.engine.precision import autocast
from experiments.engine.scoring import ClassSubset, only_classes
from experiments.engine.trained_model import load_model
from experiments.records.checkpoint import Checkpoint
from experiments.runtime import Runtime
from pipeline.batch import Batch
from pipeline.open import open_source


@dataclass(frozen=True)
class Scorer:
    """What scores clips.

    Args:
        config: of the run, or as much of it as an export holds.
        class_names: K names.
        origin: where the weights lie.
        step: of the training.
        score: batch -> class scores in 0..1: (N, K) of N views, (R, K) of R boxes for a detection.
        predictable: how many of the classes can be predicted (`eval.class_subset`).
        model: that scores; None for an exported program.
    """

    config: Config
    class_names: tuple[str, ...]
    origin: str
    step: int
    score: Callable[[Batch], Tensor]
    predictable: int
    model: nn.Module | None = None


def scorer_of_run(config: Config, checkpoint: Checkpoint, runtime: Runtime) -> Scorer:
    """Return what scores with the weights of a checkpoint.

    Args:
        config: of the run.
        checkpoint: verified.
        runtime: this process.

    Raises:
        CheckpointError: weights of another model, or not finite.
        ValueError: `eval.class_subset` cannot be looked up.
    """
    names = tuple(checkpoint.load().get("class_names", ()))
    names = names or tuple(f"class {i}" for i in range(config.model.num_classes))
    model = load_model(config, checkpoint, runtime.device)
    score, subset = model_scores(model, config, runtime)
    count = len(names) if subset is None else sum(subset.allowed)
    return Scorer(config, names, str(checkpoint.path), checkpoint.step, score, count, model)


def model_scores(
    model: nn.Module, config: Config, runtime: Runtime
) -> tuple[Callable[[Batch], Tensor], ClassSubset | None]:
    """Return what scores a batch with a model, and the classes that can be predicted, None for all.

    Args:
        model: in evaluation mode, on the device.
        config: of the run, or as much of it as an export holds.
        runtime: this process.

    Raises:
        ValueError: `eval.class_subset` cannot be looked up.
    """
    detects = config.model.head == "detection"
    subset = None if detects else subset_of_run(config, runtime)  # of a detection it only says what counts

    def score(batch: Batch) -> Tensor:
        """Class scores of a batch's views, or of its boxes; see `Scorer`."""
        more: dict[str, Any] = {"has_audio": batch.has_audio} if config.model.drops_silence else {}
        if detects:
            more["boxes"] = batch.boxes
        precise = autocast(runtime.device, config.runtime.precision)
        with torch.inference_mode(), precise, only_classes(model, subset):
            scores: Tensor = model(batch.frames, batch.log_mel, **more).scores
        return scores

    return score, subset


def subset_of_run(config: Config, runtime: Runtime) -> ClassSubset | None:
    """Return the classes that `eval.class_subset` leaves to a run's evaluation, None for all.

    Raises:
        ValueError: the run's data, which hold the list, are not there, or have no such list.
    """
    if not config.eval.class_subset:
        return None
    try:
        data = open_source(resolve_data_path(config, runtime), num_threads=config.data.num_threads)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"eval.class_subset ({config.eval.class_subset}) must be a class list of the run's data, which are not "
            f"there ({error}); name them with --set data.path=..., or leave it out with --set eval.class_subset="
        ) from error
    return class_subset(config, data.split(config.data.val_split))
