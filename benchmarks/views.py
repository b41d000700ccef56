"""GFLOPs x views and parameters of every model row of the paper's tables, the paper's numbers beside ours.

    python -m benchmarks.views                 # the table
    python -m benchmarks.views --json          # a list of rows
    python -m benchmarks.views --stages        # per pathway and stage (also with --json)
    python -m benchmarks.views --measure       # and views/s, seconds a video, achieved TFLOP/s on this device

Counted without running the models (model/flops.py); torch's flop counter has to agree to the last multiply-add.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.kernel_timing import check_out, machine
from benchmarks.result_rows import append_rows, given_arguments, provenance
from benchmarks.steps.inputs import device, size_px
from experiments.cli.parser import Parser
from model.flops import Cost, count, table
from model.variants import VARIANTS

TOLERANCE_PERCENT = 0.3
_PRINTED = "Table 3 prints it without decimals; the decimals are Table 6's and Table 5's"
_SWAP = (
    "section 3.3's design costs 39.6, as A->FS does when deployed (its synchronization loss needs no F->S after res5); "
    "a standard AV nonlocal (visual queries, un-pooled audio keys, inner width C/2) would cost 51.5, so the paper's "
    "two cells may be swapped (hypothesis)"
)
_AUDIO = "Table 1's Audio pathway alone costs 4.0 (beta_A 1/2) or 16.1 (beta_A 1); no reading between them is stated"
_TRUNCATED = "the paper truncates 106.5; allowed 0.5 %"


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper: what it prints, and the variant that it describes."""

    table: str
    row: str
    variant: str
    gflops: float
    views: int = 1
    params_m: float | None = None
    reproducible: bool = True
    note: str = ""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of one view."""
        return size_px(self.variant)


def _ava(split: str) -> tuple[PaperRow, ...]:
    return (
        PaperRow("7", f"SlowFast 4x16, R50 ({split})", "slowfast_r50_4x16_ava", 65.7),
        PaperRow("7", f"AVSlowFast 4x16, R50 ({split})", "avslowfast_r50_4x16_ava", 67.1),
        PaperRow("7", f"SlowFast 8x8, R101 + NL ({split})", "slowfast_r101_nl_8x8_ava", 184),
        PaperRow("7", f"AVSlowFast 8x8, R101 + NL ({split})", "avslowfast_r101_nl_8x8_ava", 210),
    )


ROWS: tuple[PaperRow, ...] = (
    PaperRow("3", "SlowFast, R50", "slowfast_r50_4x16", 36.1, 30, note=_PRINTED),
    PaperRow("3", "AVSlowFast, R50", "avslowfast_r50_4x16", 39.8, 30, note=_PRINTED),
    PaperRow("3", "SlowFast, R101", "slowfast_r101_8x8", 106, 30, note=_TRUNCATED),
    PaperRow("3", "AVSlowFast, R101", "avslowfast_r101_8x8", 129, 30),
    PaperRow("4", "SlowFast", "slowfast_r101_nl_16x8", 234, 30),
    PaperRow("4", "AVSlowFast", "avslowfast_r101_nl_16x8", 278, 30),
    PaperRow("5a", "A->F->S", "avslowfast_r50_4x16_a_f_s", 51.4, 30, reproducible=False, note=_SWAP),
    PaperRow("5a", "A->FS", "avslowfast_r50_4x16", 39.8, 30),
    PaperRow("5a", "AV Nonlocal", "avslowfast_r50_4x16_av_nonlocal", 39.9, 30),
    PaperRow("5b", "beta_A 1/8", "avslowfast_r50_4x16_beta_1_8", 36.0, 30),
    PaperRow("5b", "beta_A 1/4", "avslowfast_r50_4x16_beta_1_4", 36.8, 30),
    PaperRow("5b", "beta_A 1/2", "avslowfast_r50_4x16", 39.8, 30),
    PaperRow("5b", "beta_A 1", "avslowfast_r50_4x16_beta_1", 51.9, 30),
    PaperRow("6", "SlowFast", "slowfast_r50_4x16", 36.1, 30),
    PaperRow("6", "pool5", "avslowfast_r50_4x16_pool5", 38.4, 30),
    PaperRow("6", "res4 + pool5", "avslowfast_r50_4x16_res4", 39.1, 30),
    PaperRow("6", "res3,4 + pool5", "avslowfast_r50_4x16", 39.8, 30),
    PaperRow("6", "res2,3,4 + pool5", "avslowfast_r50_4x16_res234", 40.2, 30),
    *_ava("v2.1"),
    *_ava("v2.2"),
    PaperRow("8", "AVSlowFast 8x8", "avslowfast_r50_8x8_probe", 63.4, params_m=38.5),
    PaperRow("A.1", "AVSlowFast 4x16", "avslowfast_r50_4x16_probe", 36.2, params_m=38.5),
    PaperRow("A.1", "AVSlowFast 8x8", "avslowfast_r50_8x8_probe", 63.4, params_m=38.5),
    PaperRow("A.1", "AVSlowFast 16x4", "avslowfast_r50_16x4_probe", 117.9, params_m=38.5),
    PaperRow(
        "A.1",
        "SlowFast 4x16 (ROT)",
        "slowfast_r50_4x16_probe",
        34.2,
        params_m=33.0,
        note="33.0 M is this model with a 400-way fc; with the 101-way fc of the other rows it has 32.3 M",
    ),
    PaperRow("A.1", "AVSlowFast 4x16 (AVS)", "avslowfast_r50_4x16_probe", 36.2, params_m=38.5),
    PaperRow("A.1", "AVSlowFast 4x16 (split 1)", "avslowfast_r50_4x16_probe", 36.2, params_m=38.5),
    PaperRow("A.3", "Audio-only, Kinetics-600", "audio_r50", 14.2, reproducible=False, note=_AUDIO),
    PaperRow("A.3", "Audio-only, Kinetics-400", "audio_r50", 14.2, reproducible=False, note=_AUDIO),
)


@dataclass(frozen=True)
class CountedRow:
    """A row as `--json` gives it. gmacs holds the laterals of the synchronization loss where the paper's does."""

    table: str
    row: str
    variant: str
    gmacs: float
    deployed_gmacs: float  # without the laterals that only the synchronization loss uses
    params_m: float  # as deployed
    params_without_bn_m: float  # as Table A.1 counts
    views: int
    paper_gflops: float
    paper_params_m: float | None
    residual_percent: float
    reproducible: bool
    note: str


@cache
def cost_of(variant: str, size_px: tuple[int, int]) -> Cost:
    """Count a named variant; torch's counter must agree exactly."""
    cost = count(VARIANTS[variant], *size_px)
    total = sum(cost.multiply_adds.values())
    assert total == cost.by_torch, f"{variant}: {total} multiply-adds, torch's flop counter says {cost.by_torch}"
    return cost


def counted(rows: Iterable[PaperRow]) -> Iterator[CountedRow]:
    """Count one row after the other, a second or so each.

    Args:
        rows: rows of the paper.

    Yields:
        the same rows with our numbers; giga multiply-adds per view, million parameters, percent.
    """
    for row in rows:
        cost = cost_of(row.variant, row.size_px)
        gmacs = cost.gmacs + cost.sync_gmacs
        without_bn = cost.params_m - cost.norm_parameters / 1e6
        residual = 100 * (gmacs / row.gflops - 1)
        yield CountedRow(
            table=row.table,
            row=row.row,
            variant=row.variant,
            gmacs=round(gmacs, 4),
            deployed_gmacs=round(cost.gmacs, 4),
            params_m=round(cost.params_m, 3),
            params_without_bn_m=round(without_bn, 3),
            views=row.views,
            paper_gflops=row.gflops,
            paper_params_m=row.params_m,
            residual_percent=round(residual, 3),
            reproducible=row.reproducible,
            note=row.note,
        )


def text(rows: Iterable[CountedRow]) -> Iterator[str]:
    """The lines of the table for a terminal, each as soon as its row is counted."""
    names = f"{'table':5} {'row':34} {'GFLOPs x views':>15} {'paper':>7} {'residual':>9}"
    yield f"{names} {'deployed':>9} {'params':>8}  note"
    for r in rows:
        verdict = f"{r.residual_percent:+.2f} %" if r.reproducible else "not repr."
        line = (
            f"{r.table:5} {r.row:34} {r.gmacs:10.2f} x {r.views:<2} {r.paper_gflops:7.1f} {verdict:>9} "
            f"{r.deployed_gmacs:9.2f} {r.params_m:6.1f} M  {r.note}"
        )
        yield line.rstrip()


def broken_down(variants: Sequence[str]) -> list[dict[str, Any]]:
    """Per pathway and stage: giga multiply-adds and million parameters of each variant, for one view of its size."""
    out = []
    for name in variants:
        size = size_px(name)
        cost = cost_of(name, size)
        parts = [
            {"pathway": pathway, "stage": stage, "gmacs": round(gmacs, 4), "params_m": round(params, 4)}
            for pathway, stage, gmacs, params in table(cost)
        ]
        total = {"gmacs": round(cost.gmacs, 4), "params_m": round(cost.params_m, 3)}
        out.append({"variant": name, "px": size, **total, "sync_gmacs": round(cost.sync_gmacs, 4), "stages": parts})
    return out


def stages_text(rows: Sequence[dict[str, Any]]) -> str:
    """What `broken_down` gave, for a terminal."""
    lines = []
    for row in rows:
        size = f"{row['px'][0]}x{row['px'][1]} px" if VARIANTS[row["variant"]].has_visual else "sound"
        total = f"{row['gmacs']:.3f} G, {row['params_m']:.2f} M (+ {row['sync_gmacs']:.3f} G synchronization)"
        lines.append(f"{row['variant']}, {size}: {total}")
        for part in row["stages"]:
            lines.append(f"  {part['pathway']:16} {part['stage']:6} {part['gmacs']:9.4f} G  {part['params_m']:8.4f} M")
    return "\n".join(lines)


def _measure(options: Any, names: Sequence[str], given: list[str]) -> None:
    """Measure variants on this device, and print or append what was asked for."""
    from benchmarks.steps.views import CLIPS, measure_views, speeds_text  # builds real models: only when asked for

    check_out(options.out)
    kind = device().type
    found = measure_views(names, options.precisions or ["fp32", "bf16"], options.clips or CLIPS[kind])
    rows = [asdict(speed) for speed in found]
    if options.out:
        source = {"benchmark": "views", "device": kind} | provenance("benchmarks.views", kind, given)
        append_rows(options.out, [source | row for row in rows])
    result = json.dumps({"machine": machine(kind), "rows": rows}, indent=1)
    sys.stdout.write((result if options.json else speeds_text(found)) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(prog="python -m benchmarks.views", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--stages", action="store_true", help="break down by pathway and stage")
    parser.add_argument("--measure", action="store_true", help="measure views/s on this device")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), metavar="VARIANT", help="only these")
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16", "fp16"], help="of --measure (default: fp32 bf16)"
    )
    parser.add_argument("--clips", type=int, help="views a batch of --measure (default: 2, on a GPU 32)")
    parser.add_argument("--out", type=Path, help="JSON file to append the rows of --measure to")
    options = parser.parse_args(arguments)
    for name in ("precisions", "clips", "out"):
        if getattr(options, name) is not None and not options.measure:
            parser.error(f"--{name} ({getattr(options, name)}) must come with --measure; add it, or leave this out")
    if options.measure and options.stages:
        parser.error("--stages must not come with --measure; run them one after the other")
    if options.clips is not None and options.clips < 1:
        parser.error(f"--clips ({options.clips}) must be at least 1; give a batch that fits the memory")
    rows = [row for row in ROWS if not options.variants or row.variant in options.variants]
    names = options.variants or sorted({row.variant for row in rows})
    if not (rows or options.stages or options.measure):
        parser.error(f"{', '.join(names)}: in no row of the paper's tables; --stages and --measure show any variant")
    if options.measure:
        _measure(options, names, given_arguments(arguments))
    elif options.stages:
        parts = broken_down(names)
        sys.stdout.write((json.dumps(parts, indent=1) if options.json else stages_text(parts)) + "\n")
    elif options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in counted(rows)], indent=1) + "\n")
    else:
        for line in text(counted(rows)):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
