"""Arithmetic and memory layout of a model."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Module = TypeVar("Module", bound=nn.Module)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context for a forward pass in fp32, bf16 or fp16 on a device."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def channels_last(model: Module) -> Module:
    """Give every 5-D and 4-D parameter the channels-last layout that the kernels work in.

    Returns:
        The model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (4, 5):
                layout = torch.channels_last_3d if parameter.dim() == 5 else torch.channels_last
                parameter.data = parameter.data.contiguous(memory_format=layout)
    return model
