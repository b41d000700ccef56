"""What one forward gives. Legend: B clips, R boxes, K classes."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutputError(AttributeError):
    """Class logits of an evaluation or class scores of a training step were read; the message names the other."""


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Class logits in training or class scores in evaluation, and what a task asked for.

    A pytree whose leaves are the tensors that are there: torch.compile, torch.export and DistributedDataParallel see
    them.

    Args:
        values: (B, K) float32, (R, K) for the detection head: read `logits` or `scores`, which say what they are.
        kind: what `values` are: "logits" in training, "scores" in evaluation.
        rotation_logits: (B, 4) float32, the logits of the ssl head once more; in training alone.
        sync_loss: () float32, weighted sum over the synchronization levels in use; None unless a negative was given.
        sync_accuracy: () float32 in [0, 1], share of the pairs that are answered rightly.
        sync_pairs: () float32, how many pairs count, over all levels.
    """

    values: Tensor
    kind: Literal["logits", "scores"]
    rotation_logits: Tensor | None = None
    sync_loss: Tensor | None = None
    sync_accuracy: Tensor | None = None
    sync_pairs: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Class logits (B, K) or (R, K) float32, mean over positions, of a model in training mode.

        Raises:
            ModelOutputError: the model was in evaluation mode.
        """
        if self.kind != "logits":
            raise ModelOutputError(
                "logits are what a model gives in training mode and this one was in evaluation mode; "
                "read .scores, or call model.train() before the forward"
            )
        return self.values

    @property
    def scores(self) -> Tensor:
        """Class scores (B, K) or (R, K) float32 in [0, 1], mean over positions, of a model in evaluation mode.

        Raises:
            ModelOutputError: the model was in training mode.
        """
        if self.kind != "scores":
            raise ModelOutputError(
                "scores are what a model gives in evaluation mode and this one was in training mode; "
                "read .logits, or call model.eval() before the forward"
            )
        return self.values


def _flatten(output: ModelOutput) -> tuple[list[Any], list[Any]]:
    """Tensors, and the context that puts them back: what `values` are, then names; JSON types, as exports store it."""
    keys, context = _flatten_with_keys(output)
    return [value for _, value in keys], context


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[pytree.GetAttrKey, Any]], list[Any]]:
    found = [(f.name, getattr(output, f.name)) for f in fields(output) if f.name != "kind"]
    named = [(name, value) for name, value in found if value is not None]
    keys = [(pytree.GetAttrKey(name), value) for name, value in named]
    return keys, [output.kind, [name for name, _ in named]]


def _unflatten(values: Any, context: Any) -> ModelOutput:
    kind, names = context
    return ModelOutput(kind=kind, **dict(zip(names, values, strict=True)))


pytree.register_pytree_node(
    ModelOutput,
    _flatten,
    _unflatten,
    serialized_type_name="avslowfast.ModelOutput",
    flatten_with_keys_fn=_flatten_with_keys,
)
