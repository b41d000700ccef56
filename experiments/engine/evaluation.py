"""Score a split with a checkpoint, and write what was found: the work of `experiments.evaluate`."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from experiments.cli.files import read_json_file
from experiments.config import Config, config_digest
from experiments.engine.boxes import task_of
from experiments.engine.data import (
    Splits,
    class_names,
    class_subset,
    eval_loader,
    require_same_classes,
    resolve_data_path,
    split_of,
)
from experiments.engine.graph_rules import forward_capturer
from experiments.engine.precision import autocast
from experiments.engine.pretext import evaluate_pretext
from experiments.engine.robustness import Heard, Row, require_audio, robustness_rows, table_lines
from experiments.engine.scoring import evaluate
from experiments.engine.trained_model import load_model
from experiments.records.checkpoint import Checkpoint
from experiments.records.detections import check_detections_file, write_detections
from experiments.records.plots import draw_confusion, draw_per_class
from experiments.records.progress import BatchProgress, LiveLine
from experiments.records.provenance import versions
from experiments.records.reporting import result_lines, write_table
from experiments.records.robustness_plot import draw_robustness
from experiments.records.run_folder import make_folder
from experiments.records.score_files import check_score_path, score_file, write_scores
from experiments.records.sealed import strict_json
from experiments.runtime import Runtime, broadcast_bytes
from experiments.tasks import Report
from pipeline.config import ViewConfig
from pipeline.dataset import Dataset
from pipeline.folder.dataset import PlainFolder
from pipeline.ingest.target import unwritable_parent
from pipeline.open import limits_of, open_source
from pipeline.store.durable import beside, put_folder, remove_folder, write_file
from pipeline.store.reader import Store

log = logging.getLogger(__name__)

REPORT_FILES = (
    "report.json", "per_class.csv", "confusion.png", "per_class.png", "robustness.json", "robustness.png",
)  # fmt: skip


class OutputError(ValueError):
    """A folder that a report must not replace."""


def share_checkpoint(checkpoint: Checkpoint, runtime: Runtime) -> Checkpoint:
    """Return the checkpoint as rank 0 has it.

    Args:
        checkpoint: this rank's; only its state may differ.
        runtime: this process.
    """
    state = broadcast_bytes(runtime, checkpoint.state if runtime.is_main else None)
    assert state is not None
    return dataclasses.replace(checkpoint, state=state)


def evaluate_checkpoint(
    config: Config, checkpoint: Checkpoint, runtime: Runtime, dataset: Dataset, heard: Heard | None = None
) -> Report:
    """Score one split with one checkpoint.

    Args:
        config: of the run, with the views to score.
        checkpoint: verified.
        runtime: this process.
        dataset: the split.
        heard: what its clips sound like; None: as they do.

    Returns:
        The report, the same on every rank.

    Raises:
        DataSetupError: data with other classes than the checkpoint's.
    """
    trained = checkpoint.load().get("class_names", ())
    if trained:  # what they are says more than how many they are
        names = class_names(config.with_num_classes(0, always=True), dataset)
        require_same_classes(config, names, trained, str(checkpoint.path))
    names = class_names(config, dataset)
    task = task_of(config, names, dataset)
    model = load_model(config, checkpoint, runtime.device)
    if config.train.task == "self_supervision":
        precise = autocast(runtime.device, config.runtime.precision)
        found = evaluate_pretext(model, config, dataset, runtime, precise)
        assert found is not None  # nobody asked to stop
        return found
    loader = eval_loader(config, dataset, runtime, heard.pretext if heard is not None else None)
    accumulator = task.accumulator(len(dataset.samples), loader.plan.views_per_sample)
    precision = autocast(runtime.device, config.runtime.precision)
    subset, graphs = class_subset(config, dataset), forward_capturer(config, runtime)
    silence = config.model.drops_silence
    what = "evaluating" if heard is None else f"evaluating, sound {heard.name}"
    with closing(LiveLine(what, visible=runtime.is_main)) as line:
        report = evaluate(
            model, accumulator, loader, runtime, precision, subset=subset, graphs=graphs, drop_silence=silence,
            change=heard.change if heard is not None else None,
            progress=BatchProgress(what, line, visible=runtime.is_main),
        )  # fmt: skip
    assert report is not None  # nobody asked to stop
    if heard is not None:
        heard.gather(runtime)
    return report


def is_own_data(config: Config, checkpoint: Checkpoint, source: Store | PlainFolder) -> bool:
    """Return whether the data are those that the checkpoint was trained and validated with.

    Args:
        config: names the two splits.
        checkpoint: verified.
        source: the data.
    """
    data = config.data
    if not {data.train_split, data.val_split} <= set(source.splits):
        return False
    splits = Splits(source.split(data.train_split), source.split(data.val_split))
    return splits.fingerprint == checkpoint.load().get("data_fingerprint")


def report_folder(
    checkpoint: Checkpoint, split: str, views: ViewConfig, class_subset: str = "", foreign: str = ""
) -> Path:
    """Return where a report goes by default: evaluations/<split-step-views> in the run folder of the checkpoint.

    Args:
        checkpoint: the scored one.
        split: the scored split.
        views: clips and crops.
        class_subset: `eval.class_subset`.
        foreign: fingerprint of data that is not the run's, which joins the name.
    """
    name = f"{split}-step{checkpoint.step}-{views.num_clips}x{views.num_crops}x{views.crop_size_px}px"
    if views.clip_rule != ViewConfig.clip_rule:
        name += f"-{views.clip_rule}"
    if views.boxes != ViewConfig.boxes:
        name += f"-{views.boxes}"
    if class_subset:
        name += f"-{re.sub(r'[^A-Za-z0-9._-]', '_', class_subset)}"
    if foreign:
        name += f"-data-{foreign[:8]}"
    folder = checkpoint.path.resolve().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "evaluations" / name


def check_output(folder: Path, fingerprint: str) -> None:
    """Check that a report can be written to `folder`: absent, empty or an earlier report about the same data.

    Args:
        folder: of the report.
        fingerprint: of the split to score.

    Raises:
        OutputError: naming what it holds.
    """
    if parent := unwritable_parent(folder):
        raise OutputError(
            f"report folder ({folder}) must lie in a writable folder, {parent} is not; choose another --output"
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"report folder ({folder}) must be a folder, not a file; choose another --output")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in REPORT_FILES)
    if others:
        raise OutputError(
            f"report folder ({folder}) must be absent, empty or an earlier report, but holds {', '.join(others[:5])}; "
            "choose another --output"
        )
    try:
        before = read_json_file(folder / REPORT_FILES[0], 1 << 28)
        found = str(before.get("data_fingerprint", "unknown"))
    except (OSError, ValueError, AttributeError):
        return  # no report: nothing is lost
    if found != fingerprint:
        raise OutputError(
            f"report folder ({folder}) must not hold a report about other data (fingerprint {found[:16]}, now "
            f"{fingerprint[:16]}); choose another --output, or remove that report"
        )


def run_name(checkpoint: str) -> str:
    """Return the name of the run that a checkpoint belongs to: its folder's."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent.name if folder.name == "checkpoints" else folder.name


def write_report(report: Report, folder: Path, header: dict[str, object], rows: Sequence[Row] = ()) -> None:
    """Write report.json, per_class.csv and a picture into a folder that appears only when it is whole.

    Args:
        report: of the evaluation.
        folder: absent, or an earlier report, which is replaced.
        header: what report.json says beside the results.
        rows: of what was heard, where that was asked for.
    """
    temporary = beside(folder, "partial")
    remove_folder(temporary)
    make_folder(temporary, f"report folder ({folder})", "choose another --output")
    facts = {**header, "metrics": report.metrics, "samples": report.counts, "notes": report.notes}
    write_file(temporary / "report.json", strict_json(facts))
    write_table(report, temporary / "per_class.csv")
    title = f"{run_name(str(header.get('checkpoint', '')))}, {header.get('split', '')}, step {header.get('step', '')}"
    if report.confusion is not None:
        draw_confusion(report.confusion, report.class_names, temporary / "confusion.png", title)
    if report.entries is not None:
        draw_per_class(report, temporary / "per_class.png", title)
    if rows:
        write_file(temporary / "robustness.json", strict_json({**header, "sounds": [vars(row) for row in rows]}))
        values = [(row.sound, row.metrics[report.primary]) for row in rows]
        draw_robustness(values, report.primary, f"{title}: score by what is heard", temporary / "robustness.png")
    put_folder(temporary, folder)


def save_scores(report: Report, path: Path, config: Config, dataset: Dataset, header: dict[str, object]) -> str:
    """Write the scores of every sample, and return the sentence that says so.

    Args:
        report: of the evaluation.
        path: see `check_score_path`.
        config: of the run, with the views that were scored.
        dataset: the split.
        header: what the file says beside the scores.

    Raises:
        OutputError: a task that has no scores per sample.
    """
    if report.samples is None:
        raise OutputError(
            f"--scores ({path}) must be left out for train.task={config.train.task}: it scores no samples"
        )
    names = dataset.classes[config.data.label_set]
    facts = {**header, "task": config.train.task, "label_set": config.data.label_set}
    write_scores(path, score_file(report.samples, dataset.samples.ids, tuple(names), **facts))
    return f"scores of {len(report.samples.rows)} samples in {path}"


@dataclass(frozen=True)
class Outputs:
    """What an evaluation writes.

    Args:
        folder: for the report; None: below the run folder.
        detections: AVA's CSV of what was scored; None: not written.
        scores: file of the scores of every sample; None: not written.
        robustness: also score with the sound muted, of other videos and shifted.
    """

    folder: Path | None = None
    detections: Path | None = None
    scores: Path | None = None
    robustness: bool = False


def score_split(config: Config, checkpoint: Checkpoint, runtime: Runtime, split: str, outputs: Outputs) -> list[str]:
    """Score a split and write the report.

    Args:
        config: of the run, with the views to score.
        checkpoint: verified; rank 0's is used on all ranks.
        runtime: this process.
        split: its name; empty: data.val_split.
        outputs: what is written.

    Returns:
        Lines to print; none on other ranks than 0.

    Raises:
        ValueError: data that do not fit the checkpoint, files that cannot be written.
    """
    if outputs.robustness:
        require_audio(config)
    key, split = ("--split", split) if split else ("data.val_split", config.data.val_split)
    path, data = resolve_data_path(config, runtime), config.data
    source = open_source(path, num_threads=data.num_threads, limits=limits_of(data))
    dataset = split_of(source, split, key)
    checkpoint = share_checkpoint(checkpoint, runtime)
    foreign = "" if is_own_data(config, checkpoint, source) else dataset.fingerprint
    usual = report_folder(checkpoint, split, config.views, config.eval.class_subset, foreign)
    folder = outputs.folder.resolve() if outputs.folder else usual
    if runtime.is_main:  # others may be on machines without that folder
        check_output(folder, dataset.fingerprint)
        if outputs.detections:
            check_detections_file(outputs.detections, config, dataset)
        if outputs.scores:
            check_score_path(outputs.scores, dataset.fingerprint)
    report = evaluate_checkpoint(config, checkpoint, runtime, dataset)
    rows: list[Row] = []
    if outputs.robustness:
        rows = robustness_rows(report, lambda heard: evaluate_checkpoint(config, checkpoint, runtime, dataset, heard))
    if not runtime.is_main:
        return []
    header = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "split": split,
              "data_path": config.data.path, "data_fingerprint": dataset.fingerprint,
              "views": dataclasses.asdict(config.views), "class_subset": config.eval.class_subset,
              "config_digest": config_digest(config), "versions": versions(config.model.backend)}  # fmt: skip
    write_report(report, folder, header, rows)
    lines = [*result_lines(report), *(table_lines(rows, report.primary) if rows else ()), f"written to {folder}"]
    if outputs.detections:
        lines.append(f"{write_detections(report, outputs.detections)} detections in {outputs.detections}")
    if outputs.scores:
        lines.append(save_scores(report, outputs.scores, config, dataset, header))
    return lines
