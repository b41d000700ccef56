"""BN groups that reach over ranks (`model.sync_batch_norm`), where one rank has fewer clips than a group."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import nn

from experiments.config import Config
from experiments.engine.data import DataSetupError, clips_per_rank
from experiments.runtime import Runtime
from kernels.modules import GhostBatchNorm


def ranks_per_group(config: Config, world_size: int) -> int:
    """Return how many neighbouring ranks form a BN group together; 1: every rank has groups of its own.

    Args:
        config: of the run.
        world_size: number of ranks.

    Raises:
        DataSetupError: the clips of the ranks make no whole groups.
    """
    if not config.model.sync_batch_norm or world_size == 1 or config.model.freeze != "none":
        return 1
    share, group = clips_per_rank(config, world_size), config.model.clips_per_bn_group
    if share >= group:
        return 1
    if share * world_size <= group:
        return world_size
    if group % share or world_size % (group // share):
        raise DataSetupError(
            f"model.sync_batch_norm: {world_size} ranks of {share} clips must make whole groups of "
            f"model.clips_per_bn_group ({group}); use train.clips_per_step={_fitting(world_size, share, group)}, "
            "another world size, or model.sync_batch_norm=false"
        )
    return group // share


def _fitting(world_size: int, share: int, group: int) -> int:
    """Return the clips a step nearest to the configured ones that make whole groups."""
    fit = [s for s in range(1, group + 1) if s == group or (group % s == 0 and world_size % (group // s) == 0)]
    return world_size * min(fit, key=lambda s: abs(s - share))


def share_norms(model: nn.Module, config: Config, runtime: Runtime) -> str:
    """Let neighbouring ranks form BN groups together, where the configuration says so; called by all ranks.

    Rank r's clips follow those of rank r - 1 in a step, so that the groups are those of one process with all clips.

    Args:
        model: of the run, on its device.
        config: of the run.
        runtime: of this process.

    Returns:
        A line for the log; empty where SyncBN was not asked for.
    """
    if not config.model.sync_batch_norm:
        return ""
    ranks = ranks_per_group(config, runtime.world_size)
    if ranks == 1:
        return f"model.sync_batch_norm changes nothing: {_reason(config, runtime.world_size)}"
    own = dist.group.WORLD
    if ranks < runtime.world_size:
        timeout = timedelta(seconds=2 * config.runtime.collective_timeout_s)
        for first in range(0, runtime.world_size, ranks):  # every rank has to make every group
            made = dist.new_group(list(range(first, first + ranks)), timeout=timeout)
            own = made if first <= runtime.rank < first + ranks else own
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.process_group = own
    clips = clips_per_rank(config, runtime.world_size)
    return f"SyncBN: {ranks} ranks of {clips} clips form a BN group"


def _reason(config: Config, world_size: int) -> str:
    if config.model.freeze != "none":
        return f"BN statistics are frozen (model.freeze={config.model.freeze})"
    if world_size == 1:
        return "there is one process"
    return f"each rank has whole groups of {config.model.clips_per_bn_group} clips"
