"""Models for use elsewhere: a folder of safetensors weights and config JSON, torch.export programs, ONNX files.

Legend: B clips, T frames, H W pixels, M audio frames, F mel bins, K classes.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig
from model.folding import fold

FORMAT = "avslowfast-model"
VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class ExportError(ValueError):
    """A model that cannot be exported this way, or a folder that holds no model."""


def save_model(model: AVSlowFast, folder: Path | str) -> None:
    """Write weights and configuration.

    Args:
        model: any model of the family, not folded.
        folder: is created; existing files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors stores row-major tensors; `load_model` gives the weights their layout back.
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    content = {"format": FORMAT, "version": VERSION, "model": model.config.to_dict()}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=1) + "\n")


def load_model(folder: Path | str) -> AVSlowFast:
    """Read what `save_model` wrote.

    Returns:
        the model in evaluation mode, on the default device, in channels_last_3d.
    Raises:
        ExportError: missing files, another format, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
        weights = load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} must hold {CONFIG_NAME} and {WEIGHTS_NAME} of save_model: {error}") from error
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ExportError(
            f"{folder / CONFIG_NAME} has format {content.get('format')} version {content.get('version')}; "
            f"it must be {FORMAT} version {VERSION}; export the model again"
        )
    model = build_model(ModelConfig.from_dict(content["model"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ExportError(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}: {error}") from error
    return model.eval()


class Deployed(nn.Module):
    """A folded model with positional inputs in any layout: what `export_program` and `export_onnx` trace."""

    def __init__(self, model: AVSlowFast) -> None:
        super().__init__()
        if model.config.head in ("detection", "ssl"):
            raise ExportError(
                f"head ({model.config.head}) must be softmax or sigmoid; other heads run through load_model"
            )
        self.model = fold(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """frames (B, 3, alpha_F T, H, W) and/or log_mel (B, 1, M, F) float32 -> class scores (B, K)."""
        config = self.model.config
        rest = list(inputs)
        # The one place that changes a layout: users of an exported model have row-major tensors.
        frames = rest.pop(0).contiguous(memory_format=torch.channels_last_3d) if config.has_visual else None
        scores: Tensor = self.model(frames, rest.pop(0) if rest else None)
        return scores


def export_program(model: AVSlowFast, *, crop_size_px: int) -> torch.export.ExportedProgram:
    """A program of torch.export, batch size free, everything else fixed; save it with `torch.export.save`.

    Args:
        model: evaluated as it is, with its batch normalisations folded; pixels are square crops of `crop_size_px`.
    Returns:
        a program with the inputs (frames, log_mel), (frames,) or (log_mel,) as the model has pathways.
    Raises:
        ExportError: for detection and ssl heads.
    """
    deployed, inputs = _example(model, crop_size_px)
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = (tuple({0: batch} for _ in inputs),)
    return torch.export.export(deployed, inputs, dynamic_shapes=shapes)


def export_onnx(model: AVSlowFast, path: Path | str, *, crop_size_px: int) -> None:
    """Write an ONNX file with a free batch size (needs the packages onnx and onnxscript).

    Args:
        model, crop_size_px: as for `export_program`.
        path: of the .onnx file.
    Raises:
        ExportError: for detection and ssl heads, or without the packages.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {' and '.join(missing)}; run `pip install onnx onnxscript`")
    program = export_program(model, crop_size_px=crop_size_px)
    names = [n for n, used in (("frames", model.config.has_visual), ("log_mel", model.config.has_audio)) if used]
    torch.onnx.export(program, f=str(path), dynamo=True, input_names=names, output_names=["scores"], verbose=False)


def _example(model: AVSlowFast, crop_size_px: int) -> tuple[Deployed, tuple[Tensor, ...]]:
    config = model.config
    device = next(model.parameters()).device
    inputs: list[Tensor] = []
    if config.has_visual:
        inputs.append(torch.zeros(2, 3, config.num_fast_frames, crop_size_px, crop_size_px, device=device))
    if config.has_audio:
        inputs.append(torch.zeros(2, 1, config.num_mel_frames, config.num_mel_bins, device=device))
    return Deployed(model), tuple(inputs)
