"""Who decodes the videos of a split on a device."""

import functools
import logging

import numpy as np
import torch

from pipeline.dataset import Dataset, Decoder

MIN_NVDEC_PX = 128  # in both dimensions; NVDEC refuses smaller pictures

log = logging.getLogger(__name__)


def choose_decoder(dataset: Dataset, wanted: str, device: str) -> Decoder:
    """Return who decodes a data set on a device.

    Where a GPU would decode but some pictures are smaller than NVDEC takes, "auto" means the CPU, and the log says why.

    Raises:
        ValueError: DALI was asked for where it cannot decode.
    """
    on_gpu = torch.device(device).type == "cuda"
    possible = "dali" in dataset.decoders and (on_gpu or dataset.video_codec == "vp9")
    if wanted == "dali" and not possible:
        raise ValueError(
            f"data.decoder (dali) cannot decode {dataset.video_codec or 'plain files'} on {device}: "
            "DALI's CPU decoder takes VP9 cuts of a store only; use data.decoder=cpu or prepare a VP9 store"
        )
    if not possible or wanted == "cpu":
        return "cpu"
    refused = too_small_for_nvdec(dataset) if on_gpu else ""
    if refused and wanted == "dali":
        raise ValueError(f"data.decoder (dali) cannot decode on {device}: {refused}; use data.decoder=cpu")
    if refused:
        _warn_once(f"videos of split {dataset.split!r} are decoded by the CPU, not by the GPU: {refused}")
    return "cpu" if refused else "dali"


def too_small_for_nvdec(dataset: Dataset) -> str:
    """Return which videos of a split NVDEC refuses, in words; empty if there are none."""
    table = dataset.media
    media = np.unique(np.asarray(dataset.samples.media))
    small = media[np.minimum(np.asarray(table.width)[media], np.asarray(table.height)[media]) < MIN_NVDEC_PX]
    if not len(small):
        return ""
    first = int(small[0])
    return (
        f"{len(small)} of {len(media)} videos are smaller than {MIN_NVDEC_PX}x{MIN_NVDEC_PX} px, the least that NVDEC "
        f"takes, the first is {table.id(first)} ({table.width[first]}x{table.height[first]})"
    )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
