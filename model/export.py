"""Models for use elsewhere: a folder of safetensors weights and config JSON, torch.export programs, ONNX files.

Legend: B clips, T frames, H W pixels, M audio frames, F mel bins, K classes.
"""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig
from model.convolutions import set_grouping
from model.folding import fold
from model.output import ModelOutput

FORMAT = "avslowfast-model"
VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PROGRAM_NAME = "model.pt2"
ONNX_NAME = "model.onnx"


class ExportError(ValueError):
    """A model that cannot be exported this way, or a folder that holds no model."""


def save_model(model: AVSlowFast, folder: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and configuration, each whole or not at all.

    Args:
        model: any model of the family, not folded.
        folder: is created; existing files of these names are replaced.
        metadata: what the weights' file says besides its format, version and model, such as the names of the classes.
    Raises:
        ExportError: a folded model, whose weights fit no configuration.
    """
    if not any(isinstance(module, GhostBatchNorm) for module in model.modules()):
        raise ExportError("the model is folded and must have its batch normalisations; save the one it was folded from")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors stores row-major tensors; `load_model` gives the weights their layout back.
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = {"format": FORMAT, "version": VERSION, "model": model.config.to_dict()}
    own = {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
    data = save(weights, metadata={**(metadata or {}), **own})
    # save_file makes a file that only its owner may read, whatever the umask.
    _replace(folder / WEIGHTS_NAME, lambda path: path.write_bytes(data))
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside a path, flush, rename: model may not import the pipeline's durable.py, so this is its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_model(folder: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read what `save_model` wrote.

    Returns:
        configuration, and weights by name, on the CPU.
    Raises:
        ExportError: missing or damaged files, another format, an impossible configuration.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
        weights = load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ExportError(f"{folder} must hold {CONFIG_NAME} and {WEIGHTS_NAME} of save_model: {error}") from error
    found = [content.get(key) for key in ("format", "version")] if isinstance(content, dict) else [None, None]
    if found != [FORMAT, VERSION] or not isinstance(content.get("model"), dict):
        raise ExportError(
            f"{folder / CONFIG_NAME} has format {found[0]} version {found[1]}; "
            f"it must be {FORMAT} version {VERSION} with a model; export the model again"
        )
    try:
        return ModelConfig.from_dict(content["model"]), weights
    except (ValueError, TypeError) as error:
        raise ExportError(f"{folder / CONFIG_NAME}: {error}; export the model again") from error


def read_metadata(folder: Path | str) -> dict[str, str]:
    """Read what a file of weights says of itself.

    Raises:
        ExportError: no such file, or a damaged one.
    """
    path = Path(folder) / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{path} must be a file of weights of save_model: {error}") from error


def load_model(folder: Path | str) -> AVSlowFast:
    """Build what `save_model` wrote.

    Returns:
        the model in evaluation mode, on the default device, in channels_last_3d.
    Raises:
        ExportError: as `read_model`, or weights that do not fit the configuration.
    """
    config, weights = read_model(folder)
    model = build_model(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ExportError(f"{Path(folder) / WEIGHTS_NAME} does not fit {CONFIG_NAME}: {error}") from error
    return model.eval()


def score(model: AVSlowFast, clip: Mapping[str, Tensor], *, drop_silence: bool = True) -> Tensor:
    """Class scores of clips in any layout.

    Args:
        model: of `load_model`.
        clip: "frames" (B, 3, T, H, W), "log_mel" (B, 1, M, F), "boxes" (R, 5), those that the model has.
        drop_silence: a log_mel of nothing but zeros is a clip without sound, whose audio is dropped.
    Returns:
        (B, K), or (R, K) for the detection head, in 0..1.
    """
    frames, log_mel, more = clip.get("frames"), clip.get("log_mel"), {}
    if frames is not None:
        frames = frames.contiguous(memory_format=torch.channels_last_3d)
        if drop_silence and log_mel is not None:
            more["has_audio"] = log_mel.abs().amax((1, 2, 3)) > 0
    with torch.inference_mode():
        output: ModelOutput = model(frames, log_mel, boxes=clip.get("boxes"), **more)
    return output.scores


class Deployed(nn.Module):
    """A folded model with positional inputs in any layout: what `export_program` and `export_onnx` trace."""

    def __init__(self, model: AVSlowFast, drop_silence: bool = True) -> None:
        super().__init__()
        self.drop_silence = drop_silence
        if model.config.head == "ssl":
            raise ExportError(
                "head (ssl) must be softmax, sigmoid or detection: pretraining is not deployed; "
                "train a linear probe on it, or keep the model with save_model"
            )
        self.model = fold(model)
        set_grouping(self.model, "off")  # grouped pixels suit the GPU libraries of PyTorch, others have their own means

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs of `input_names`, in any layout -> class scores (B, K); (R, K) for the detection head."""
        given = dict(zip(input_names(self.model.config), inputs, strict=True))
        if "frames" in given:
            # The one place that changes a layout: users of an exported model have row-major tensors.
            given["frames"] = given["frames"].contiguous(memory_format=torch.channels_last_3d)
        more = {}
        if self.drop_silence and "frames" in given and "log_mel" in given:  # zeros everywhere: there is no sound
            more["has_audio"] = given["log_mel"].abs().amax((1, 2, 3)) > 0
        output: ModelOutput = self.model(given.get("frames"), given.get("log_mel"), boxes=given.get("boxes"), **more)
        return output.scores


def input_names(config: ModelConfig) -> tuple[str, ...]:
    """Inputs of an exported model, in order.

    Returns:
        those that `config` has of "frames" (B, 3, alpha_F T, H, W), "log_mel" (B, 1, M, F), "boxes" (R, 5); float32.
    """
    used = {"frames": config.has_visual, "log_mel": config.has_audio, "boxes": config.head == "detection"}
    return tuple(name for name, is_used in used.items() if is_used)


def export_program(model: AVSlowFast, *, crop_size_px: int, drop_silence: bool = True) -> torch.export.ExportedProgram:
    """A program of torch.export; clips and boxes are free in number, all else is fixed; `torch.export.save` keeps it.

    Args:
        model: evaluated as it is, with its batch normalisations folded (or already folded); pixels are square crops of
            `crop_size_px`.
        drop_silence: a log_mel of nothing but zeros is a clip without sound, whose audio is dropped; False: it is heard
            as the mean spectrum.
    Returns:
        a program with the inputs of `input_names(model.config)`.
    Raises:
        ExportError: for the ssl head.
    """
    deployed, inputs = _example(model, crop_size_px, drop_silence)
    batch, boxes = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("boxes", min=1, max=65536)
    free = tuple({0: boxes if name == "boxes" else batch} for name in input_names(model.config))
    return torch.export.export(deployed, inputs, dynamic_shapes=(free,))


def save_program(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write a program as `torch.export.save` does, without its warning about weights that are slices of a folded one.

    Args:
        program: of `export_program`, with its weights on the CPU, where that warning has no meaning.
        path: of the .pt2 file.
        facts: names -> texts that the file carries besides (`extra_files` of `torch.export.load`).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, path, extra_files=dict(facts or {}))


def export_onnx(model: AVSlowFast, path: Path | str, *, crop_size_px: int, drop_silence: bool = True) -> None:
    """Write an ONNX file with a free batch size (needs the packages onnx and onnxscript).

    Args:
        model, crop_size_px, drop_silence: as for `export_program`.
        path: of the .onnx file.
    Raises:
        ExportError: for the ssl head, or without the packages.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {' and '.join(missing)}; run `pip install onnx onnxscript`")
    program = export_program(model, crop_size_px=crop_size_px, drop_silence=drop_silence)
    names = input_names(model.config)
    torch.onnx.export(program, f=str(path), dynamo=True, input_names=names, output_names=["scores"], verbose=False)


def _example(model: AVSlowFast, crop_size_px: int, drop_silence: bool) -> tuple[Deployed, tuple[Tensor, ...]]:
    config = model.config
    if crop_size_px < 1:
        raise ExportError(f"crop_size_px ({crop_size_px}) must be at least 1; evaluations use 256")
    device = next(model.parameters()).device
    shapes = {
        "frames": (2, 3, config.num_fast_frames, crop_size_px, crop_size_px),
        "log_mel": (2, 1, config.num_mel_frames, config.num_mel_bins),
        "boxes": (3, 5),  # another number than of clips, so that the two stay apart
    }
    return Deployed(model, drop_silence), tuple(
        torch.zeros(shapes[name], device=device) for name in input_names(config)
    )
