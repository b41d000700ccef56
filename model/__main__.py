"""The variants of the paper: `python -m model` counts giga multiply-adds of one view and parameters of each."""

import sys

from model.flops import count
from model.variants import VARIANTS


def main() -> int:
    """Print one line for every variant as it is counted (some seconds for all); returns the exit code."""
    names = sys.argv[1:] or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        sys.stderr.write(f"error: {', '.join(unknown)} must be variants of model/variants.py: {', '.join(VARIANTS)}\n")
        return 2
    sys.stdout.write(f"{'model.variant':36} {'GFLOPs a view':>14} {'parameters':>12}  pathways\n")
    for name in names:
        config = VARIANTS[name]
        cost = count(config)
        sys.stdout.write(f"{name:36} {cost.gmacs:14.2f} {cost.params_m:10.1f} M  {', '.join(config.pathways)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
