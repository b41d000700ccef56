"""torch.export programs and ONNX files give what the original gives, at numbers of clips and boxes of their own.

Legend: B clips, R boxes, K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.avslowfast import AVSlowFast
from model.config import ModelConfig
from model.export import ExportError, export_onnx, export_program, input_names
from model.folding import fold
from tests.model.support.cases import PX, built, inputs, tiny, visual

CONFIGS: dict[str, ModelConfig] = {
    "audiovisual": tiny(),
    "audio": tiny(pathways=("audio",), fusion="none"),
    "visual": visual(),
    "nonlocal": tiny(nonlocal_blocks=(0,), head="sigmoid"),
    "detection": tiny(head="detection"),
    "a_f_s": tiny(fusion="a_f_s"),
    "av_nonlocal": tiny(fusion="av_nonlocal"),
}


def settled(config: ModelConfig) -> AVSlowFast:
    """A model whose scores are spread over [0, 1] rather than saturated."""
    model = built(config, settled=True)
    reached: list[Tensor] = []
    hook = model.head.classifier.register_forward_hook(lambda module, given, out: reached.append(out))
    model.eval()(**example(config, clips=4))
    hook.remove()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.div_(reached[0].std())
    return model


def example(config: ModelConfig, clips: int) -> dict[str, Any]:
    """Inputs by name; two boxes more than clips, in no order."""
    frames, log_mel = inputs(config, clips=clips, seed=clips)
    rows = [[(7 * i) % clips, 1 + i, 2, PX - 8 + i / 2, PX - 3] for i in range(clips + 2)]
    given: dict[str, Any] = {"frames": frames, "log_mel": log_mel, "boxes": torch.tensor(rows, dtype=torch.float32)}
    return {"frames": None} | {name: given[name] for name in input_names(config)}


def compare(run: Callable[..., Tensor], model: AVSlowFast) -> None:
    """`run` on row-major inputs, as users of an exported model have them, against the model."""
    for clips in (1, 3, 5):  # the example has 2 clips, 3 boxes
        given = example(model.config, clips)
        expected = model(**given).scores.detach()
        boxes = model.config.head == "detection"
        assert expected.shape == (clips + 2 if boxes else clips, model.config.num_classes)
        assert len(expected) == 1 or expected.std(0).max() > 1e-3  # clips differ, and
        assert 0.01 < expected.max() < 0.99  # nothing is saturated
        found = run(**{name: x.contiguous() for name, x in given.items() if x is not None})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.slow if kind in ("audiovisual", "visual", "nonlocal") else pytest.mark.integration
        )
        for kind in sorted(CONFIGS)
    ],
)
def test_exported_program_takes_any_number(kind: str, tmp_path: Path) -> None:
    model = settled(CONFIGS[kind])
    given = fold(model) if kind == "a_f_s" else model  # folded already or not: the same
    torch.export.save(export_program(given, crop_size_px=PX), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    compare(lambda **x: program(*x.values()), model)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.integration if kind in ("audio", "detection") else pytest.mark.slow)
        for kind in sorted(CONFIGS)
    ],
)
def test_onnx_file_takes_any_number(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = settled(CONFIGS[kind])
    export_onnx(model, tmp_path / "m.onnx", crop_size_px=PX)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [x.name for x in session.get_inputs()] == list(input_names(model.config))
    compare(lambda **x: torch.from_numpy(session.run(None, {n: v.numpy() for n, v in x.items()})[0]), model)


def test_a_head_that_does_not_export_says_so() -> None:
    with pytest.raises(ExportError, match=r"head \(ssl\)"):
        export_program(built(tiny(head="ssl", fusion="none")), crop_size_px=PX)
    for px in (0, -3):
        with pytest.raises(ExportError, match=rf"crop_size_px \({px}\) must be at least 1"):
            export_program(built(tiny()), crop_size_px=px)
