"""What a model takes, checked on the host from shapes, types and devices alone: nothing here waits for a device.

Legend: B clips, T frames, H W pixels, M audio frames, F mel bins, R boxes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig
from model.pixel_groups import lies_in_four_channels

_BOX_RULE = "hold a whole clip number in [0, B) and 0 <= x1 <= x2 <= W, 0 <= y1 <= y2 <= H in input pixels"


class ModelInputError(ValueError):
    """An input that the model cannot take; the message gives the value, the rule and a remedy."""


def check_inputs(
    config: ModelConfig,
    device: torch.device,
    given: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor | None],
    *,
    drop_audio: bool,
) -> None:
    """Raise unless everything that a model is given fits its configuration, the other inputs and its device.

    Args:
        config: of the model.
        device: where it is.
        given: frames, log_mel, negative_log_mel and boxes as `AVSlowFast.forward` takes them.
        masks: audio_keep, has_audio and has_negative.
        drop_audio: whether this step is without audio.
    Raises:
        ModelInputError: naming the first that does not fit.
    """
    frames, log_mel, negative = given["frames"], given["log_mel"], given["negative_log_mel"]
    if config.has_visual:
        if frames is None:
            raise ModelInputError("frames (None) must be given: this model has visual pathways")
        check_frames(frames, config)
        check_boxes(given["boxes"], frames, config)
    elif log_mel is None or drop_audio or any(mask is not None for mask in masks.values()):
        raise ModelInputError(
            "log_mel (None, or dropped by drop_audio, audio_keep or has_audio) must be given to an audio-only model"
        )
    if log_mel is not None and config.has_audio:
        check_log_mel("log_mel", log_mel, config)
        if frames is not None and frames.shape[0] != log_mel.shape[0]:  # len() would fix B in an exported program
            raise ModelInputError(
                f"log_mel {tuple(log_mel.shape)} must have as many clips as frames {tuple(frames.shape)}"
            )
    if negative is not None:
        check_negative(negative, log_mel, config)
    for name, mask in masks.items():
        if mask is not None and frames is not None:
            check_mask(name, mask, frames.shape[0])
    for name, x in {**given, **masks}.items():
        if x is not None and (config.has_audio or name in ("frames", "boxes")):
            check_place(name, x, device)


def check_frames(frames: Tensor, config: ModelConfig) -> None:
    """Raise unless frames are (B, 3, alpha_F T, H, W), float, in channels_last_3d, or three of four such channels.

    Of four channels in memory the fourth must be zero, which is not looked at: NaN or infinity there reach the output.

    Raises:
        ModelInputError: no tensor, or one that does not fit, naming the shape, the type or the strides.
    """
    if not isinstance(frames, Tensor):
        raise ModelInputError(
            f"frames ({type(frames).__name__}) must be a tensor; a Batch: (batch.frames, batch.log_mel)"
        )
    if frames.dim() != 5 or frames.shape[1] != 3 or frames.shape[2] != config.num_fast_frames or _empty(frames):
        raise ModelInputError(
            f"frames {tuple(frames.shape)} must be (B, 3, {config.num_fast_frames}, H, W), none of them 0: "
            f"alpha_fast ({config.alpha_fast}) x num_frames ({config.num_frames}) frames"
        )
    _check_float("frames", frames, "subtract the mean and divide by the deviation first")
    if not (frames.is_contiguous(memory_format=torch.channels_last_3d) or lies_in_four_channels(frames)):
        raise ModelInputError(
            f"frames of strides {tuple(frames.stride())} must be channels_last_3d; "
            "call .to(memory_format=torch.channels_last_3d) where they are made: the model re-lays out nothing"
        )


def check_log_mel(name: str, log_mel: Tensor, config: ModelConfig) -> None:
    """Raise unless a log-mel is (B, 1, M, F), float, with the configuration's F and, where laterals need it, its M.

    Raises:
        ModelInputError: naming the shape or the type.
    """
    if log_mel.dim() != 4 or log_mel.shape[1] != 1 or _empty(log_mel):
        raise ModelInputError(
            f"{name} {tuple(log_mel.shape)} must be (B, 1, M, F), none of them 0: one channel, time, mel bins"
        )
    _check_float(name, log_mel, "pass normalised log-mels")
    if log_mel.shape[3] != config.num_mel_bins:
        raise ModelInputError(
            f"{name} {tuple(log_mel.shape)} must have num_mel_bins ({config.num_mel_bins}) in its last dimension; "
            "change num_mel_bins or what makes the log-mels"
        )
    if config.audio_fusion_stages and log_mel.shape[2] != config.num_mel_frames:
        raise ModelInputError(
            f"{name} {tuple(log_mel.shape)} must have alpha_audio x num_frames = {config.num_mel_frames} frames, "
            "so that its laterals meet the visual frames; change alpha_audio or the loader's window"
        )


def check_negative(negative: Tensor, log_mel: Tensor | None, config: ModelConfig) -> None:
    """Raise unless an out-of-sync sound can be compared: the model has a loss for it, and there is a sound in sync.

    Raises:
        ModelInputError: on a model or a call without one of them, or another shape than the sound's.
    """
    if config.sync_loss == "none":
        raise ModelInputError(
            "negative_log_mel must be None: sync_loss (none) has nothing to compare it with; "
            "leave it out (data.negatives=none) or set sync_loss"
        )
    if log_mel is None:
        raise ModelInputError("negative_log_mel must come with log_mel (None), the sound in sync; pass both or neither")
    check_log_mel("negative_log_mel", negative, config)
    if negative.shape != log_mel.shape:
        raise ModelInputError(
            f"negative_log_mel {tuple(negative.shape)} must have the shape of log_mel {tuple(log_mel.shape)}"
        )


def check_mask(name: str, mask: Tensor, clips: int) -> None:
    """Raise unless `audio_keep`, `has_audio` or `has_negative` is (B,) bool.

    Raises:
        ModelInputError: naming the shape or the type.
    """
    if mask.shape != (clips,) or mask.dtype != torch.bool:
        raise ModelInputError(
            f"{name} {tuple(mask.shape)} {mask.dtype} must be (B,) = ({clips},) bool, False for a clip without; "
            "compare numbers with 0"
        )


def check_boxes(boxes: Tensor | None, frames: Tensor, config: ModelConfig) -> None:
    """Raise unless boxes are (R, 5) float, on a clip of the batch and within its pixels, for a detection head alone.

    Values are compared where they are. On a CPU a wrong one raises; on a GPU, and in a compiled or exported program, a
    device-side assertion stops the program when it gets there, because asking for the answer would wait for the device.

    Raises:
        ModelInputError: naming the shape, the type or the first wrong box.
    """
    if config.head != "detection":
        if boxes is not None:
            raise ModelInputError(f"boxes must be None: head ({config.head}) classifies clips; set head=detection")
        return
    if boxes is None:
        raise ModelInputError("boxes (None) must be (R, 5) for the detection head; pass clip number, x1, y1, x2, y2")
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ModelInputError(f"boxes {tuple(boxes.shape)} must be (R, 5): clip number, x1, y1, x2, y2")
    _check_float("boxes", boxes, "call .float()")
    clip, x1, y1, x2, y2 = boxes.unbind(1)
    fits = (clip >= 0) & (clip < frames.shape[0]) & (clip == clip.floor())
    fits = fits & (x1 >= 0) & (x1 <= x2) & (x2 <= frames.shape[4])
    fits = fits & (y1 >= 0) & (y1 <= y2) & (y2 <= frames.shape[3])  # false for nan
    if torch.compiler.is_compiling() or boxes.device.type != "cpu":
        torch._assert_async(fits.all(), f"boxes must {_BOX_RULE}")
    elif len(boxes) and not fits.all():
        row = int(fits.logical_not().nonzero()[0])
        clips, size = frames.shape[0], tuple(frames.shape[3:])
        raise ModelInputError(
            f"boxes[{row}] ({boxes[row].tolist()}) must {_BOX_RULE}; B is {clips}, (H, W) is {size}: clip boxes first"
        )


def check_place(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless an input lies where the model does.

    Raises:
        ModelInputError: naming both devices.
    """
    if x.device != device:
        raise ModelInputError(f"{name} on {x.device} must be on the model's device {device}; call .to() on one")


def _check_float(name: str, x: Tensor, remedy: str) -> None:
    if not x.is_floating_point():
        raise ModelInputError(f"{name} of {x.dtype} must be floating point; {remedy}")


def _empty(x: Tensor) -> bool:
    return any(size == 0 for size in x.shape)
