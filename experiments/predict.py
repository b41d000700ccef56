"""Name what video files show: python -m experiments.predict TARGET FILE_OR_FOLDER [...] [section.key=value ...].

    python -m experiments.predict runs/mine some.mp4
    python -m experiments.predict runs/mine my_videos --json found.json --csv found.csv --pictures pictures
    python -m experiments.predict runs/mine film.mkv --every 2 --csv film.csv --video annotated
    python -m experiments.predict runs/ava street.mp4 --boxes persons.csv --video annotated

TARGET is a run folder, a checkpoint folder, a configuration file or a folder of experiments.export (weights or
program). A folder of videos is searched below as well. A file that cannot be used is named, the others are scored, and
the exit code is 2.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser, heavy_imports
from experiments.engine.target import check_target, unfinished_note
from experiments.records.progress import LiveLine

if TYPE_CHECKING:
    from argparse import Namespace

    from experiments.engine.predictor import Predictor
    from experiments.records.predictions import Prediction

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=.*", re.DOTALL)


@dataclass(frozen=True)
class Wanted:
    """A video file, and the name without suffix that what is drawn of it gets."""

    path: Path
    name: str


def videos_of(paths: Sequence[Path]) -> tuple[list[Wanted], list[str]]:
    """Return the files that are named, and those below the folders that are named.

    Args:
        paths: files and folders.

    Returns:
        each file once, folders in the order of their names; and sentences about what lies in folders and is no video.

    Raises:
        ValueError: a path that does not exist, or a folder without videos.
    """
    from pipeline.annotations.files import list_videos

    found: dict[Path, str] = {}
    notes: list[str] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"video ({path}) must be an existing file or folder; check the path")
            found.setdefault(path, path.stem)
            continue
        listing = list_videos(path)
        names = sorted([*listing.paths, *listing.unstorable])
        if not names:
            raise ValueError(f"folder ({path}) must hold at least one video; check the path")
        for name in names:
            found.setdefault(path / name, os.path.splitext(name)[0])
        notes += [f"{path / name}: not looked at: {reason}" for name, reason in listing.left_out]
        if listing.others:
            shown = ", ".join(listing.others[:3])
            more = ", ..." if len(listing.others) > 3 else ""
            notes.append(f"{path}: {len(listing.others)} files are no videos by their suffix: {shown}{more}")
    return [Wanted(path, name) for path, name in zip(found, _unlike(list(found.values())), strict=True)], notes


def _unlike(names: Sequence[str]) -> list[str]:
    """Return names that differ: the second `a` becomes `a-2`."""
    taken: set[str] = set()
    result = []
    for name in names:
        own, number = name, 1
        while own.casefold() in taken:
            number += 1
            own = f"{name}-{number}"
        taken.add(own.casefold())
        result.append(own)
    return result


def write_drawings(predictor: Predictor, found: Prediction, name: str, options: Namespace, num_threads: int) -> str:
    """Draw what is asked for of a scored file; returns what went wrong, empty where nothing did.

    Args:
        predictor: the model.
        found: scored.
        name: of the files, without suffix; may have folders.
        options: `pictures`, `video` and `attention`, folders or None.
        num_threads: of the encoder.
    """
    from experiments.records.prediction_picture import draw_prediction
    from experiments.records.prediction_video import write_annotated
    from pipeline.dataset import MediaError

    jobs: list[tuple[Path, Callable[[Path], None]]] = []
    if options.pictures:
        jobs.append((options.pictures / f"{name}.png", lambda path: draw_prediction(found, path)))
    if options.video:
        jobs.append((options.video / f"{name}.mp4", lambda path: write_annotated(found, path, num_threads)))
    if options.attention:
        from experiments.engine.attention import draw_attention_of

        file = found.file
        assert file is not None, "it is scored"
        place = options.attention / f"{name}.png"
        jobs.append((place, lambda path: draw_attention_of(predictor, path, file, found.path.name)))
    for path, write in jobs:
        if path.exists() and path.samefile(found.path):
            return f"{path} must not be the video itself; choose another folder"
        try:
            write(path)
        except MediaError as error:
            return f"{path} was not written: {str(error).removeprefix(f'{found.path.absolute()}: ')}"
    return ""


def predict(predictor: Predictor, wanted: Sequence[Wanted], options: Namespace) -> int:
    """Score files, write and print what is asked for; returns how many had a problem."""
    from experiments.records.boxes_file import read_boxes
    from experiments.records.prediction_files import CsvPredictions, JsonPredictions, lines_of

    boxes = read_boxes(options.boxes) if options.boxes else None
    header = {
        "weights": predictor.scorer.origin, "step": predictor.scorer.step, "task": predictor.config.train.task,
        "every_s": options.every, "views": vars(predictor.config.views), "classes": list(predictor.class_names),
    }  # fmt: skip
    failed, line = 0, LiveLine("looking at the files")
    threads = predictor.config.data.num_threads
    with ExitStack() as stack:
        stack.callback(line.close)

        def show(done: int, total: int) -> None:
            line.say(f"{done} of {total} clips, {100 * done // max(1, total)} %")

        found = predictor.predict([item.path for item in wanted], every_s=options.every, boxes=boxes, progress=show)
        stack.callback(found.close)
        writers: list[JsonPredictions | CsvPredictions] = []
        if options.json:
            writers.append(stack.enter_context(JsonPredictions(options.json, header, options.top)))
        if options.csv:
            writers.append(stack.enter_context(CsvPredictions(options.csv, options.top)))
        for item, prediction in zip(wanted, found, strict=True):
            for writer in writers:
                writer.add(prediction)
            lines = lines_of(prediction, options.top, over_time=options.every is not None)
            trouble = write_drawings(predictor, prediction, item.name, options, threads) if prediction.is_scored else ""
            lines += [f"  {trouble}"] if trouble else []
            failed += bool(prediction.problem or trouble)
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
    return failed


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options; `files` and `overrides` apart."""
    parser = Parser.of_command("predict", __doc__)
    parser.add_argument("target", type=Path, metavar="TARGET", help="run, checkpoint, export or configuration file")
    parser.add_argument("files", nargs="+", metavar="FILE", help="video files, folders of them, section.key=value")
    parser.add_argument("--top", type=int, default=5, help="classes to name (default: 5)")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="score a clip of every so many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the classes of every file and moment as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as CSV")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw frames, spectrogram and scores of each file")
    parser.add_argument("--video", type=Path, metavar="DIR", help="write a copy of each file with the classes drawn")
    parser.add_argument("--attention", type=Path, metavar="DIR", help="draw where AV Nonlocal looks when it hears")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="persons' boxes for an AVA model, as AVA's CSV")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default: the run's)")
    parser.add_argument("--batch", type=int, metavar="N", help="views at a time (default: eval.clips_per_batch)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which one of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="a setting that differs"
    )
    options = parser.parse_intermixed_args(list(arguments))
    options.overrides = [*options.set, *(f for f in options.files if _OVERRIDE.fullmatch(f) and not Path(f).exists())]
    options.files = [Path(f) for f in options.files if f not in options.overrides]
    if options.device:
        options.overrides.append(f"runtime.device={options.device}")
    if options.batch is not None:
        options.overrides.append(f"eval.clips_per_batch={options.batch}")
    if not options.files:
        parser.error("a video file or a folder of videos must be given")
    if options.top < 1:
        raise ValueError(f"--top ({options.top}) must be at least 1")
    if options.every is not None and not options.every > 0:
        raise ValueError(f"--every ({options.every:g}) must be more than 0 seconds")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 2 if any file could not be scored, or not wholly."""
    options = parse(arguments)
    check_target(options.target, options.overrides)
    wanted, notes = videos_of(options.files)
    with heavy_imports():
        from experiments.engine.predictor import Predictor
        from experiments.records.prediction_files import check_output
        from experiments.runtime import set_up_logging

    for path, option in ((options.json, "--json"), (options.csv, "--csv")):
        if path is not None:
            check_output(path, option)
    for name in ("pictures", "video", "attention"):
        if getattr(options, name) is not None:
            check_output(getattr(options, name), f"--{name}", folder=True)
    predictor = Predictor.open(options.target, checkpoint=options.checkpoint, overrides=options.overrides)
    if predictor.runtime.world_size > 1:
        raise ValueError(
            f"world size ({predictor.runtime.world_size}) must be 1 for predict; start it without torchrun"
        )
    if options.attention:
        from experiments.engine.attention import attending_stages

        attending_stages(predictor.scorer.model)
    set_up_logging(predictor.runtime)
    notes = [*filter(None, [unfinished_note(options.target)]), *notes]
    sys.stderr.write("".join(f"{note}\n" for note in notes))
    failed = predict(predictor, wanted, options)
    if failed and len(wanted) > 1:
        sys.stderr.write(f"{failed} of {len(wanted)} files had a problem, named above\n")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
