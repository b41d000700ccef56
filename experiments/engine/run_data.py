"""The data of a training run: two splits that fit configuration and model, and their loaders."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from experiments.config import Config
from experiments.engine.boxes import require_labelled_boxes, task_of
from experiments.engine.data import (
    class_names,
    class_subset,
    clips_per_rank,
    eval_loader,
    open_splits,
    passes_per_step,
    random_batch,
    repeated,
    require_labels,
    require_samples,
    resolve_data_path,
    train_loader,
)
from experiments.engine.data_notes import data_notes
from experiments.runtime import Runtime
from experiments.tasks import Task
from pipeline.batch import Batch
from pipeline.dataset import Dataset
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.plan import has_boxes
from pipeline.subset import Subset, drawn_rows


class RunData:
    """What a run reads. Building it checks everything about the data that can be checked before the first step.

    Args:
        config: of the run.
        runtime: of this process.

    Attributes:
        config: of the run, with the number of classes that the data has.
        notes: what is odd about the data, for the log.
        scored_train_set: the training samples that each evaluation scores beside validation, None for none.

    Raises:
        ValueError: data, labels, batch size or schedule that do not fit; nothing has been written then, except a
            synthetic data set.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._runtime = runtime
        self.splits = open_splits(resolve_data_path(config, runtime), config.data)
        self.train_set, self.val_set = self.splits.train, self.splits.val
        self.fingerprint = self.splits.fingerprint
        self.class_names = class_names(config, self.train_set)
        self.config = config = config.with_num_classes(len(self.class_names))
        self.task: Task = task_of(config, self.class_names, self.val_set)
        self.subset = class_subset(config, self.val_set)
        require_samples(config, self.train_set, self.val_set)
        require_labels(config, self.train_set)
        require_labelled_boxes(config, self.train_set)
        self.passes = passes_per_step(config, runtime.world_size)
        self.total_steps = config.train.total_steps(len(self.train_set.samples))
        self.loader = self._train_loader()
        self.notes = data_notes(config, self.class_names, self.train_set, self.val_set)
        self.scored_train_set = self._scored_train_set()
        self.scoring_loader(self.val_set)  # a loader that cannot be fails here, not after the training

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield the batches of this rank from a step on, without end; `passes` of them are a step."""
        config = self.config
        if config.debug.synthetic_input:
            clips = clips_per_rank(config, self._runtime.world_size) // self.passes
            return repeated(random_batch(config, self._runtime, clips))
        if config.debug.overfit_one_batch:
            first = self.loader.batches()
            batch = next(first).clone()
            first.close()
            return repeated(batch)
        return self.loader.batches(step * self.passes)

    def further_batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield the same batches as `batches`, from a loader of their own whose counts nothing reads."""
        return self._train_loader().batches(step * self.passes)

    def scoring_loader(self, dataset: Dataset) -> EvalLoader:
        """Return the loader that scores the validation split, or the share of the training split."""
        return eval_loader(self.config, dataset, self._runtime)

    @property
    def scored_text(self) -> str:
        """What of the training split is scored, the same on ranks that score the same."""
        return "none" if self.scored_train_set is None else self.scored_train_set.fingerprint

    def _scored_train_set(self) -> Dataset | None:
        """Draw the training samples that are scored as validation is; None where there are none to score so."""
        config, train = self.config, self.train_set
        total = len(train.samples)
        count = min(config.eval.train_samples, total, len(self.val_set.samples))
        if count == 0:
            return None
        drawn = train if count == total else Subset(train, drawn_rows(total, count, config.train.seed))
        if config.train.task == "detection" and not has_boxes(drawn, labelled=config.views.boxes == "ground_truth"):
            return None  # the boxes that validation scores are a detector's: such a score would be of another kind
        return drawn

    def epoch(self, step: int) -> float:
        """Return how often the training split has been seen after a number of steps."""
        return step * self.config.train.clips_per_step / len(self.train_set.samples)

    def _train_loader(self) -> TrainLoader:
        return train_loader(self.config, self.train_set, self._runtime, self.total_steps)
