"""The scripts that lie beside an exported model: they classify a video without the code of the training."""

from __future__ import annotations

from pathlib import Path

from pipeline.folder import standalone

EXAMPLE_NAME, CLIP_NAME = "example.py", "clip.py"
_START = '''\
"""Name what the middle of a video shows: python example.py VIDEO. Needs {needs}."""
import json, pathlib, sys, torch
{imports}from clip import clip_of

here = pathlib.Path(__file__).parent
facts = json.loads((here / "inputs.json").read_text())
clip = clip_of(sys.argv[1], facts["inputs"])
'''
_END = """\
best = scores[0].topk(min(5, scores.shape[1]))
for score, k in zip(best.values.tolist(), best.indices.tolist()):
    print(f"{100 * score:6.2f} %  {facts['class_names'][k] if facts['class_names'] else k}")
"""
_RUN = {
    "weights": (
        "torch, torchaudio, av and avslowfast, of which it takes the model alone",
        "from avslowfast.model.export import load_model, score\n",
        "scores = score(load_model(here), clip, drop_silence=facts['drops_silence'])\n",
    ),
    "program": (
        "torch, torchaudio and av",
        "",
        'scores = torch.export.load(here / "model.pt2").module()(*clip.values()).detach()\n',
    ),
    "onnx": (
        "torch, torchaudio, av and onnxruntime",
        "import onnxruntime\n",
        'session = onnxruntime.InferenceSession(here / "model.onnx")\n'
        "scores = torch.tensor(session.run(None, {name: value.numpy() for name, value in clip.items()})[0])\n",
    ),
}


def example_of(kind: str) -> dict[str, str]:
    """Return the scripts for one form of an exported model, by name.

    Args:
        kind: "weights", "program" or "onnx".
    """
    needs, imports, run = _RUN[kind]
    clip = Path(standalone.__file__).read_text(encoding="utf-8")
    return {EXAMPLE_NAME: _START.format(needs=needs, imports=imports) + run + _END, CLIP_NAME: clip}
