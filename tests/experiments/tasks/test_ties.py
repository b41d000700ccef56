"""The precision of a run does not take accuracy: top-1 of one view in bfloat16 is that of float32."""

import torch
import torch.nn.functional as F

from experiments.tasks.metrics import top_k_accuracy
from model.heads import Classifier


def test_top1_in_bfloat16_is_that_of_float32() -> None:
    """400 classes, labels drawn from the float32 softmax; logits rounded to bfloat16 tie and lose 0.37 points."""
    torch.manual_seed(0)
    head = Classifier(256, 0, 400, 0.5).eval()
    assert head.visual is not None
    with torch.no_grad():
        head.visual.weight.normal_(0, 0.6)
        pooled = torch.rand(10000, 256).pow(4).bfloat16().float()  # as a pooled map is under autocast
        exact = head(pooled, None)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(pooled.bfloat16(), None)
            rounded = F.linear(pooled, head.visual.weight, head.visual.bias)
        labels = exact.softmax(1).multinomial(1)[:, 0].numpy()
    top1 = [100 * top_k_accuracy(x.float().softmax(1).double().numpy(), labels, 1) for x in (exact, half, rounded)]
    assert abs(top1[1] - top1[0]) < 0.05
    assert top1[2] < top1[0] - 0.2
