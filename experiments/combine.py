"""Combine score files of `experiments.evaluate --scores`: python -m experiments.combine WHAT FILE ... .

ensemble: the mean of several models' scores. actions: EPIC's actions from a verb and a noun model. gain: one model
against another, class by class. subset: the same predictions on some classes. splits: the mean over several splits.
submission: EPIC's test splits as the challenge takes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.cli.command_line import run_command
from experiments.cli.files import near_path, read_regular
from experiments.cli.parser import Parser
from experiments.records.epic_submission import MEMBERS, submission, write_submission
from experiments.records.gain_report import (
    HIGHLIGHTED,
    class_values,
    draw_gains,
    gain_table,
    highlights,
    read_class_values,
)
from experiments.records.score_files import (
    ScoreFile,
    ScoreFileError,
    aligned,
    check_score_path,
    read_scores,
    require_same_answers,
    write_scores,
)
from experiments.tasks.combining import action_scores, class_gains, only_classes, weighted_mean
from experiments.tasks.metrics import IntArray, mean_average_precision, top_k_accuracy
from pipeline.ingest.target import unwritable_parent
from pipeline.store.durable import write_file

Lines = list[str]


def metrics_of(file: ScoreFile) -> dict[str, float]:
    """Return the metrics of a score file: top-1 and top-5, or mean AP; nan without labels."""
    if file.labels.ndim == 2:
        return {"mean_ap": mean_average_precision(file.scores, file.labels > 0.5)[0]}
    known, labels = file.labels >= 0, single_labels(file)
    return {f"top{k}": top_k_accuracy(file.scores[known], labels[known], k) for k in (1, 5)}


def single_labels(file: ScoreFile) -> IntArray:
    """Return class ids (V,) int64.

    Raises:
        ScoreFileError: a file with any number of labels a sample.
    """
    if file.labels.ndim != 1:
        raise ScoreFileError(
            f"score file ({file.name}) must hold one label a sample here; it is of train.task={file.facts['task']}"
        )
    return file.labels.astype(np.int64)


def line(name: str, metrics: dict[str, float], samples: int) -> str:
    """Return a line of a result."""
    values = "  ".join(f"{key} {100 * value:.2f} %" for key, value in metrics.items())
    return f"{name}: {values}  ({samples} samples)"


def ensemble(options: argparse.Namespace) -> Lines:
    """Average the scores of several models on the same samples."""
    if options.out:
        check_score_path(options.out)
        if any(options.out.exists() and path.exists() and options.out.samefile(path) for path in options.files):
            raise ScoreFileError(
                f"--out ({options.out}) must not be one of the files that are combined; choose another"
            )
    files, note = aligned([read_scores(path) for path in options.files], common=options.common)
    require_same_answers(files)
    weights = options.weights or [1.0] * len(files)
    facts = {**files[0].facts, "ensemble": {"files": [f.name for f in files], "weights": list(weights)}}
    views = np.min([file.views for file in files], axis=0)
    silent = np.min([file.silent for file in files], axis=0)
    scores = weighted_mean([file.scores for file in files], weights)
    joined = dataclasses.replace(files[0], name="ensemble", scores=scores, views=views, silent=silent, facts=facts)
    lines = [line(file.name, metrics_of(file), len(file.ids)) for file in [*files, joined]]
    if options.out:
        write_scores(options.out, joined)
        lines.append(f"written to {options.out}")
    return [*lines, *([f"note: {note}"] if note else [])]


def actions(options: argparse.Namespace) -> Lines:
    """Score EPIC's verbs, nouns and actions."""
    (verb, noun), note = aligned([read_scores(options.verb), read_scores(options.noun)], common=options.common)
    for file, kind in ((verb, "verb"), (noun, "noun")):
        if file.facts["label_set"] != kind:
            raise ScoreFileError(
                f"score file ({file.name}) must be of data.label_set={kind}, not {file.facts['label_set']}; "
                "give the verb file, then the noun file"
            )
    verbs, nouns = single_labels(verb), single_labels(noun)
    known = (verbs >= 0) & (nouns >= 0)
    prior = None
    if options.prior:
        (one, other), _ = aligned([read_scores(path) for path in options.prior])
        prior = np.zeros((len(verb.class_names), len(noun.class_names)))
        np.add.at(prior, (single_labels(one), single_labels(other)), 1.0)
    found = action_scores(verb.scores[known], noun.scores[known], verbs[known], nouns[known], prior)
    lines = [line(f"{kind} ({file.name})", metrics_of(file), int((file.labels >= 0).sum()))
             for kind, file in (("verb", verb), ("noun", noun))]  # fmt: skip
    lines.append(line("action", {"top1": found.top1, "top5": found.top5}, int(known.sum())))
    lines.append(f"top5 of actions: of all pairs by P(verb) P(noun){' x prior' if options.prior else ''}; "
                 f"verb and noun each among its 5 best: {100 * found.both_top5:.2f} %")  # fmt: skip
    return [*lines, *([f"note: {note}"] if note else [])]


def gain(options: argparse.Namespace) -> Lines:
    """Compare two models class by class."""
    pair = (options.base, options.ours)
    if all(path.suffix == ".csv" for path in pair):
        base, ours = (read_class_values(path) for path in pair)
        note = ""
    else:
        files, note = aligned([read_scores(path) for path in pair], common=options.common)
        require_same_answers(files)
        base, ours = (class_values(file) for file in files)
    counts = {name: count for name, (count, _) in base.items()}
    if {name: count for name, (count, _) in ours.items() if name in counts} != counts:
        raise ScoreFileError(
            f"{options.base} and {options.ours} must be about the same classes and samples; evaluate the same split"
        )
    names = list(base)
    gains = class_gains(names, [base[n][0] for n in names], [base[n][1] for n in names], [ours[n][1] for n in names])
    if not gains:
        raise ScoreFileError(f"{options.base} and {options.ours} must have classes with samples, and have none")
    options.out.mkdir(parents=True, exist_ok=True)
    write_file(options.out / "gain.csv", gain_table(gains))
    draw_gains(gains, options.out / "gain.png", options.base.stem, options.ours.stem)
    absolute, relative = highlights(gains)
    mean = float(np.mean([row.gain for row in gains]))
    by_name = {row.name: row for row in gains}
    lines = [f"mean gain over {len(gains)} classes: {100 * mean:+.2f} points"]
    lines += [f"  {name}: {100 * by_name[name].gain:+.1f} points" for name in absolute]
    lines += [f"  {name}: x {by_name[name].ratio:.1f}" for name in relative]
    lines += [f"  {row.name}: {100 * row.gain:+.1f} points" for row in gains[: -HIGHLIGHTED - 1 : -1] if row.gain < 0]
    return [*lines, f"written to {options.out}", *([f"note: {note}"] if note else [])]


def subset(options: argparse.Namespace) -> Lines:
    """Score the samples of some classes with and without the other classes in the race."""
    file = read_scores(options.file)
    try:
        text = read_regular(options.classes, 1 << 20).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        hint = near_path(options.classes) if isinstance(error, FileNotFoundError) else ""
        raise ScoreFileError(
            f"class list ({options.classes}) must be a text file with a class name a line ({reason}); "
            f"{hint or 'correct the path'}"
        ) from None
    wanted = [name for name in text.splitlines() if name.strip()]
    strange = sorted(set(wanted) - set(file.class_names))
    if strange or not wanted:
        raise ScoreFileError(
            f"class list ({options.classes}) must name classes of {file.name}, one a line; "
            f"{len(strange)} are none{f', the first is {strange[0]!r}' if strange else ', it is empty'}"
        )
    labels, allowed = single_labels(file), np.isin(np.array(file.class_names), wanted)
    own, masked = only_classes(file.scores, labels, allowed)
    lines = [f"{len(wanted)} of {len(file.class_names)} classes"]
    for name, scores in (("against all classes", file.scores), ("only these can be predicted", masked)):
        metrics = {f"top{k}": top_k_accuracy(scores[own], labels[own], k) for k in (1, 5)}
        lines.append(line(name, metrics, int(own.sum())))
    return lines


def splits(options: argparse.Namespace) -> Lines:
    """Average the metrics over the splits of a data set (UCF101, HMDB51: three)."""
    files = [read_scores(path) for path in options.files]
    if len({file.class_names for file in files}) > 1:
        raise ScoreFileError("score files of several splits must have the same classes; give files of one data set")
    if len({(file.facts["split"], file.facts["data_fingerprint"]) for file in files}) < len(files):
        raise ScoreFileError("score files of several splits must each be of another split; one is there twice")
    found = [metrics_of(file) for file in files]
    mean = {key: float(np.mean([metrics[key] for metrics in found])) for key in found[0]}
    lines = [line(file.name, metrics, len(file.ids)) for file, metrics in zip(files, found, strict=True)]
    return [*lines, line(f"mean of {len(files)} splits", mean, sum(len(file.ids) for file in files))]


def submit(options: argparse.Namespace) -> Lines:
    """Write what the challenge's server takes."""
    members = MEMBERS[options.edition]
    if len(options.files) != 2 * len(members):
        raise ScoreFileError(
            f"files ({len(options.files)}) must be a verb and a noun file for each of {', '.join(members)}"
        )
    if options.out.suffix != ".zip" or unwritable_parent(options.out):
        raise ScoreFileError(f"--out ({options.out}) must be a .zip file in a writable folder; choose another place")
    files = [read_scores(path) for path in options.files]
    levels = tuple(options.supervision)
    pairs = zip(files[::2], files[1::2], strict=True)
    made = {
        name: submission(verb, noun, options.edition, levels) for name, (verb, noun) in zip(members, pairs, strict=True)
    }
    write_submission(options.out, made)
    counts = ", ".join(f"{name}: {len(content['results'])} segments" for name, content in made.items())
    return [f"{counts}; written to {options.out}"]


def arguments_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser.of_command("combine", __doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, text: str, *, common: bool = False) -> argparse.ArgumentParser:
        """Add one kind."""
        made = kinds.add_parser(name, help=text, description=text)
        if common:
            made.add_argument("--common", action="store_true", help="leave out samples that not all files have")
        return made

    one = add("ensemble", "mean of the scores of several models", common=True)
    one.add_argument("files", type=Path, nargs="+")
    one.add_argument("--weights", type=float, nargs="+", help="one a file (default: equal)")
    one.add_argument("--out", type=Path, help="score file to write")
    one = add("actions", "EPIC-Kitchens: verbs, nouns and actions", common=True)
    one.add_argument("verb", type=Path)
    one.add_argument("noun", type=Path)
    one.add_argument("--prior", type=Path, nargs=2, metavar=("VERB", "NOUN"),
                     help="score files of training: pairs are weighed by how often they come there")  # fmt: skip
    one = add("gain", "one model against another, class by class", common=True)
    one.add_argument("base", type=Path, help="score file, or per_class.csv of a report")
    one.add_argument("ours", type=Path)
    one.add_argument("--out", type=Path, required=True, help="folder for gain.csv and gain.png")
    one = add("subset", "the same predictions on some classes")
    one.add_argument("file", type=Path)
    one.add_argument("classes", type=Path, help="text file, one class name a line")
    one = add("splits", "mean over the splits of a data set")
    one.add_argument("files", type=Path, nargs="+")
    one = add("submission", "EPIC-Kitchens: archive for the challenge")
    one.add_argument(
        "files", type=Path, nargs="+", help="VERB NOUN of the seen, then of the unseen test split (100: of test)"
    )
    one.add_argument("--edition", choices=tuple(MEMBERS), default="55")
    one.add_argument("--supervision", type=int, nargs=3, default=[0, 0, 0], choices=range(6),
                     metavar=("PT", "TL", "TD"), help="EPIC-Kitchens-100: its three levels of supervision")  # fmt: skip
    one.add_argument("--out", type=Path, required=True, help="the .zip file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = arguments_parser().parse_args(list(arguments))
    work = {"ensemble": ensemble, "actions": actions, "gain": gain, "subset": subset, "splits": splits,
            "submission": submit}  # fmt: skip
    sys.stdout.write("\n".join(work[options.what](options)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
