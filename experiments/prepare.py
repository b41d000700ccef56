"""Make a store from media and official annotation files, or verify one: python -m experiments.prepare DATASET | verify.

    python -m experiments.prepare folder --videos my_videos --out data/mine     # own videos: <class>/<file>
    python -m experiments.prepare kinetics400 --annotations k400/annotations --videos k400 --out data/kinetics400
    python -m experiments.prepare verify data/mine

The options: python -m experiments.prepare folder --help. An interrupted command goes on when it is given again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.cli.parser import EXIT_USER_ERROR, Parser, heed_interrupts
from experiments.records.progress import LOG_INTERVAL_S, format_duration
from pipeline.annotations import READERS, options_of, read
from pipeline.ingest.item import DEFAULT_QUALITY, StoreShape, TranscodeSettings
from pipeline.ingest.report import IngestReport, class_of, reason_of
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.ingest.run import Progress as FileDone
from pipeline.ingest.target import check_free, work_folder
from pipeline.store.format import CODECS
from pipeline.store.verify import verify_store

log = logging.getLogger("prepare")
EXIT_PROBLEMS, EXIT_USAGE, EXIT_INTERRUPTED = 1, EXIT_USER_ERROR, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: default sys.argv[1:].

    Returns:
        The exit code: 0, 1 (problems found), 2 (wrong use), 130 (interrupted).
    """
    heed_interrupts()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return _verify(options.store) if options.command == "verify" else _prepare(options)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        log.error("interrupted; finished files are kept, the same command goes on from here")
        return EXIT_INTERRUPTED


def _parser() -> Parser:
    parser = Parser.of_command("prepare", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="DATASET | verify")
    verify = commands.add_parser("verify", help="read a whole store and name every byte that changed")
    verify.add_argument("store", type=Path)
    for name in READERS:
        known = ", ".join(f"{key}: {kind}" for key, kind in options_of(name).items()) or "none"
        required = name != "folder"
        text = (
            f"a store of {name} from its official files" if required else "a store of your own videos, <class>/<file>"
        )
        command = commands.add_parser(
            name, help=text, description=f"Make {text}.", epilog=f"options of this reader (--option): {known}"
        )
        command.add_argument("--annotations", type=Path, required=required, help="official files, a folder or one file")
        _add_options(command)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    settings, shape, run = TranscodeSettings(), StoreShape(), IngestOptions()
    usual = ", ".join(f"{codec}: {quality}" for codec, quality in DEFAULT_QUALITY.items())
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of the videos")
    add("--out", type=Path, required=True, help="store to make")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the reader")
    codec = "mjpeg: large, quickest to read (default: %(default)s)"
    add("--codec", choices=CODECS, default=settings.codec, help=codec)
    side = "scale down to it, never up (default: %(default)s)"
    add("--short-side", type=int, default=settings.short_side_px, metavar="PX", help=side)
    add("--gop", type=int, default=None, metavar="FRAMES", help="frames a fragment: 1 to 16, default 12; mjpeg: 1")
    add("--quality", type=int, default=None, metavar="CRF", help=f"encoder's rate factor, default {usual}")
    add("--no-fastdecode", action="store_true", help="h264 with CABAC and deblocking: smaller, dearer to decode")
    add("--max-fps", default=None, metavar="FPS", help="reduce faster videos to it, e.g. 30 or 30000/1001")
    short = "shorter videos are reported (default: %(default)s)"
    add("--clip-seconds", type=float, default=settings.clip_s, help=short)
    add("--encode-always", action="store_true", help="encode also streams that already have the store's form")
    windows = "windows on long videos, 0 = none (default: %(default)g)"
    add("--chunk-seconds", type=float, default=shape.chunk_s, help=windows)
    overlap = "overlap of these windows (default: %(default)g)"
    add("--overlap-seconds", type=float, default=shape.overlap_s, help=overlap)
    add("--shard-mib", type=int, default=shape.shard_bytes >> 20, help="most of a shard (default: %(default)s)")
    add("--workers", type=int, default=run.workers, help="processes, 0 = one per core (default: %(default)s)")
    memory = "address space of each process (default: %(default)g)"
    add("--memory-gib", type=float, default=run.memory_gib, help=memory)
    deadline = "per file, plus 10 s per MiB of it (default: %(default)g)"
    add("--deadline-seconds", type=float, default=run.deadline_s, help=deadline)
    add("--retry-refused", action="store_true", help="try the refused files of an interrupted run again")
    add("--overwrite", action="store_true", help="replace a store that is there")


def _prepare(options: argparse.Namespace) -> int:
    settings, shape, run = _checked(options)  # before annotations are read: that can take minutes
    work = work_folder(options.out)
    # What an interrupted run left decides whether a store may be replaced: `ingest` looks at that when it begins.
    check_free(options.out, work, overwrite=options.overwrite or work.exists())
    given = dict(item.partition("=")[::2] for item in options.option)
    annotations = read(options.command, options.annotations, options.videos, given)
    console = Console(stderr=True, soft_wrap=True)  # lines are to be found and copied: no breaks in them
    for line in annotations.report.lines():
        console.print(line, markup=False, highlight=False)
    began = time.monotonic()
    with Display(console) as display:
        report = ingest(annotations, options.videos, options.out, settings, shape, run, display.show)
    _print(console, report, options.out, time.monotonic() - began)
    return 0


def _checked(options: argparse.Namespace) -> tuple[TranscodeSettings, StoreShape, IngestOptions]:
    settings = TranscodeSettings(
        codec=options.codec,
        gop=options.gop,
        short_side_px=options.short_side,
        quality=options.quality,
        fastdecode=not options.no_fastdecode,
        max_fps=options.max_fps,
        clip_s=options.clip_seconds,
        copy_fit_streams=not options.encode_always,
    )
    run = IngestOptions(
        workers=options.workers,
        memory_gib=options.memory_gib,
        deadline_s=options.deadline_seconds,
        retry_refused=options.retry_refused,
    )
    shape = StoreShape(
        shard_bytes=options.shard_mib << 20,
        chunk_s=options.chunk_seconds,
        overlap_s=options.overlap_seconds,
        overwrite=options.overwrite,
    )
    return settings, shape, run


class Display:
    """A progress bar with rate and remaining time; refused and repaired files are named as they come.

    Where there is no terminal a line a minute stands in for the bar.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("transcode"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} files/s, {task.fields[speed]:.0f} frames/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("transcode", total=None, rate=0.0, speed=0.0)
        self._began, self._frames, self._fresh = time.monotonic(), 0, 0
        self._next_line_s = LOG_INTERVAL_S

    def show(self, state: FileDone) -> None:
        """Show the state after a file.

        Args:
            state: of the ingest.
        """
        self._frames += state.item.decoded_frames
        self._fresh += 1
        seconds = max(time.monotonic() - self._began, 1e-6)
        if self._fresh == 1 and state.resumed:
            self._bar.console.print(f"{state.resumed:,} of {state.total:,} files were done by an earlier run")
        if class_of(state.item) in ("refused", "repaired"):
            text = f"{class_of(state.item)}: {state.video}: {reason_of(state.item)}"
            self._bar.console.print(text, markup=False, highlight=False)
        self._bar.update(
            self._task,
            completed=state.done,
            total=state.total,
            rate=self._fresh / seconds,
            speed=self._frames / seconds,
        )
        if not self._bar.console.is_terminal and seconds >= self._next_line_s:
            self._next_line_s = seconds + LOG_INTERVAL_S
            left = format_duration((state.total - state.done) * seconds / self._fresh)
            text = f"{state.done:,} of {state.total:,} files, {self._fresh / seconds:.2f} files/s, left {left}"
            self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _print(console: Console, report: IngestReport, out: Path, seconds: float) -> None:
    for line in report.lines():
        console.print(line, markup=False, highlight=False)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    text = f"{out}: {size / 2**20:.1f} MiB in {seconds:.1f} s; report in {out.with_name(f'{out.name}.report.json')}"
    console.print(text, markup=False, highlight=False)


def _verify(store: Path) -> int:
    if not store.is_dir():
        found = "a file" if store.exists() else "missing"
        raise ValueError(f"store ({store}, {found}) must be a folder; name the one that was given to prepare as --out")
    problems = verify_store(store)
    for problem in problems:
        log.error("%s", problem)
    if problems:
        log.error("%d %s in %s", len(problems), "problem" if len(problems) == 1 else "problems", store)
        return EXIT_PROBLEMS
    log.info("%s: every byte is as it was written", store)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
