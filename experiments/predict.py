"""Name what video files show: python -m experiments.predict RUN FILE [FILE ...] [--top 5] [--set section.key=value]."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser
from experiments.config import Config
from experiments.engine.data import class_subset, eval_loader, resolve_data_path
from experiments.engine.precision import autocast
from experiments.engine.scoring import ClassSubset, only_classes
from experiments.engine.trained_model import load_model, load_target
from experiments.records.checkpoint import BEST, Checkpoint
from experiments.runtime import Runtime, init_runtime, set_up_logging
from experiments.tasks import SampleScores, make_task
from experiments.tasks.base import ScoreSums
from pipeline.folder.dataset import FolderError, PlainFolder
from pipeline.open import describe_confined, limits_of, open_source

_NOT_FINITE = (
    "the model's scores must be finite and are not; use another checkpoint (--checkpoint last), or --set "
    "runtime.precision=fp32"
)


@dataclass(frozen=True)
class Prediction:
    """Result for one file.

    Args:
        path: the file.
        best: classes with their scores in 0..1, best first; empty where there is a problem.
        views: how many views were scored.
        has_audio: whether any of them had sound.
        problem: why there is no score; empty if there is one.
    """

    path: Path
    best: tuple[tuple[str, float], ...] = ()
    views: int = 0
    has_audio: bool = False
    problem: str = ""


def predict_files(
    config: Config, checkpoint: Checkpoint, runtime: Runtime, files: Sequence[Path], top: int
) -> list[Prediction]:
    """Score video files over the views of `config.views`, as an evaluation of the run's task would.

    Args:
        config: of the run.
        checkpoint: verified.
        runtime: this process.
        files: video files of any format.
        top: >= 1.

    Returns:
        One prediction a file, in the order given.

    Raises:
        ValueError: if a file does not exist.
    """
    if config.model.head == "detection":
        raise ValueError(
            f"model.head ({config.model.head}) must be softmax or sigmoid for predict: a file has no boxes of persons; "
            "experiments.evaluate RUN --detections FILE writes what a detector says of prepared key frames"
        )
    for file in files:
        if file.is_dir():
            raise ValueError(f"video ({file}) must be a file, not a folder; name the files in it, as {file}/*.mp4")
        if not file.is_file():
            raise ValueError(f"video ({file}) must be an existing file; check the path")
    names = tuple(checkpoint.load().get("class_names", ()))
    model = load_model(config, checkpoint, runtime.device)
    names = names or tuple(f"class {i}" for i in range(config.model.num_classes))
    subset = subset_of_run(config, runtime)
    links = {f"{i:06d}{file.suffix.lower()}": file for i, file in enumerate(files)}
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, label_kind="single", max_quarantined_share=1.0)
    )
    with tempfile.TemporaryDirectory(prefix="avsf-predict-") as folder:
        for link, file in links.items():
            (Path(folder) / link).symlink_to(file.resolve())
        try:
            look = describe_confined(config.data.num_threads, limits_of(config.data))
            source = PlainFolder.open(folder, describe_files=look)
        except FolderError as error:  # none can be used, and the text names the links
            reasons = dict(error.refused)
            return [Prediction(file, problem=reasons.get(link, str(error))) for link, file in links.items()]
        dataset = source.split("all")
        loader = eval_loader(config, dataset, runtime)
        reduction = make_task(config.train.task, names).reduction
        sums = ScoreSums(len(dataset.samples), len(names), loader.plan.views_per_sample, (), reduction)
        with torch.inference_mode(), autocast(runtime.device, config.runtime.precision), only_classes(model, subset):
            for batch in loader:
                sound = {"has_audio": batch.has_audio} if config.model.drops_silence else {}
                sums.add(model(batch.frames, batch.log_mel, **sound).scores, batch)
    problems = {**dict(source.refused), **dict(loader.quarantine)}
    found, shown = sums.samples(), min(top, len(names) if subset is None else sum(subset.allowed))
    places = {dataset.samples.id(row): place for place, row in enumerate(found.rows.tolist())}
    return [_prediction(link, file, places, problems, found, names, shown) for link, file in links.items()]


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


def _prediction(
    link: str, file: Path, places: dict[str, int], problems: dict[str, str], found: SampleScores,
    names: tuple[str, ...], top: int,
) -> Prediction:  # fmt: skip
    place = places.get(link)
    if place is None:
        problem = problems.get(link, "no frame could be read")
        return Prediction(file, problem=problem.removeprefix(f"{link}: "))
    scores, views = torch.from_numpy(found.scores[place]), int(found.views[place])
    if not scores.isfinite().all():
        return Prediction(file, problem=_NOT_FINITE)
    values, classes = scores.topk(top)
    best = tuple((names[c], v) for c, v in zip(classes.tolist(), values.tolist(), strict=True))
    return Prediction(file, best, views, int(found.silent[place]) < views)


def table(predictions: Sequence[Prediction]) -> list[str]:
    """Return the lines to print."""
    lines = []
    for item in predictions:
        if item.problem:
            lines.append(f"{item.path}: not scored: {item.problem}")
            continue
        lines.append(f"{item.path}: {item.views} views, {'with sound' if item.has_audio else 'without sound'}")
        width = max(len(name) for name, _ in item.best)
        lines += [f"  {name.ljust(width)}  {100 * value:6.2f} %" for name, value in item.best]
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 2 if any file could not be scored."""
    parser = Parser(prog="python -m experiments.predict", description="Name what video files show.")
    parser.add_argument("target", type=Path, help="run folder, checkpoint folder or configuration file")
    parser.add_argument("files", type=Path, nargs="+", help="video files")
    parser.add_argument("--top", type=int, default=5, help="classes to show (default: 5)")
    parser.add_argument("--checkpoint", choices=(BEST, "last"), default=BEST, help="which one of a run (default: best)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="a setting that differs"
    )
    options = parser.parse_args(list(arguments))
    if options.top < 1:
        raise ValueError(f"--top ({options.top}) must be at least 1")
    config, checkpoint = load_target(options.target, options.checkpoint, options.set)
    runtime = init_runtime(config.runtime)
    if runtime.world_size > 1:
        raise ValueError(f"world size ({runtime.world_size}) must be 1 for predict; start it without torchrun")
    set_up_logging(runtime)
    predictions = predict_files(config, checkpoint, runtime, options.files, options.top)
    sys.stdout.write("\n".join(table(predictions)) + "\n")
    return 2 if any(item.problem for item in predictions) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
