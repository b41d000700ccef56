"""Audiovisual synchronization (section 3.5, Table 5d): does this audio belong to these frames?

Legend: N clips, M audio frames, F mel bins.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import SYNC_EMBEDDING, ModelConfig
from model.fusion import SyncFeatures

MARGIN = 0.99
SCALE = 0.5  # of the L2-normalised embeddings: distances lie in [0, 1]
MIN_VARIANCE = 0.01  # of a log-mel: silence has nothing to synchronise
MAX_COSINE = 0.99999  # of the two log-mels: equal sounds have no right answer


class SyncLoss(NamedTuple):
    """The loss of one step over all active levels, () float32 each; None without a negative."""

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    pairs: Tensor | None = None


def active_levels(config: ModelConfig, *, fused: bool) -> tuple[str, ...]:
    """Levels whose loss may be used: no audio has been fused into the visual features before them.

    Args:
        fused: whether this iteration adds audio to vision; then only the levels up to the first fusion qualify (the
            reference is taken before that addition), else the answer leaks into the question.
    Returns:
        names of levels in order.
    """
    levels = config.active_sync_levels
    stages = config.audio_fusion_stages
    if not fused or not stages:
        return levels
    order = ("pool1", "res2", "res3", "res4", "res5", "pool5")
    return tuple(level for level in levels if order.index(level) <= order.index(stages[0]))


def pair_mask(log_mel: Tensor, negative: Tensor) -> Tensor:
    """Which clips have a usable pair of sounds.

    Args:
        log_mel, negative: (N, 1, M, F) float.
    Returns:
        (N,) bool: both vary and they differ.
    """
    a, b = log_mel.flatten(1).float(), negative.flatten(1).float()
    varied = torch.minimum(a.var(1), b.var(1)) > MIN_VARIANCE
    return varied & (F.cosine_similarity(a, b, dim=1) < MAX_COSINE)


class SyncHead(nn.Module):
    """Loss of one level: separate linear layers to 64 dimensions, then the margin form or the classification form."""

    def __init__(self, reference_channels: int, signal_channels: int, kind: str) -> None:
        super().__init__()
        self.reference = nn.Linear(reference_channels, SYNC_EMBEDDING)
        self.signal = nn.Linear(signal_channels, SYNC_EMBEDDING)
        # Classification: logit of "in sync" = scale * cosine + offset.
        self.classify = nn.Linear(1, 1) if kind == "classification" else None

    def forward(self, features: SyncFeatures, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Loss over the pairs that `mask` (N,) allows, and how many of them are answered rightly.

        Returns:
            loss () float32, mean per pair (0 without pairs); right () float32, in [0, pairs].
        """
        reference = F.normalize(self.reference(features.reference), dim=1)
        positive = F.normalize(self.signal(features.positive), dim=1)
        negative = F.normalize(self.signal(features.negative), dim=1)
        weight = mask.float()
        pairs = weight.sum().clamp(min=1)
        if self.classify is not None:
            in_sync = self.classify((reference * positive).sum(1, keepdim=True)).squeeze(1)
            out_of_sync = self.classify((reference * negative).sum(1, keepdim=True)).squeeze(1)
            per_pair = (F.softplus(-in_sync) + F.softplus(out_of_sync)) / 2
            right = ((in_sync > 0).float() + (out_of_sync <= 0).float()) / 2
        else:
            near = (SCALE * (reference - positive)).square().sum(1)
            far = (SCALE * (reference - negative)).square().sum(1).clamp(min=1e-12).sqrt()
            per_pair = (near + (MARGIN - far).clamp(min=0).square()) / 2
            right = (near < far.square()).float()
        return (per_pair * weight).sum() / pairs, (right * weight).sum().detach()


class Synchronization(nn.Module):
    """The heads of all levels and their sum."""

    def __init__(self, config: ModelConfig, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.weight = config.sync_weight
        self.heads = nn.ModuleDict({level: SyncHead(*pair, config.sync_loss) for level, pair in channels.items()})

    def forward(self, features: dict[str, SyncFeatures], masks: dict[str, Tensor]) -> SyncLoss:
        """Weighted sum of the active levels' losses, in float32 whatever autocast says.

        Args:
            features, masks: by active level; mask (N,) bool.
        Returns:
            loss, accuracy and number of pairs over all levels; never synchronises.
        """
        device = next(iter(masks.values())).device
        losses, rights, pairs = [], [], []
        with torch.autocast(device.type, enabled=False):
            for level, found in features.items():
                loss, right = self.heads[level](found, masks[level])
                losses.append(loss)
                rights.append(right)
                pairs.append(masks[level].float().sum())
            total = torch.stack(pairs).sum()
            accuracy = torch.stack(rights).sum() / total.clamp(min=1)
            return SyncLoss(self.weight * torch.stack(losses).sum(), accuracy, total)
