"""How many clips of each batch NVDEC takes, so that both it and the CPU end together.

The share is that of NVDEC's rate in the sum of both, measured once. It decides who decodes a clip, never which clip
comes or what its pixels are.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Clips per second that each side decodes when it works alone.

    Args:
        nvdec_per_s: NVDEC, all threads.
        cpu_per_s: CPU workers, all of them.
        both_per_s: Both at once, each with its share; 0: not measured.
    """

    nvdec_per_s: float
    cpu_per_s: float
    both_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} ({value}) must be a finite number, at least 0")

    @property
    def nvdec_share(self) -> float:
        """Share of the clips that NVDEC takes; one side has all where both at once are not faster."""
        if 0.0 < self.both_per_s <= max(self.nvdec_per_s, self.cpu_per_s):
            return float(self.nvdec_per_s > self.cpu_per_s)
        total = self.nvdec_per_s + self.cpu_per_s
        return self.nvdec_per_s / total if total > 0.0 else 0.0


class Share:
    """Deals the clips of each batch out; what rounding leaves over counts in the next batch.

    Args:
        nvdec_share: Share of all clips that NVDEC shall take, 0..1.
    """

    def __init__(self, nvdec_share: float) -> None:
        if not 0.0 <= nvdec_share <= 1.0:
            raise ValueError(f"nvdec_share ({nvdec_share}) must be in 0..1")
        self.nvdec_share = nvdec_share
        self._owed = 0.0  # clips that NVDEC should have taken and did not, -0.5..0.5

    def deal(self, can_nvdec: list[bool]) -> list[bool]:
        """Return which clips of a batch NVDEC takes.

        Args:
            can_nvdec: For each clip whether NVDEC can decode it.
        """
        wanted = self.nvdec_share * len(can_nvdec) + self._owed
        possible = sum(can_nvdec)
        count = min(possible, math.floor(wanted + 0.5))
        self._owed = min(0.5, wanted - count)  # clips that it cannot take are not made up for
        left, chosen = count, []
        for can in can_nvdec:
            chosen.append(can and left > 0)
            left -= chosen[-1]
        return chosen
