"""Whether the batches that a loader keeps fit into the memory at hand: counted before anything is allocated."""

from __future__ import annotations

import os

import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions
from pipeline.workers.machine import CGROUPS, OWN_CGROUP, control_groups, local_ranks

_GIB = 2**30


class BatchMemoryError(ValueError):
    """Batches that cannot fit into the memory, whatever the model needs."""


def batch_bytes(spec: ClipSpec, crop_size_px: int, options: LoaderOptions, *, with_negative: bool) -> int:
    """Return the bytes of one batch of one rank: frames and log-mel as the model takes them.

    Args:
        spec: shape of a clip.
        crop_size_px: side of its pictures.
        options: clips of a batch, number format, which modalities.
        with_negative: whether each clip has a second, out-of-sync log-mel.
    """
    frames = options.memory_channels * spec.num_frames * crop_size_px**2 * options.dtype.itemsize
    log_mel = spec.num_mel_frames * spec.num_mel_bins * torch.float32.itemsize * (2 if with_negative else 1)
    return options.clips_per_batch * (frames * options.want_video + log_mel * options.want_audio)


def available_bytes(device: torch.device) -> int:
    """Return the memory that one rank can have at most: of its GPU, or its share of what the host or cgroup allows."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host, *_cgroup_limits()]) // local_ranks()


def _cgroup_limits() -> list[int]:
    """Return the memory limits in bytes of this process's control groups (version 1 or 2), as far as it has any."""
    limits = []
    for folder, version in control_groups("memory", CGROUPS, OWN_CGROUP):
        try:
            text = (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []  # "max": no limit
    return limits


def require_memory(
    key: str,
    spec: ClipSpec,
    crop_size_px: int,
    config: DataConfig,
    options: LoaderOptions,
    *,
    with_negative: bool = False,
    held: int = 0,
) -> None:
    """Check that what the loader keeps (the batch in use and `data.prefetch_batches` ahead) is less than the memory.

    Args:
        key: the setting that decides the clips of a batch, for the message.
        spec, crop_size_px: of a clip.
        config: the prefetch.
        options: of the loader.
        with_negative: see `batch_bytes`.
        held: batches kept besides: the passes of a step.

    Raises:
        BatchMemoryError: with the numbers.
    """
    one = batch_bytes(spec, crop_size_px, options, with_negative=with_negative)
    batches = config.prefetch_batches + 1 + held
    device = torch.device(options.device)
    available = available_bytes(device)
    if one * batches >= available:
        kept = f"data.prefetch_batches={config.prefetch_batches}{f', {held} passes of a step' if held else ''}"
        place = f"GPU {device.index or 0}" if device.type == "cuda" else "this machine, for each process"
        raise BatchMemoryError(
            f"batches of {key} ({options.clips_per_batch} clips a process, {one / _GIB:.2f} GiB) x {batches} (one in "
            f"use, {kept}) = {one * batches / _GIB:.2f} GiB must be less "
            f"than the memory of {place} ({available / _GIB:.2f} GiB); lower {key}, the crop size or "
            "data.prefetch_batches"
        )
