"""This project's loader against those that people use today: `python -m benchmarks.loader --peers [--quick]`.

Every loader gives the same clips from the same videos (340x256, 10 s, H.264 with key frames every 250 and every 12
frames, about 450 kbit/s the former): 32 frames at stride 2 from a random start, scale jitter, crop 224, mirror,
normalised, and 80x128 log-mel, in batches of 8. Frames carry their number and the sound clicks: what every loader gives
is read back and checked before it is timed. Each runs in a process of its own, one after another, interleaved repeats;
medians count. Clips a CPU second (whole process tree) say more than clips a second on a machine with other work.

`make peers` installs the others; one that is not there is a row that says so. Rows go to --out after every run, so that
a comparison that is cut short leaves what it had, and a plot beside it at the end. --minutes bounds all of it: the arms
of the goals come first, repeats that do not fit are left out. --only decord,pytorchvideo --sources gop12 chooses.
"""

import argparse
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_timing import check_out
from benchmarks.peers.clips import GOPS, kbit_per_s, make_videos
from benchmarks.peers.measure import PROJECT, WAYS
from benchmarks.peers.runs import ORIGINALS, PYSLOWFAST, ROOT, SHORT, STORE, Arm, Run, Turns
from benchmarks.report import newest
from benchmarks.result_rows import RESULTS, given_arguments, provenance, put_rows, read_rows
from pipeline.frames.build import library_path, library_problem

TORCHCODEC = "torchcodec in threads, tuned"
SOURCES = {"store": STORE, f"gop{GOPS[0]}": ORIGINALS, f"gop{GOPS[1]}": SHORT}  # by what --sources calls them
LOADERS = dict(
    zip(
        ("pyslowfast", "pyav", "torchcodec-basic", "torchcodec", "threads", "spdl", "decord", "pytorchvideo"),
        WAYS,
        strict=True,
    )
) | {"project": PROJECT}  # by what --only calls them
QUICK_WAYS = (PYSLOWFAST, "PyAV + DataLoader, tuned", TORCHCODEC)
# What the project is held to: its arm, the arm it is compared with, the ratio of clips a CPU second it must reach.
GOALS = (
    ((PROJECT, STORE), (PYSLOWFAST, ORIGINALS), 6.0),
    ((PROJECT, STORE), (TORCHCODEC, SHORT), 1.8),
    ((PROJECT, ORIGINALS), (TORCHCODEC, ORIGINALS), 1.3),
    ((PROJECT, SHORT), (TORCHCODEC, SHORT), 1.3),
)


def make_store(folder: Path, videos: Path) -> Path:
    """Ingest the originals with the defaults of the command; returns the store."""
    out = folder / "store"
    if not out.exists():
        command = [sys.executable, "-m", "experiments.prepare", "folder", "--videos", str(videos), "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def arms_of(
    folder: Path, count: int, loaders: Sequence[str], sources: Sequence[str], scaling: Sequence[int]
) -> list[Arm]:
    """Make the videos and the store, and list what is compared, the arms of the goals first.

    Args:
        folder: of the material. count: videos. loaders: of `LOADERS`. sources: of `SOURCES`. scaling: numbers of the
            project's workers, on the store.
    """
    gops = [gop for gop in GOPS if f"gop{gop}" in sources or (gop == GOPS[0] and "store" in sources)]
    folders = make_videos(folder, count, gops)
    files = [(SOURCES[f"gop{gop}"], folders[gop]) for gop in gops if f"gop{gop}" in sources]
    arms = [Arm(LOADERS[loader], name, path) for loader in loaders for name, path in files]
    if "store" in sources and "project" in loaders:
        store = make_store(folder, folders[GOPS[0]])
        arms = [Arm(PROJECT, STORE, store), *arms]
        arms += [Arm(PROJECT, f"{STORE}, {number} workers", store, {"num_workers": number}) for number in scaling]
    first = [arm for goal in GOALS for arm in goal[:2]]
    places = {arm: place for place, arm in reversed(list(enumerate(first)))}
    return sorted(arms, key=lambda arm: places.get((arm.loader, arm.source), len(first)))


def chosen(text: str | None, names: Sequence[str], option: str) -> list[str]:
    """Names of a list with commas, in its order; all where there is no list.

    Raises:
        ValueError: a name that is none of `names`.
    """
    found = [name.strip() for name in text.split(",")] if text is not None else list(names)
    for name in found:
        if name not in names:
            raise ValueError(f"{option} ({name}) must be of {', '.join(names)}; commas between several")
    return found


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with the ratio that was measured, of clips a CPU second; None where an arm has no figure."""
    cpu = {(row["loader"], row["source"]): row.get("cpu_s_per_clip") for row in rows}
    found = []
    for ours, other, wanted in GOALS:
        mine, theirs = cpu.get(ours), cpu.get(other)
        ratio = round(theirs / mine, 2) if mine and theirs else None
        found.append({"ours": list(ours), "other": list(other), "at_least": wanted, "ratio": ratio})
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of clips a CPU second, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = sorted((row for row in rows if "failed" not in row), key=lambda row: -row["cpu_s_per_clip"])
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(good) + 1))
    colours = ["#1f6f8b" if row["loader"] == PROJECT else "#b8b8b8" for row in good]
    names = [f"{row['loader']} ({row['source']})" for row in good]
    bars = axes.barh(names, [1 / row["cpu_s_per_clip"] for row in good], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xlabel("clips a CPU second, whole process tree")
    axes.tick_params(axis="y", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: the arms of the goals, once")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"loaders: {', '.join(LOADERS)}")
    parser.add_argument("--sources", metavar="NAME[,NAME]", help=f"what they read: {', '.join(SOURCES)}")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it; no run is begun that ends later")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--clips", type=int, default=8, help="of a batch")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of every loader")
    parser.add_argument("--scaling", type=int, nargs="*", default=[], help="also so many workers of the project")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed, of one run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="of one run, all in all")
    parser.add_argument("--keep", type=Path, help="folder of the material; default: a temporary one")
    parser.add_argument("--out", type=Path, help=f"JSON file to add to, such as {RESULTS.name}/loader_peers.json")
    return parser


def tell(found: Sequence[dict[str, Any]]) -> None:
    """Print the goals."""
    for goal in found:
        ratio = "unmeasured" if goal["ratio"] is None else f"{goal['ratio']:.2f}x"
        sys.stdout.write(f"{' on '.join(goal['ours'])} over {' on '.join(goal['other'])}: {ratio}, "
                         f"wanted {goal['at_least']:g}x\n")  # fmt: skip


def compare(arms: Sequence[Arm], run: Run, options: argparse.Namespace, common: dict[str, Any], began: float) -> None:
    """Run the arms; after each run, its line goes to stdout and the rows of all to --out.

    Args:
        arms: of `arms_of`. run: how. options: of the command line. common: of each row. began: of the command.
    """
    turns = Turns(arms, run, 60 * options.minutes, began)

    def told(text: str) -> None:
        """Print a line, and write what there is."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if options.out is not None:
            rows = [*turns.rows, {"goals": goals(turns.rows)}]
            put_rows(options.out, [common | row for row in rows], common["run"])

    try:
        turns.go(told)
    finally:
        tell(goals(turns.rows))
        if options.out is not None and turns.rows:
            every = [row for row in read_rows(options.out) if "loader" in row]
            plot(list(newest(every, "loader", "source").values()), options.out.with_suffix(".png"))


def _checked(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The command line, its loaders and its sources; ends with a message where a value is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        for name in ("videos", "clips", "workers", "repeats", "seconds", "minutes"):
            if not getattr(options, name) > 0:  # nan is refused, too
                raise ValueError(f"--{name} ({getattr(options, name)}) must be greater than 0")
        quick = ",".join(name for name in LOADERS if LOADERS[name] in (PROJECT, *QUICK_WAYS))
        only = chosen(options.only or (quick if options.quick else None), list(LOADERS), "--only")
        return options, only, chosen(options.sources, list(SOURCES), "--sources")
    except ValueError as problem:
        parser.error(str(problem))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    given = given_arguments(arguments)
    options, only, sources = _checked(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs ends with it, and the goals are told
    quick = options.quick
    run = Run(options.clips, options.workers, 2.0 if quick else options.seconds, 1 if quick else options.repeats,
              options.limit_seconds)  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        began = time.monotonic()
        if missing := library_problem(library_path()):
            sys.stdout.write(f"warning: this project's rows are not its best: {missing}\n")
        sys.stdout.write(f"making the material that is not in {folder} yet ...\n")
        sys.stdout.flush()
        arms = arms_of(folder, 4 if quick else options.videos, only, sources, options.scaling)
        rates = {path.name: round(kbit_per_s(path)) for path in sorted(folder.glob("gop*"))}
        sys.stdout.write(f"material in {time.monotonic() - began:.0f} s, kbit/s: {rates}\n")
        common = {"benchmark": "loader peers", "run": f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
                  "settings": vars(run) | {"kbit_per_s": rates}}  # fmt: skip
        compare(arms, run, options, common | provenance("benchmarks.loader", "cpu", ["--peers", *given]), began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
