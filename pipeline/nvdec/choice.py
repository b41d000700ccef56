"""Who decodes the videos of a split on a device."""

import functools
import logging
from typing import Literal

import numpy as np
import torch

from pipeline.dataset import Dataset, used_media
from pipeline.nvdec.hardware import CODECS, MIN_PX, why_not

Chosen = Literal["cpu", "nvdec", "dali", "both"]  # both: NVDEC and the CPU at once

log = logging.getLogger(__name__)


def choose_decoder(dataset: Dataset, wanted: str, device: str) -> Chosen:
    """Return who decodes a data set on a device.

    "auto" means NVDEC and the CPU at once where there is NVDEC for some of the videos, and otherwise the CPU (DALI for
    VP9 stores on a machine without a GPU); the log says once why NVDEC has no part.

    Args:
        dataset: The split.
        wanted: `data.decoder`.
        device: "cpu" or "cuda:N".

    Raises:
        ValueError: NVDEC or DALI was asked for where it cannot decode.
    """
    on_gpu = torch.device(device).type == "cuda"
    if wanted == "cpu":
        return "cpu"
    if wanted == "dali":
        return _dali(dataset, device, on_gpu)
    if not on_gpu:
        if wanted == "nvdec":
            raise ValueError(f"data.decoder (nvdec) cannot decode on {device}: NVDEC needs a GPU; use data.decoder=cpu")
        return "dali" if "dali" in dataset.decoders and dataset.video_codec == "vp9" else "cpu"
    small, all_small = too_small_for_nvdec(dataset)
    reason = _no_nvdec(dataset, torch.device(device).index or 0) or (small if all_small else "")
    if reason and wanted == "nvdec":
        raise ValueError(f"data.decoder (nvdec) cannot decode split {dataset.split!r}: {reason}; use data.decoder=cpu")
    if reason:
        _warn_once(f"videos of split {dataset.split!r} are decoded by the CPU, not by NVDEC: {reason}")
        return "cpu"
    if small:
        _warn_once(f"some videos of split {dataset.split!r} are decoded by the CPU, not by NVDEC: {small}")
    return "nvdec" if wanted == "nvdec" else "both"


def _dali(dataset: Dataset, device: str, on_gpu: bool) -> Chosen:
    if "dali" not in dataset.decoders or not (on_gpu or dataset.video_codec == "vp9"):
        raise ValueError(
            f"data.decoder (dali) cannot decode {dataset.video_codec or 'plain files'} on {device}: "
            "DALI's CPU decoder takes VP9 cuts of a store only; use data.decoder=cpu or prepare a VP9 store"
        )
    refused = too_small_for_nvdec(dataset)[0] if on_gpu else ""
    if refused:
        raise ValueError(f"data.decoder (dali) cannot decode on {device}: {refused}; use data.decoder=cpu")
    return "dali"


def _no_nvdec(dataset: Dataset, device_id: int) -> str:
    """Why none of a split can be decoded by NVDEC here, in words; empty where some can."""
    if not dataset.video_codec:
        return "plain files are not cut by bytes; prepare a store"
    if dataset.video_codec not in CODECS:
        return f"cuts of {dataset.video_codec} cannot be handed over whole, as those of {', '.join(CODECS)} can"
    return why_not(device_id)


def too_small_for_nvdec(dataset: Dataset) -> tuple[str, bool]:
    """Return which videos of a split NVDEC refuses, in words (empty if there are none), and whether these are all."""
    table = dataset.media
    media = used_media(dataset)
    small = media[np.minimum(np.asarray(table.width)[media], np.asarray(table.height)[media]) < MIN_PX]
    if not len(small):
        return "", False
    first = int(small[0])
    words = (
        f"{len(small)} of {len(media)} videos are smaller than {MIN_PX}x{MIN_PX} px, the least that NVDEC "
        f"takes, the first is {table.id(first)} ({table.width[first]}x{table.height[first]})"
    )
    return words, len(small) == len(media)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
