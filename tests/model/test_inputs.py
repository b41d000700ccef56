"""Inputs that do not fit: one clear error each, on the host, before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.inputs import ModelInputError, check_boxes
from tests.model.support.cases import PX, built, inputs, tiny, visual

Change = Callable[[dict[str, Any]], dict[str, Any]]


def changed(**functions: Callable[[Any], Any]) -> Change:
    return lambda given: given | {name: function(given.get(name)) for name, function in functions.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(frames=lambda x: x.byte()), r"frames of torch.uint8 must be floating point; subtract the mean"),
        (changed(frames=lambda x: [x]), r"frames \(list\) must be a tensor; a Batch: \(batch.frames, batch.log_mel\)"),
        (changed(frames=lambda x: x[:, :, :, :0]), r"frames \(4, 3, 16, 0, 32\) must be .* none of them 0"),
        (changed(frames=lambda x: x[:0], log_mel=lambda x: x[:0]), r"frames \(0, 3, 16, 32, 32\) must be"),
        (changed(frames=lambda x: x.to("meta")), r"frames on meta must be on the model's device cpu"),
        (changed(log_mel=lambda x: x[..., :9]), r"log_mel \(4, 1, 64, 9\) must have num_mel_bins \(16\)"),
        (changed(log_mel=lambda x: x[:3]), r"log_mel \(3, 1, 64, 16\) must have as many clips as frames \(4, 3,"),
        (changed(log_mel=lambda x: x.int()), r"log_mel of torch.int32 must be floating point"),
        (changed(log_mel=lambda x: x[:, :, :0]), r"log_mel \(4, 1, 0, 16\) must be \(B, 1, M, F\)"),
        (changed(log_mel=lambda x: x.to("meta")), r"log_mel on meta must be on the model's device cpu"),
        (changed(negative_log_mel=lambda x: torch.zeros(2, 1, 64, 16)), r"\(2, 1, 64, 16\) must have the shape of log"),
        (changed(negative_log_mel=lambda x: torch.zeros(4, 1, 64, 9)), r"negative_log_mel .* num_mel_bins \(16\)"),
        (changed(negative_log_mel=lambda x: torch.zeros(4, 1, 64, 16), log_mel=lambda x: None), "come with log_mel"),
        (changed(audio_keep=lambda x: torch.ones(3).bool()), r"audio_keep \(3,\) torch.bool must be \(B,\) = \(4,\)"),
        (
            changed(audio_keep=lambda x: torch.ones(4, dtype=torch.int64)),
            r"torch.int64 must be .* bool, False for a clip without",
        ),
        (changed(audio_keep=lambda x: torch.full((4,), 0.5)), r"torch.float32 must be .*; compare numbers with 0"),
        (changed(boxes=lambda x: torch.zeros(1, 5)), r"boxes must be None: head \(softmax\) classifies clips"),
    ],
)
def test_what_does_not_fit_is_named(change: Change, message: str) -> None:
    config = tiny(sync_loss="contrastive")
    frames, log_mel = inputs(config)
    with pytest.raises(ModelInputError, match=message):
        built(config)(**change({"frames": frames, "log_mel": log_mel}))


def test_negative_without_a_loss_for_it() -> None:
    frames, log_mel = inputs(tiny())
    with pytest.raises(ModelInputError, match=r"sync_loss \(none\) has nothing to compare it with"):
        built(tiny())(frames, log_mel, negative_log_mel=log_mel.flip(0))
    with pytest.raises(ModelInputError, match=r"sync_loss \(none\)"):
        built(visual())(frames, negative_log_mel=log_mel)


def test_audio_only_model_has_nothing_to_drop() -> None:
    config = tiny(pathways=("audio",), fusion="none")
    log_mel = inputs(config)[1]
    with pytest.raises(ModelInputError, match="dropped by drop_audio, audio_keep or has_audio"):
        built(config)(None, log_mel, audio_keep=torch.tensor([True, False, True, True]))


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


WRONG = [(4, 2, 2, 20, 20), (9, 2, 2, 20, 20), (-1, 2, 2, 20, 20), (1e6, 2, 2, 20, 20), (0.5, 2, 2, 20, 20)]
WRONG += [(0, 20, 2, 2, 20), (0, 2, 20, 20, 2), (0, -1, 2, 20, 20), (0, 2, -1, 20, 20), (0, 2, 2, PX + 1, 20)]
WRONG += [(0, 2, 2, 20, PX + 1), (0, 2, 2, 1e9, 1e9), *((*[0.0] * i, float("nan"), *[0.0] * (4 - i)) for i in range(5))]


@pytest.mark.parametrize("audio", [True, False])
def test_wrong_boxes_never_reach_memory(audio: bool) -> None:
    config = tiny(head="detection") if audio else visual(head="detection")
    model = built(config).eval()
    frames, log_mel = inputs(config)
    given = (frames, log_mel) if audio else (frames,)
    for wrong in WRONG:
        with pytest.raises(ModelInputError, match=r"boxes\[1\] .* must hold a whole clip number .* B is 4"):
            model(*given, boxes=boxes((3, 0, 0, PX, PX), wrong))
    for shape in ((3, 4), (5,), (0, 4)):
        with pytest.raises(ModelInputError, match=r"must be \(R, 5\)"):
            model(*given, boxes=torch.zeros(shape))
    with pytest.raises(ModelInputError, match=r"boxes of torch.int64 must be floating point; call .float\(\)"):
        model(*given, boxes=torch.zeros(2, 5, dtype=torch.int64))
    assert model(*given, boxes=boxes((3, 0, 0, PX, PX), (0, 5, 5, 5, 5))).scores.shape == (2, 5)


def test_box_values_are_not_asked_for_where_that_would_wait() -> None:
    config = tiny(head="detection")
    frames = inputs(config)[0].to("meta")  # like a GPU, which would have to be waited for; meta has no answer at all
    check_boxes(torch.zeros(3, 5, device="meta"), frames, config)


def test_compiled_check_stops_at_a_wrong_box() -> None:
    config = tiny(head="detection")
    frames = inputs(config)[0]

    def checked(given: Tensor) -> Tensor:
        check_boxes(given, frames, config)
        return given + 1

    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    assert torch.equal(compiled(boxes((3, 0, 0, PX, PX))), boxes((4, 1, 1, PX + 1, PX + 1)))
    with pytest.raises(RuntimeError, match=r"boxes must hold a whole clip number in \[0, B\)"):
        compiled(boxes((4, 0, 0, PX, PX)))
