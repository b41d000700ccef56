"""Tables of README and docs out of benchmarks/results: `make bench-report` or `python -m benchmarks.report [--check]`.

A page holds a table between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. It is written from the rows of committed
result files and from nothing else; what has no row is "unmeasured". Of rows that measure the same thing on the same
kind of machine the newest counts. --check writes nothing and fails where a page differs.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result_rows import RESULTS, read_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md", "docs/decoders.md", "docs/kernels_cuda.md", "docs/dali.md", "docs/model.md", "docs/storage.md",
    "docs/scaling.md", "docs/pipeline.md",
)  # fmt: skip
REGION = re.compile(r"(<!-- bench:(?P<name>[a-z-]+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
UNMEASURED = "unmeasured"
OURS, PLAIN, PYSLOWFAST = "fused graph", "eager 4-D", "pyslowfast"
COMPILED = ("compile eager", "compile eager reduce-overhead", "compile fused", "compile fused reduce-overhead")
Row = dict[str, Any]


def all_rows(folder: Path = RESULTS) -> list[Row]:
    """Rows of every result file that holds rows, each with its file's name, oldest first."""
    found: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows = read_rows(path)
        except ValueError:
            continue  # a file of the older form
        found += [row | {"file": path.name} for row in rows if {"benchmark", "machine", "commit"} <= row.keys()]
    return sorted(found, key=lambda row: row.get("machine", {}).get("date", ""))


def newest(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    """The last row for each value of `keys` and kind of machine; a row without a figure never replaces one with it."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (hardware(row), *(row.get(name) for name in keys))
        if "failed" not in row or key not in found:
            found[key] = row
    return found


def hardware(row: Row) -> str:
    """GPU, or CPU, of a row."""
    machine = row.get("machine", {})
    return str(machine.get("gpu") or f"{machine.get('cpu', 'unknown')}, {machine.get('cpu_threads', '?')} threads")


def source(rows: Sequence[Row]) -> str:
    """Where the figures of a table come from: files, days, commits, versions, and the commands that made the rows.

    The whole command of a row, with its options, is in its file.
    """
    files = sorted({row["file"] for row in rows})
    days = sorted({row["machine"]["date"][:10] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    links = ", ".join(f"[{name}](benchmarks/results/{name})" for name in files)
    made = ", ".join(f"`{name}`" for name in sorted({module(row) for row in rows}))
    used = ", ".join(sorted({versions(row) for row in rows}))
    return f"{links}; {', '.join(days)}; commit {', '.join(commits)}; {used}; {made}"


def module(row: Row) -> str:
    """`python -m benchmarks.NAME` of a row's command."""
    return " ".join(str(row.get("command", UNMEASURED)).split()[:3])


def versions(row: Row) -> str:
    """Python, torch, CUDA and cuDNN of a row."""
    machine = row["machine"]
    names = {"python": "Python", "torch": "torch", "cuda": "CUDA", "cudnn": "cuDNN"}
    return " ".join(f"{name} {machine[key]}" for key, name in names.items() if machine.get(key))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


def step_table(rows: Sequence[Row], device: str) -> str:
    """The whole training step by model and batch: clips/s of ours and its opponents, audio kept."""
    kept = [row for row in rows if row["benchmark"] == "step" and row["device"] == device and row["audio"] != "dropped"]
    found = newest(kept, "variant", "clips", "pixels", "way")
    of_commit = newest(kept, "variant", "clips", "pixels", "way", "commit")
    cases = sorted({key[:4] for key in found}, key=lambda case: (case[0], case[1], case[2], case[3]))
    if not cases:
        return f"Training step on {'a GPU' if device == 'cuda' else 'a CPU'}: {UNMEASURED}."
    ours = OURS if device == "cuda" else "fused"
    head = ["machine", "model", "clips", "ours, clips/s", "over eager channels-last", "over PySlowFast's way",
            "over the best torch.compile", "TFLOP/s", "least time / time"]  # fmt: skip
    lines = []
    for case in cases:
        mine = found.get((*case, ours))
        measured = mine is not None and "ms" in mine

        def over(*ways: str, case: tuple[Any, ...] = case, mine: Row | None = mine) -> str:
            """Ours over the fastest of these at the same commit."""
            if mine is None or "ms" not in mine:
                return UNMEASURED
            others = [of_commit.get((*case, way, mine["commit"]), {}).get("ms") for way in ways]
            measured = [ms for ms in others if ms is not None]
            return f"{min(measured) / mine['ms']:.2f}x" if measured else UNMEASURED

        figures = [UNMEASURED] * 3
        if measured and mine is not None:
            share = f"{100 * mine['floor_ms'] / mine['ms']:.0f} %" if device == "cuda" else "-"
            figures = [f"{mine['clips_per_s']:.0f}", f"{mine['tflop_per_s']:.1f}", share]
        name = f"{case[1]}, {case[3]} px"
        lines.append([str(case[0]), name, str(case[2]), figures[0], over(PLAIN), over(PYSLOWFAST), over(*COMPILED),
                      figures[1], figures[2]])  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def inference_table(rows: Sequence[Row]) -> str:
    """Views a second in evaluation on GPUs."""
    measured = [row for row in rows if row["benchmark"] == "inference" and row["device"] == "cuda"]
    found = newest(measured, "variant", "clips", "pixels", "way")
    if not found:
        return f"Evaluation on a GPU: {UNMEASURED}."
    lines = [
        [str(key[0]), f"{row['variant']}, {row['pixels']} px", str(row["clips"]), row["way"],
         f"{row['views_per_s']:.0f}", f"{row['tflop_per_s']:.1f}"]
        for key, row in sorted(found.items(), key=lambda item: (item[0][:4], -item[1]["views_per_s"]))
    ]  # fmt: skip
    head = ["machine", "model", "views a batch", "way", "views/s", "TFLOP/s"]
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def profile_table(rows: Sequence[Row]) -> str:
    """Where the time of our step goes, by kind of work."""
    measured = [row for row in rows if row["benchmark"] == "step profile" and row["device"] == "cuda"]
    found = [row for row in newest(measured, "variant", "clips", "way").values() if row["way"] == OURS]
    if not found:
        return f"Time of a step on a GPU by kind of work: {UNMEASURED}."
    kinds = list(dict.fromkeys(kind for row in found for kind in row["kinds"]))
    head = ["machine, model, clips", *kinds]
    lines = []
    for row in found:
        cells = [row["kinds"].get(kind) for kind in kinds]
        name = f"{hardware(row)}, {row['variant']}, {row['clips']}"
        lines.append([name, *("-" if c is None else f"{c['ms']:.2f} ms ({c['launches']})" for c in cells)])
    return f"{markdown(head, lines)}\n\nMilliseconds (launches). {source(found)}"


def parts_table(rows: Sequence[Row]) -> str:
    """What each part of the GPU report said last."""
    found = newest([row for row in rows if row["benchmark"] == "gpu-report"], "part")
    if not found:
        return f"Correctness on a GPU: {UNMEASURED}."
    lines = [
        [str(key[0]), str(key[1]), row["status"], row.get("line", "").replace("|", "/")[:100]]
        for key, row in sorted(found.items())
        if str(key[1]).startswith(("tests", "sanitizer", "quickstart", "recipe", "loader"))
    ]
    return f"{markdown(['machine', 'part', 'outcome', 'its last line'], lines)}\n\n{source(list(found.values()))}"


def gpu_loader_table(rows: Sequence[Row]) -> str:
    """The loader into a GPU, by decoder."""
    kept = [row for row in rows if row["benchmark"] == "loader" and str(row.get("device", "")).startswith("cuda")]
    found = newest(kept, "codec", "decoder", "workers", "threads", "what")
    if not found:
        return f"The loader on a GPU: {UNMEASURED}."
    lines = [
        [str(key[0]), f"{row['codec']}, {row['clips']} clips", row["decoder"],
         "by itself" if row["workers"] < 0 else str(row["workers"]), f"{row['clips_per_second']:.0f}",
         f"{row['batch_ms_p50']:.0f}", f"{row['batch_ms_p95']:.0f}", _by_nvdec(row),
         f"{row.get('nvdec_percent_mean', 0.0):.0f} %"]
        for key, row in sorted(found.items(), key=lambda item: -item[1]["clips_per_second"])
    ]  # fmt: skip
    head = ["machine", "store, batch", "data.decoder", "workers", "clips/s", "ms a batch", "ms, 95 %", "clips by NVDEC",
            "NVDEC in use"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def _by_nvdec(row: Row) -> str:
    """Share of the clips that NVDEC decoded (all by DALI's operator); "in use" counts the trial before them as well."""
    if row["decoder"] in ("cpu", "dali"):
        return "0 %" if row["decoder"] == "cpu" else "100 %"
    counts = row.get("nvdec_clips", 0.0), row.get("cpu_clips", 0.0)
    return f"{100 * counts[0] / sum(counts):.0f} %" if sum(counts) else "-"


def training_table(rows: Sequence[Row]) -> str:
    """Whole trainings on a GPU, from encoded clips to updated weights."""
    found = newest([row for row in rows if row["benchmark"] == "training"], "run")
    if not found:
        return f"Training on a GPU: {UNMEASURED}."
    lines = [
        [str(key[0]), _size_of(row), str(row["steps"]), row["decoder"],
         f"{row['clips_per_s']:.0f}",
         f"{100 * row['data_wait_share']:.1f} %" if "data_wait_share" in row
         else f"at most {100 * row['host_wait_share']:.0f} %",
         f"{100 * row['top1']:.1f} %" if "top1" in row else "-"]
        for key, row in sorted(found.items())
    ]  # fmt: skip
    head = ["machine", "training", "steps", "decoded by", "clips/s", "data wait", "top-1"]
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def _size_of(row: Row) -> str:
    parts = [str(row["run"]), f"{row['pixels']} px" if row.get("pixels") else "",
             f"{row['clips']} clips a step" if row.get("clips") else ""]  # fmt: skip
    return ", ".join(part for part in parts if part)


def nvdec_table(rows: Sequence[Row]) -> str:
    """NVDEC with decoders that live on: whether its pictures are FFmpeg's, and what one call costs."""
    exact = newest([row for row in rows if row["benchmark"] == "nvdec" and row["what"] == "exact"], "streams")
    calls = newest([row for row in rows if row["benchmark"] == "nvdec" and row["what"] == "calls"], "bframes")
    if not exact:
        return f"NVDEC: {UNMEASURED}."
    lines = [[f"{row['streams']}: clips that differ from FFmpeg's", f"{row['different']} of {row['clips']}"]
             for row in exact.values()]  # fmt: skip
    for row in calls.values():
        name = f"{row['pictures']} pictures, {row['bframes']} B-frames in a row"
        lines += [
            [f"{name}: a clip, of it the call, ms", f"{row['clip_ms']:.1f}, {row['call_ms']:.1f}"],
            [f"{name}: pictures out of one call", str(row["pictures_of_one_call_with_end"])],
            [f"{name}: speed of Python beside it", f"{row['python_left_beside_decoding']:.2f}"],
        ]
    return f"{markdown(['question', 'answer'], lines)}\n\n{source([*exact.values(), *calls.values()])}"


def storage_table(rows: Sequence[Row]) -> str:
    """What settings of a store cost and keep."""
    found = newest([row for row in rows if row["benchmark"] == "storage"], "material", "setting")
    if not found:
        return f"Settings of a store: {UNMEASURED}."
    lines = [
        [row["material"], row["setting"], f"{row['mib_per_10_s']:.2f}", f"{row['cpu_s_to_make_10_s']:.1f}",
         f"{row['kib_per_clip']:.0f}", f"{row['frames_decoded_per_clip']:.0f}", f"{row['cpu_ms_per_clip']:.1f}",
         "-" if row["dali_cpu_ms_per_clip"] is None else f"{row['dali_cpu_ms_per_clip']:.1f}",
         UNMEASURED if row["nvdec_clips_per_s"] is None else f"{row['nvdec_clips_per_s']:.0f}",
         f"{row['psnr_db']:.1f}"]
        for row in found.values()
    ]  # fmt: skip
    head = ["material", "setting", "MiB per 10 s", "CPU s to make", "KiB a clip", "frames decoded a clip",
            "CPU ms a clip", "DALI on a CPU, ms", "NVDEC, clips/s", "PSNR, dB"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def loaders_table(rows: Sequence[Row]) -> str:
    """This project's loader and others on the same clips, the cheapest first."""
    kept = [row for row in rows if row["benchmark"] == "loader peers" and "loader" in row]
    found = newest(kept, "loader", "source")
    if not found:
        return f"Other loaders on the same clips: {UNMEASURED}."
    good = sorted((row for row in found.values() if "failed" not in row), key=lambda row: row["cpu_s_per_clip"])
    lines = [
        [row["loader"], row["source"], f"{1 / row['cpu_s_per_clip']:.1f}", f"{row['clips_per_s']:.1f}",
         f"{row['cpu_s_per_clip'] * 1e3:.0f}", f"{row['peak_rss_mib']:.0f}", f"{row['bytes_per_clip'] / 1024:.0f}",
         f"{row['frames_decoded_per_clip']:.0f}", f"{row['first_batch_s']:.1f}"]
        for row in good
    ]  # fmt: skip
    bad = [row for row in found.values() if "failed" in row]
    lines += [[row["loader"], row["source"], row["failed"].replace("|", "/")[:80], *["-"] * 6] for row in bad]
    head = ["loader", "source", "clips a CPU second", "clips/s", "CPU ms a clip", "peak memory, MiB", "KiB read a clip",
            "frames decoded a clip", "first batch, s"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def workers_table(rows: Sequence[Row]) -> str:
    """What more worker processes bring on one machine, reading alone and with the graph on a CPU behind it."""
    kept = [row for row in rows if row["benchmark"] == "loader_scaling"]
    reading = newest([row for row in kept if row["what"] == "workers"], "codec", "clips", "workers")
    whole = newest([row for row in kept if row["what"] == "loader"], "codec", "clips", "workers")
    if not reading:
        return f"Clips a second by worker processes: {UNMEASURED}."
    lines = [
        [str(key[0]), str(row["workers"]), f"{row['clips_per_second']:.0f}", f"{row['to_first']:.2f}x",
         f"{row['worker_cpu_ms']:.1f}", f"{row['to_stages']:.2f}x", f"{row['parent_cpu_ms']:.2f}",
         f"{whole[key]['clips_per_second']:.0f}" if key in whole else UNMEASURED]
        for key, row in sorted(reading.items())
    ]  # fmt: skip
    head = ["machine", "workers", "clips/s", "over one", "CPU ms a clip", "over its stages alone",
            "of the parent, ms", "with frames and sound made, clips/s"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source([*reading.values(), *whole.values()])}"


def views_table(rows: Sequence[Row]) -> str:
    """Evaluation by model and precision: GFLOPs x views beside what the device made of them."""
    found = newest([row for row in rows if row["benchmark"] == "views"], "variant", "precision")
    if not found:
        return f"Views a second by model and precision: {UNMEASURED}."
    lines = [
        [str(key[0]), row["variant"], row["precision"], f"{row['gflops']:.1f} x {row['views']}", str(row["clips"]),
         f"{row['views_per_s']:.1f}", f"{row['seconds_per_video']:.3f}", f"{row['tflops_per_s']:.2f}"]
        for key, row in sorted(found.items())
    ]  # fmt: skip
    head = ["machine", "model", "precision", "GFLOPs x views", "views a batch", "views/s", "s a video", "TFLOP/s"]
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


def scaling_table(rows: Sequence[Row]) -> str:
    """Processes over gloo on one machine, and the model of `benchmarks.cluster.model` beside them."""
    found = newest([row for row in rows if row["benchmark"] == "scaling"], "ranks", "clips")
    if not found:
        return f"Processes over gloo against the model: {UNMEASURED} on an idle machine."
    lines = [
        [str(row["ranks"]), str(row["clips"]), f"{row['clips_per_s']:.1f}", f"{row['mean_ms']:.1f}",
         f"{row['predicted_ms']:.1f}", f"{100 * row['error']:+.1f} %", f"{100 * row['cpu_error']:+.1f} %",
         f"{row['foreign_cores']:.2f}", "-" if row.get("weights_difference") is None
         else f"{row['weights_difference']:.1e}"]
        for _, row in sorted(found.items())
    ]  # fmt: skip
    head = ["processes", "clips each", "clips/s", "ms a step", "model, ms", "error", "error of CPU time",
            "cores of other programs", "weights apart"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(list(found.values()))}"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "step": lambda rows: step_table(rows, "cuda"),
    "step-cpu": lambda rows: step_table(rows, "cpu"),
    "inference": inference_table,
    "profile": profile_table,
    "gpu-parts": parts_table,
    "gpu-loader": gpu_loader_table,
    "gpu-training": training_table,
    "nvdec": nvdec_table,
    "storage": storage_table,
    "views": views_table,
    "scaling": scaling_table,
    "loaders": loaders_table,
    "workers": workers_table,
}


def render(text: str, rows: Sequence[Row], *, below: str = "") -> str:
    """A page with its tables made anew.

    Args:
        text: of the page.
        rows: from `all_rows`.
        below: what leads from the page's folder to the root, such as "../".

    Raises:
        ValueError: a table that does not exist, or a region without its end.
    """

    def region(match: re.Match[str]) -> str:
        """The region with its table."""
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"bench:{name} must be one of {', '.join(TABLES)}")
        table = TABLES[name](rows).replace("](benchmarks/", f"]({below}benchmarks/")
        return f"{match[1]}{table}\n{match[4]}"

    if text.count("<!-- bench:") != len(REGION.findall(text)):
        raise ValueError("every <!-- bench:NAME --> must have its <!-- /bench:NAME --> on a line below it")
    return REGION.sub(region, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 when --check finds a page that differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    options = parser.parse_args(arguments)
    rows, differing = all_rows(), []
    for name in PAGES:
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        made = render(text, rows, below="../" * name.count("/"))
        if made != text:
            differing.append(name)
            if not options.check:
                path.write_text(made, encoding="utf-8")
    if differing:
        sys.stdout.write(f"{'differ from' if options.check else 'written from'} the results: {', '.join(differing)}\n")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
