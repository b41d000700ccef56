"""Bad steps, which change nothing: loss, statistics or gradients that are nan or inf, or gradients far above the usual.

Everything is decided and undone on the device, also inside CUDA graphs: nothing here waits for it. Ranks agree without
exchanging anything more: a rank whose loss or statistics are not finite makes all its gradients nan, the average of the
gradients carries that to all, and the norm of the average, which decides, is the same number everywhere.

A bad step is left out: fused SGD gets the verdict as its `found_inf` (as from a gradient scaler), and the running
statistics are put back. What the host does about it (`optim.bad_step`) is decided at the next log step, in
`LossWindow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Verdicts; OVERFLOW: fp16's scaled gradients, which its scaler leaves out as a matter of course.
FINE, BAD, OVERFLOW = 0, 1, 2
_LEAST_STEPS = 20  # of a kind, before a norm can be far above the usual
_NEWEST_SHARE = 0.02  # weight of the newest norm in the usual one


class StepGuard:
    """Judges the steps of one model.

    Args:
        model: on its device, as it will stay there.
        spike_ratio: a gradient norm above so many times the usual is bad; 0 = only what is not finite.
        scaled: gradients are those of fp16 with a scaler.
    """

    def __init__(self, model: nn.Module, *, spike_ratio: float = 0.0, scaled: bool = False) -> None:
        self.spike_ratio, self.scaled = spike_ratio, scaled
        buffers = list(model.buffers())
        device = next(model.parameters()).device
        self._groups = [
            _Statistics([b for b in buffers if b.dtype == kind]) for kind in {b.dtype: None for b in buffers}
        ]
        self.verdict = torch.zeros((), device=device)  # of the last step
        self.usual = torch.zeros(2, 2, device=device)  # of steps with audio, without: mean norm, number of steps

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the running statistics; before the forward pass."""
        for group in self._groups:
            torch.cat(group.flat, out=group.before)

    def guarded(self, total: Tensor) -> Tensor:
        """Return the loss: nan where it, or any statistic after the forward pass, is not finite, so that gradients are.

        Args:
            total: scalar with gradient.
        """
        fine = torch.isfinite(total.detach())
        for group in self._groups:
            if group.before.is_floating_point():
                fine = fine & torch.isfinite(torch.cat(group.flat, out=group.chosen)).all()
        return total * torch.where(fine, 1.0, float("nan")).to(total.dtype)  # times 1 changes no bit

    @torch.no_grad()
    def judge(self, parameters: Iterable[nn.Parameter], *, drop_audio: bool) -> Tensor:
        """Judge a step by its gradients, averaged over the ranks and unscaled; put the statistics back if it is bad.

        Args:
            parameters: those without gradient do not count.
            drop_audio: the kind of step; each has its own usual norm.

        Returns:
            the norm of all gradients, () float32. `verdict` holds the judgement.
        """
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = torch.isfinite(norm)
        usual = self.usual[int(drop_audio)]
        spike = torch.zeros_like(finite)
        if self.spike_ratio > 0:
            spike = (usual[1] >= _LEAST_STEPS) & (norm > self.spike_ratio * usual[0])
        good = finite & ~spike
        share = (1 / (usual[1] + 1)).clamp(min=_NEWEST_SHARE)
        usual[0].add_(torch.where(good, (norm - usual[0]) * share, 0.0))
        usual[1].add_(good)
        self.verdict.copy_(torch.where(good, FINE, torch.where(finite, BAD, OVERFLOW if self.scaled else BAD)))
        self._put_back(~good)
        return norm

    def left_out(self) -> Tensor:
        """Return () float32: 1 where the last judged step is to be left out, else 0."""
        return (self.verdict > 0).float()

    def state(self) -> Tensor:
        """Return what a checkpoint holds of it."""
        return self.usual

    def load(self, state: Tensor | None) -> None:
        """Take over the state of a checkpoint; one from before this guard has none."""
        if state is not None:
            self.usual.copy_(state)

    def _put_back(self, bad: Tensor) -> None:
        for group in self._groups:
            torch.cat(group.flat, out=group.chosen)
            torch.where(bad, group.before, group.chosen, out=group.chosen)
            torch._foreach_copy_(group.flat, group.parts)


class _Statistics:
    """The buffers of one type, and memory for what they were; views are made once, for a step has hundreds of them.

    Args:
        buffers: written in place for as long as this lives.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.flat = [b.view(-1) for b in buffers]
        self.before = torch.cat(self.flat)
        self.chosen = torch.empty_like(self.before)
        self.parts = self.chosen.split([b.numel() for b in buffers])
