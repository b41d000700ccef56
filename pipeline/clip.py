"""What a clip is, in plain numbers: the plan of one clip and the shape every clip of a run has."""

from dataclasses import dataclass

STFT_WINDOW_SAMPLES = 512
STFT_HOP_SAMPLES = 256


@dataclass(frozen=True)
class ClipSpec:
    """The shape of every clip of a run (paper section 4, "Audio pathway" and "Training").

    Args:
        num_frames: Frames handed to the model, alpha_fast * T.
        frame_stride: Steps between them at `target_fps`, tau / alpha_fast.
        target_fps: Rate that `frame_stride` counts in; media of another rate keep the same span in seconds.
        crop_size_px: Side of the square crop.
        num_mel_frames: Columns of the log-mel spectrogram.
        num_mel_bins: Its rows.
    """

    num_frames: int
    frame_stride: int
    target_fps: float
    crop_size_px: int
    num_mel_frames: int
    num_mel_bins: int

    @property
    def frame_step_s(self) -> float:
        """Seconds between two frames of the clip."""
        return self.frame_stride / self.target_fps

    @property
    def span_s(self) -> float:
        """Seconds that the raw clip covers: T * tau frames at `target_fps`."""
        return self.num_frames * self.frame_step_s

    @property
    def num_audio_samples(self) -> int:
        """Samples of 16 kHz audio for `num_mel_frames` uncentred windows of 512 at hop 256."""
        return (self.num_mel_frames - 1) * STFT_HOP_SAMPLES + STFT_WINDOW_SAMPLES


@dataclass(frozen=True)
class CropWindow:
    """A rectangle in source pixels (stored picture) that becomes the square model input."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class ClipPlan:
    """Everything that is decided about one clip before any byte is read.

    Args:
        position: Place in the stream of the run (training) or of the evaluation.
        epoch: Pass over the split that it belongs to.
        sample: Row of the split's sample table.
        media: Row of the media table.
        start_s: Time of the clip's first frame in the medium.
        end_s: Time of its last frame.
        frames: Source frame numbers, one per model frame, not decreasing.
        audio_start: First 16 kHz sample of the window; may be negative or reach past the end (zeros there).
        crops: One window per spatial view; training has one.
        size_px: Height and width that each window is resized to.
        flip: Mirror left and right.
        rotation: Quarter turns counter-clockwise, 0..3 (self-supervised rotation task).
        negative_media: Medium of the out-of-sync audio, -1 for none.
        negative_start: Its first sample.
        negative_is_hard: Whether it comes from the same medium.
        view: Number of the temporal view (evaluation), else 0.
        substitute_for: Sample whose slot this clip fills, -1 where it is the planned one itself.
    """

    position: int
    epoch: int
    sample: int
    media: int
    start_s: float
    end_s: float
    frames: tuple[int, ...]
    audio_start: int
    crops: tuple[CropWindow, ...]
    size_px: tuple[int, int]
    flip: bool = False
    rotation: int = 0
    negative_media: int = -1
    negative_start: int = 0
    negative_is_hard: bool = False
    view: int = 0
    substitute_for: int = -1
