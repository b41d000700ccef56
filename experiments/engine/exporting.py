"""A trained model written for use elsewhere: weights, program or ONNX, with facts and an example."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from experiments.cli.parser import installed_version
from experiments.config import Config
from experiments.engine.export_example import example_of
from experiments.engine.exported import prediction_settings
from experiments.engine.initial_weights import FACTS_NAME
from experiments.engine.trained_model import load_model
from experiments.records.checkpoint import Checkpoint
from experiments.records.run_folder import make_folder
from experiments.records.sealed import strict_json
from model.avslowfast import AVSlowFast
from model.export import (
    ONNX_NAME,
    PROGRAM_NAME,
    export_onnx,
    export_program,
    input_names,
    save_model,
    save_program,
)
from pipeline.clip import PIXEL_MEAN, PIXEL_STD, ClipSpec
from pipeline.graph import LOG_MEL_MEAN, LOG_MEL_STD
from pipeline.store.durable import write_file


class OutputFolderError(ValueError):
    """A folder that an export must not write into."""


class NotFiniteError(ValueError):
    """A model whose scores are not finite, so that an export of it is of no use."""


def export_checkpoint(config: Config, checkpoint: Checkpoint, folder: Path, kind: str) -> list[Path]:
    """Write one form of a trained model, inputs.json: what it wants to see and what its scores mean, and an example.

    Weights and programs carry the same facts inside: in the metadata of the safetensors file, and in the `extra_files`
    of the program.

    Args:
        config: of the run.
        checkpoint: verified.
        folder: absent or empty.
        kind: one of `EXPORT_FORMATS` of cli/parser.py.

    Returns:
        The files.

    Raises:
        OutputFolderError: the folder holds something, or cannot be made.
        NotFiniteError: the scores of a trial input are nan or inf.
        ExportError: a head that cannot be exported, a package missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputFolderError(f"--out ({folder}) must be absent or an empty folder; choose another one")
    model = load_model(config, checkpoint, torch.device("cpu"))
    require_finite_scores(model, config, str(checkpoint.path))
    made, size, silence = not folder.exists(), config.views.crop_size_px, config.model.drops_silence
    make_folder(folder, f"--out ({folder})", "choose another one")
    try:
        facts = input_facts(config, checkpoint)
        if kind == "weights":
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
            save_model(model, folder, texts)
        elif kind == "program":
            program = export_program(model, crop_size_px=size, drop_silence=silence)
            save_program(program, folder / PROGRAM_NAME, {FACTS_NAME: strict_json(facts)})
        else:
            export_onnx(model, folder / ONNX_NAME, crop_size_px=size, drop_silence=silence)
        write_file(folder / FACTS_NAME, strict_json(facts))
        if "boxes" not in input_names(model.config):
            for name, text in example_of(kind).items():
                write_file(folder / name, text)
    except BaseException:  # also Ctrl-C: nothing unfinished stays, and the same command works again
        for file in folder.iterdir():
            file.unlink()
        if made:
            folder.rmdir()
        raise
    return sorted(folder.iterdir())


def require_finite_scores(model: AVSlowFast, config: Config, name: str) -> None:
    """Run a model on one clip of noise and raise NotFiniteError if its scores are not finite.

    Args:
        model: in evaluation mode, on the CPU; one that needs boxes is not run.
        config: of the run, gives the size of the crop.
        name: of the checkpoint, for the message.
    """
    wanted, sizes = input_names(model.config), model.config
    if "boxes" in wanted:
        return
    generator = torch.Generator().manual_seed(0)
    size = config.views.crop_size_px
    frames = torch.randn(1, 3, sizes.num_fast_frames, size, size, generator=generator)
    log_mel = torch.randn(1, 1, sizes.num_mel_frames, sizes.num_mel_bins, generator=generator)
    with torch.inference_mode():
        scores = model(
            frames.contiguous(memory_format=torch.channels_last_3d) if "frames" in wanted else None,
            log_mel if "log_mel" in wanted else None,
        ).scores
    if not scores.isfinite().all():
        raise NotFiniteError(
            f"checkpoint {name} must give finite scores and gives others for a clip of noise: its weights have "
            "diverged; export an earlier checkpoint, or train with a lower optim.lr"
        )


def input_facts(config: Config, checkpoint: Checkpoint) -> dict[str, object]:
    """Return what a user of the exported model has to know: inputs, their preparation, and the classes.

    Args:
        config: of the run.
        checkpoint: the exported one.
    """
    model = config.model
    spec = ClipSpec.for_model(model)
    frames = {
        "shape": ["batch", 3, model.num_fast_frames, config.views.crop_size_px, config.views.crop_size_px],
        "order": "RGB in 0..1, minus mean, over std",
        "mean": [PIXEL_MEAN] * 3,
        "std": [PIXEL_STD] * 3,
        "frames_per_second": config.data.target_fps / spec.frame_stride,
    }
    log_mel = {
        "shape": ["batch", 1, model.num_mel_frames, model.num_mel_bins],
        "preparation": "mono 16 kHz; Hann window 512, hop 256, n_fft 512, power 2, not centred; HTK mel scale, Slaney "
        "norm; ln(S + 1e-8), minus mean, over std; its middle is the clip's",
        "mean": LOG_MEL_MEAN,
        "std": LOG_MEL_STD,
        "clip_without_sound": "zeros everywhere",  # its audio is dropped, or heard as the mean: clips_without_sound
    }
    more = {"clip_s": spec.num_frames * spec.frame_stride / config.data.target_fps}  # what a clip covers
    shapes: dict[str, dict[str, object]] = {"frames": frames, "log_mel": log_mel}
    shapes["boxes"] = {"shape": ["boxes", 5], "order": "clip, x1, y1, x2, y2"}
    return {
        "inputs": {name: shapes[name] | more for name in input_names(model)},
        "output": "class scores in 0..1",
        "class_names": list(checkpoint.load().get("class_names", ())),
        "drops_silence": model.drops_silence,
        "task": config.train.task,
        "settings": prediction_settings(config),
        "project_version": installed_version(),
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
    }
