"""Multiply-adds and parameters per pathway and stage, from shapes alone: the model is built and run on fake tensors.

Fake tensors are meta tensors that know a device: they hold no data, and convolutions keep channels_last_3d as they
would on that device (on plain meta tensors they do not, and the layout checks of the norms would refuse).

"GFLOPs" of the paper are giga multiply-adds of convolution, linear and matmul for one view, without BN, ReLU, pooling
or softmax. What the model computes in evaluation is counted; the parts that only a synchronization loss needs are
counted apart, because the paper's R50 Kinetics numbers contain them (0.18 G of 39.8 G).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast, set_layout
from model.config import STAGES, ModelConfig
from model.convolutions import set_grouping


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and parameters by (pathway, stage).

    Pathways: slow, fast, audio, fast_to_slow, audio_lateral, head, synchronization. Stages: pool1 to res5, pool5.
    """

    multiply_adds: dict[tuple[str, str], int]
    parameters: dict[tuple[str, str], int]
    norm_parameters: int  # BN scales and shifts among them (Table A.1 leaves these out)
    by_torch: int  # the same forward's multiply-adds by torch.utils.flop_counter, as a check

    @property
    def gmacs(self) -> float:
        """Giga multiply-adds of one view, as deployed."""
        return sum(v for (pathway, _), v in self.multiply_adds.items() if pathway != "synchronization") / 1e9

    @property
    def sync_gmacs(self) -> float:
        """Giga multiply-adds of the laterals that only the synchronization loss needs."""
        return sum(v for (pathway, _), v in self.multiply_adds.items() if pathway == "synchronization") / 1e9

    @property
    def params_m(self) -> float:
        """Millions of parameters, BN's scale and shift included, synchronization parts not."""
        return sum(v for (pathway, _), v in self.parameters.items() if pathway != "synchronization") / 1e6


def count(config: ModelConfig, height_px: int = 256, width_px: int = 256) -> Cost:
    """Count one view of a model.

    Args:
        config: the model; with a sync_loss its extra laterals are counted under "synchronization".
        height_px, width_px: spatial size of the view.
    Returns:
        multiply-adds and parameters by pathway and stage, and torch's own count.
    """
    found: Counter[tuple[str, str]] = Counter()
    with FakeTensorMode():
        model = fake_model(config)
        with _counting(model, found), FlopCounterMode(display=False) as counter:
            run_fake(model, height_px, width_px)
    norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm)]
    affine = sum(p.numel() for m in norms for p in m.parameters())
    # torch counts two operations per multiply-add
    return Cost(dict(found), parameters(model), affine, int(counter.get_total_flops()) // 2)


def fake_model(config: ModelConfig) -> AVSlowFast:
    """The model without initialisation, in evaluation mode; under FakeTensorMode also without storage."""
    model = AVSlowFast(replace(config, backend="auto", activation_checkpointing=False))
    set_layout(model)
    set_grouping(model, "off")  # the zeros of the grouped forms are not the model's cost
    return model.eval()


@torch.no_grad()
def run_fake(model: AVSlowFast, height_px: int, width_px: int) -> None:
    """One evaluation forward of one view, under FakeTensorMode, and the laterals that only synchronization uses."""
    config = model.config
    shape = (1, 3, config.num_fast_frames, height_px, width_px)
    frames = torch.empty(shape).to(memory_format=torch.channels_last_3d) if config.has_visual else None
    mel_shape = (1, 1, config.num_mel_frames, config.num_mel_bins)
    log_mel = torch.empty(mel_shape) if config.has_audio else None
    boxes = torch.empty((0, 5)) if config.head == "detection" else None
    if not config.active_sync_levels:
        model(frames, log_mel, boxes=boxes)
        return
    assert log_mel is not None
    assert frames is not None
    plan = model._plan(True, False, False, False)
    plan.levels = tuple(s for s in config.active_sync_levels if s not in config.audio_fusion_stages and s != "pool5")
    maps, audio, _ = model._features(frames, log_mel, None, plan, None)
    model.head(maps, model._classifier_audio(audio, plan, None, None, maps), boxes)


def parameters(model: AVSlowFast) -> dict[tuple[str, str], int]:
    """Parameters by (pathway, stage)."""
    found: Counter[tuple[str, str]] = Counter()
    for name, parameter in model.named_parameters():
        found[place(name, model.config)] += parameter.numel()
    return dict(found)


def place(name: str, config: ModelConfig) -> tuple[str, str]:
    """(pathway, stage) of a module's or parameter's dotted name."""
    parts = name.split(".")
    if parts[0] in ("slow", "fast", "audio"):
        return parts[0], parts[2] if parts[1] == "stages" else "pool1"
    if parts[0] == "stages":
        stage, fast = parts[1], "fast_to_slow" in parts
        used = stage in (config.lateral_stages if fast else config.audio_fusion_stages)
        return ("fast_to_slow" if fast else "audio_lateral") if used else "synchronization", stage
    return ("synchronization" if parts[0] == "synchronization" else "head"), "pool5"


@contextmanager
def _counting(model: AVSlowFast, found: "Counter[tuple[str, str]]") -> Iterator[None]:
    """Add every convolution's, linear layer's and matmul's multiply-adds to `found` while the model runs."""

    def watch(name: str, module: Any) -> Any:
        """Return the hook of a module that multiplies, None for others."""
        if not (isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear) or hasattr(module, "matmul_multiply_adds")):
            return None
        where = place(name, model.config)

        def layer(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            found[where] += out.numel() * module.weight[0].numel()

        def product(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            found[where] += module.matmul_multiply_adds(*args)

        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            return module.register_forward_hook(layer)
        return module.register_forward_hook(product)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()


def table(cost: Cost) -> list[tuple[str, str, float, float]]:
    """Rows (pathway, stage, giga multiply-adds, million parameters), ordered by pathway and stage."""
    pathways = ("slow", "fast", "audio", "fast_to_slow", "audio_lateral", "head", "synchronization")
    keys = set(cost.multiply_adds) | set(cost.parameters)
    order = {stage: index for index, stage in enumerate((*STAGES, "pool5"))}
    rows = sorted(keys, key=lambda key: (pathways.index(key[0]), order[key[1]]))
    return [(p, s, cost.multiply_adds.get((p, s), 0) / 1e9, cost.parameters.get((p, s), 0) / 1e6) for p, s in rows]
