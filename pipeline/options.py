"""How batches are made and where they go, and what a loader counts."""

import numbers
from dataclasses import dataclass

import torch

MOST_CLIPS = 1 << 24  # of a batch: more than any memory holds; whoever knows the memory says so of fewer


@dataclass
class LoaderStats:
    """What a loader did since it was made.

    Args:
        yielded: Clips handed out that are what the plan said (temporal clips; crops are not counted apart).
        substituted: Slots of unreadable clips that another clip filled (training).
        quarantined: Clips left out (evaluation) or replaced (training); with `yielded` those that were planned.
        device_wait_s: Seconds in which the next batch was not handed out because the device was two batches behind; on
            a GPU that is the time of the step, not of the data.
    """

    yielded: int = 0
    substituted: int = 0
    quarantined: int = 0
    device_wait_s: float = 0.0


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made and where they go.

    Args:
        clips_per_batch: Clips of this rank in a batch, at least 1.
        device: "cpu" or "cuda:N".
        dtype: torch.float16 or torch.float32 frames.
        rank: This process among `world_size`.
        world_size: Number of processes.
        want_video: Whether the model takes frames.
        want_audio: Whether the model takes sound.
        num_classes: Length of multi-hot labels; 0 takes the data set's.
        pad_channels: Frames of four channels in memory, of which the batch shows three; None: on CUDA only.
    """

    clips_per_batch: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    want_video: bool = True
    want_audio: bool = True
    num_classes: int = 0
    pad_channels: bool | None = None

    def __post_init__(self) -> None:
        for name in ("clips_per_batch", "rank", "world_size", "num_classes", "want_video", "want_audio"):
            value, is_switch = getattr(self, name), name.startswith("want")
            if isinstance(value, bool) != is_switch or not isinstance(value, numbers.Integral):
                kind = "True or False" if is_switch else "a whole number"
                raise ValueError(f"{name} ({value!r}) of LoaderOptions must be {kind}")
        rules = {
            "clips_per_batch": (1 <= self.clips_per_batch <= MOST_CLIPS, f"at least 1 and at most {MOST_CLIPS}"),
            "num_classes": (self.num_classes >= 0, "at least 0"),
            "device": (_is_device(self.device), '"cpu", "cuda" or "cuda:N"'),
            "rank": (0 <= self.rank < self.world_size, f"at least 0 and less than world_size ({self.world_size})"),
            "dtype": (self.dtype in (torch.float16, torch.float32), "torch.float16 or torch.float32"),
            "want_video": (self.want_video or self.want_audio, "True where want_audio is False"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} ({getattr(self, name)}) of LoaderOptions must be {rule}")

    @property
    def memory_channels(self) -> int:
        """Channels of the frames in memory, 3 or 4."""
        padded = self.device_id is not None if self.pad_channels is None else self.pad_channels
        return 4 if padded else 3

    @property
    def device_id(self) -> int | None:
        """CUDA device number, None on the CPU."""
        device = torch.device(self.device)
        return None if device.type == "cpu" else (device.index or 0)


def check_device(options: LoaderOptions) -> None:
    """Check that the device of options is there.

    Raises:
        ValueError: it is not.
    """
    found = torch.cuda.device_count()
    if options.device_id is not None and options.device_id >= found:
        raise ValueError(
            f"device ({options.device}) of LoaderOptions must be one of the {found} CUDA devices here; "
            + (f"use cuda:0 to cuda:{found - 1}" if found else "use cpu")
        )


def _is_device(device: str) -> bool:
    try:
        return torch.device(device).type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        return False
