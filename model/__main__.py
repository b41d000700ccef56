"""The variants of the paper: `python -m model` lists giga multiply-adds of one view of 256 px and parameters of each.

The list is read from model/variant_costs.json; `python -m model NAME ...` counts (seconds each), and `--write` counts
every variant and writes that file. `tests/model/test_variant_costs.py` holds the two together.
"""

import difflib
import json
import sys
from pathlib import Path

from model.variants import VARIANTS

COSTS = Path(__file__).with_name("variant_costs.json")


def counted(name: str) -> dict[str, float]:
    """Count a variant: giga multiply-adds of a view of 256 px, millions of parameters, to the table's digits."""
    from model.flops import count

    cost = count(VARIANTS[name])
    return {"gmacs": round(cost.gmacs, 2), "params_m": round(cost.params_m, 1)}


def line(name: str, cost: dict[str, float]) -> str:
    """Return the line of a variant."""
    pathways = ", ".join(VARIANTS[name].pathways)
    return f"{name:36} {cost['gmacs']:14.2f} {cost['params_m']:10.1f} M  {pathways}\n"


def main() -> int:
    """Print one line for every variant; returns the exit code."""
    names = sys.argv[1:]
    if {"-h", "--help"} & {*names}:
        sys.stdout.write(__doc__ or "")
        return 0
    if names == ["--write"]:
        COSTS.write_text(json.dumps({name: counted(name) for name in VARIANTS}, indent=1) + "\n", encoding="utf-8")
        names = []
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], VARIANTS, 1)
        meant = f"did you mean {near[0]}? All: python -m model" if near else ", ".join(VARIANTS)
        sys.stderr.write(f"error: {', '.join(unknown)} must be variants of model/variants.py: {meant}\n")
        return 2
    sys.stdout.write(f"{'model.variant':36} {'GFLOPs a view':>14} {'parameters':>12}  pathways\n")
    known = {} if names else json.loads(COSTS.read_text(encoding="utf-8"))
    for name in names or VARIANTS:
        sys.stdout.write(line(name, known.get(name) or counted(name)))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
