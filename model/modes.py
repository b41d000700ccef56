"""What of a model learns: all of it, all but BN (EPIC, appendix A.5), or the last fc alone (linear probe, A.8)."""

from torch import nn

from kernels.modules import GhostBatchNorm
from model.drop_pathway import AudioAverage


def apply_freeze(model: nn.Module, freeze: str) -> None:
    """Freeze parts of an `AVSlowFast` in place; unfreezes the rest.

    Args:
        freeze: "none"; "bn_statistics": running statistics are used and kept, scale and shift learn;
            "bn": scale and shift are fixed as well; "backbone": only the classifier learns, running averages of audio
            features (`drop_pathway_mode`) are kept too: what they are an average of stays as it is.
    Raises:
        ValueError: on another name.
    """
    if freeze not in ("none", "bn_statistics", "bn", "backbone"):
        raise ValueError(f"freeze ({freeze}) must be none, bn_statistics, bn or backbone")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(freeze != "backbone" or name.startswith("head.classifier"))
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.frozen = freeze != "none"
            if freeze == "bn":
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)
        elif isinstance(module, AudioAverage):
            module.frozen = freeze == "backbone"
