"""Where a training step can be a CUDA graph, and why not elsewhere."""

from __future__ import annotations

import torch.distributed as dist

from experiments.config import Config
from experiments.engine.data import passes_per_step
from experiments.engine.graphs import Capturer, CudaCapturer
from experiments.engine.shared_norms import ranks_per_group
from experiments.runtime import Runtime


class GraphError(ValueError):
    """CUDA graphs that were asked for and are not possible."""


def graph_obstacle(config: Config, runtime: Runtime) -> str:
    """Return why the step of a run cannot be captured, in words; empty if it can be.

    Args:
        config: of the run; the answer for `runtime.cuda_graph: off` is that.
        runtime: of this process.

    Raises:
        GraphError: there is an obstacle and `runtime.cuda_graph` is "on".
    """
    if config.runtime.cuda_graph == "off":
        return "runtime.cuda_graph is off"
    obstacle = _obstacle(config, runtime)
    if obstacle and config.runtime.cuda_graph == "on":
        raise GraphError(f"runtime.cuda_graph (on) cannot be: {obstacle}; use runtime.cuda_graph=auto")
    return obstacle


def forward_capturer(config: Config, runtime: Runtime) -> Capturer | None:
    """Return what captures the forward pass of an evaluation, None where it runs launch by launch.

    Args:
        config: of the run; `runtime.cuda_graph` asks for graphs.
        runtime: of this process.
    """
    if config.runtime.cuda_graph == "off" or runtime.device.type != "cuda" or config.debug.sync_warnings:
        return None
    if config.model.head == "detection":
        return None  # the number of boxes differs from batch to batch
    return CudaCapturer(runtime.device)


def _obstacle(config: Config, runtime: Runtime) -> str:
    if runtime.device.type != "cuda":
        return "there is no CUDA device"
    if runtime.world_size > 1 and dist.get_backend() != "nccl":
        return f"the ranks exchange gradients by {dist.get_backend()}, not by NCCL"
    if config.optim.backend != "torch":
        return f"optim.backend ({config.optim.backend}) takes its learning rate from the host"
    if config.model.activation_checkpointing:
        return "model.activation_checkpointing runs parts of the forward pass again in the backward pass"
    if config.model.head == "detection":
        return "the number of boxes differs from step to step"
    if ranks_per_group(config, runtime.world_size) > 1:
        return "ranks meet inside every normalisation (model.sync_batch_norm)"
    passes = passes_per_step(config, runtime.world_size)
    if passes > 1:
        return f"a step has {passes} passes (train.max_clips_per_pass)"
    if config.debug.sync_warnings:
        return "debug.sync_warnings looks at every launch"
    return ""
