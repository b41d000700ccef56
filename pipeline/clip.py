"""What a clip is, in plain numbers: the shape every clip of a run has, and the plan of one clip."""

from dataclasses import dataclass
from typing import Protocol

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of [0, 1]; SlowFast's
STFT_WINDOW_SAMPLES = 512
STFT_HOP_SAMPLES = 256


class ModelShape(Protocol):
    """What a model's configuration says about the clips that it takes."""

    @property
    def num_fast_frames(self) -> int:
        """Frames of one clip, alpha_fast * T."""
        ...

    @property
    def frame_stride(self) -> int:
        """Source frames between two frames of Slow, tau."""
        ...

    @property
    def alpha_fast(self) -> int:
        """Frames of Fast for each frame of Slow."""
        ...

    @property
    def num_mel_frames(self) -> int:
        """Log-mel frames of one clip."""
        ...

    @property
    def num_mel_bins(self) -> int:
        """Mel bins of a log-mel frame."""
        ...


@dataclass(frozen=True)
class ClipSpec:
    """The shape of every clip of a run (paper section 4, "Audio pathway" and "Training").

    How large the pictures are and how many frames a second has is said once, by `DataConfig` and `ViewConfig`.

    Args:
        num_frames: Frames handed to the model, alpha_fast * T.
        frame_stride: Steps between them at `DataConfig.target_fps`, tau / alpha_fast.
        num_mel_frames: Columns of the log-mel spectrogram.
        num_mel_bins: Its rows.

    Raises:
        ValueError: one of them is no whole number, or less than 1.
    """

    num_frames: int
    frame_stride: int
    num_mel_frames: int = 128
    num_mel_bins: int = 80

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} ({value!r}) of a ClipSpec must be a whole number, at least 1; "
                    "ClipSpec.for_model gives them all"
                )

    @classmethod
    def for_model(cls, model: ModelShape) -> "ClipSpec":
        """Return the clip that a model takes: alpha_fast * T frames tau / alpha_fast apart, and its log-mel.

        Args:
            model: Its configuration (`model.ModelConfig`).

        Raises:
            ValueError: tau is no multiple of alpha_fast.
            TypeError: something else than a configuration, such as the name of a variant.
        """
        if not hasattr(model, "num_fast_frames"):
            raise TypeError(f"model ({type(model).__name__}) must be a ModelConfig, such as VARIANTS['small']")
        if model.frame_stride % model.alpha_fast:
            raise ValueError(
                f"model.frame_stride ({model.frame_stride}) must be a multiple of model.alpha_fast "
                f"({model.alpha_fast}); Fast takes every (frame_stride / alpha_fast)-th frame"
            )
        return cls(
            num_frames=model.num_fast_frames,
            frame_stride=model.frame_stride // model.alpha_fast,
            num_mel_frames=model.num_mel_frames,
            num_mel_bins=model.num_mel_bins,
        )

    @property
    def num_audio_samples(self) -> int:
        """Samples of 16 kHz audio for `num_mel_frames` uncentred windows of 512 at hop 256."""
        return (self.num_mel_frames - 1) * STFT_HOP_SAMPLES + STFT_WINDOW_SAMPLES

    def at(self, target_fps: float) -> "ClipTimes":
        """Return the clip in seconds; media of another rate keep the same span in seconds.

        Args:
            target_fps: Rate that `frame_stride` counts in.
        """
        return ClipTimes(self.num_frames, self.frame_stride / target_fps, self.num_audio_samples)


@dataclass(frozen=True)
class ClipTimes:
    """A clip on the time line.

    Args:
        num_frames: Frames handed to the model.
        frame_step_s: Seconds between two of them.
        num_audio_samples: Samples of the audio window, 16 kHz.
    """

    num_frames: int
    frame_step_s: float
    num_audio_samples: int

    @property
    def span_s(self) -> float:
        """Seconds that the raw clip covers, T * tau frames at the target rate."""
        return self.num_frames * self.frame_step_s


@dataclass(frozen=True)
class CropWindow:
    """A rectangle in source pixels (stored picture) that becomes the square model input."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class ClipBox:
    """A box as it lies in one crop of a clip.

    Args:
        crop: Number of the crop.
        index: Number of the box in its sample.
        corners: x1, y1, x2, y2 in pixels of the model's input.
        labels: Its classes.
    """

    crop: int
    index: int
    corners: tuple[float, float, float, float]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ClipPlan:
    """Everything that is decided about one clip before any byte is read.

    Args:
        position: Place in the stream of the run (training) or of the evaluation.
        epoch: Pass over the split that it belongs to.
        sample: Row of the split's sample table.
        id: Name of the sample.
        media: Row of the media table.
        start_s: Time of the clip's first frame in the medium.
        end_s: Time of its last frame.
        frames: Source frame numbers, one per model frame, not decreasing.
        audio_start: First 16 kHz sample of the window; may be negative or reach past the end (zeros there).
        crops: One window per spatial view; training has one.
        size_px: Height and width that each window is resized to.
        flip: Mirror left and right.
        rotation: Quarter turns counter-clockwise, 0..3 (self-supervised rotation task).
        labels: Classes that count for this clip, at most one for `label_kind` single.
        boxes: What lies in the crops, by crop; None where the split has no boxes.
        negative_media: Medium of the out-of-sync audio, -1 for none; the clip's own one for a hard negative.
        negative_start: Its first sample.
        view: Number of the temporal view (evaluation), else 0.
        substitute_for: Sample whose slot this clip fills, -1 where it is the planned one itself.
    """

    position: int
    epoch: int
    sample: int
    id: str
    media: int
    start_s: float
    end_s: float
    frames: tuple[int, ...]
    audio_start: int
    crops: tuple[CropWindow, ...]
    size_px: tuple[int, int]
    flip: bool = False
    rotation: int = 0
    labels: tuple[int, ...] = ()
    boxes: tuple[ClipBox, ...] | None = None
    negative_media: int = -1
    negative_start: int = 0
    view: int = 0
    substitute_for: int = -1
