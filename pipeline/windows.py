"""Where a clip lies: frames and audio in time, crop windows in space. Pure arithmetic, no randomness, no I/O.

Video and audio are tied by time stamps: a frame number is turned into seconds by the medium's own rate and the audio
window is centred on the clip.
"""

import math

import numpy as np

from pipeline.clip import ClipTimes, CropWindow
from pipeline.dataset import SAMPLE_RATE_HZ, MediaTable

EPSILON = 1e-6  # of a frame: keeps floor() from falling one short


def frame_range(table: MediaTable, media: int, start_s: float, end_s: float) -> tuple[int, int]:
    """Return the first frame of [start_s, end_s) and the one after its last, inside the medium and never empty."""
    total, fps = int(table.num_frames[media]), table.fps(media)
    first = min(max(math.floor(start_s * fps + EPSILON), 0), total - 1)
    stop = min(max(math.ceil(end_s * fps - EPSILON), first + 1), total)
    return first, stop


def span_frames(clip: ClipTimes, fps: float) -> int:
    """Return the source frames that a clip's raw window covers at `fps`."""
    return max(1, math.ceil(clip.span_s * fps - EPSILON))


def start_range(table: MediaTable, media: int, segment: tuple[float, float], clip: ClipTimes) -> tuple[int, int]:
    """Return the least and the greatest start frame of a clip of a segment.

    A segment longer than the clip gives every start that keeps the clip inside it. A shorter one is centred and
    borrows context from the medium around it (EPIC-Kitchens: half of the segments). A medium shorter than the clip
    starts at 0, and the last frame is repeated.
    """
    first, stop = frame_range(table, media, *segment)
    span, total = span_frames(clip, table.fps(media)), int(table.num_frames[media])
    if stop - first >= span:
        return first, stop - span
    centred = (first + stop - span) // 2
    start = min(max(centred, 0), max(total - span, 0))
    return start, start


def centred_start(table: MediaTable, media: int, key_time_s: float, clip: ClipTimes) -> int:
    """Return the start frame (may be negative) of the clip whose middle shows `key_time_s` (AVA key frames)."""
    return math.floor((key_time_s - clip.span_s / 2) * table.fps(media) + 0.5)


def clip_frames(table: MediaTable, media: int, start_frame: int, clip: ClipTimes) -> tuple[int, ...]:
    """Return the source frames shown at the clip's times, clamped to the medium."""
    step = clip.frame_step_s * table.fps(media)
    numbers = start_frame + np.floor(np.arange(clip.num_frames) * step + EPSILON).astype(np.int64)
    last = int(table.num_frames[media]) - 1
    return tuple(np.minimum(np.maximum(numbers, 0), last).tolist())


def audio_start(start_s: float, clip: ClipTimes) -> int:
    """Return the first 16 kHz sample of the window that is centred on a clip starting at `start_s`."""
    return round((start_s + clip.span_s / 2) * SAMPLE_RATE_HZ - clip.num_audio_samples / 2)


def sound_starts(sound: tuple[int, int], segment: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the least and the greatest first sample of a window of a segment's sound.

    Windows lie wholly inside both; where the segment has less sound than a window takes, the window is centred on the
    segment and moved into the sound around it, and where all sound is shorter, the window is centred on that.

    Args:
        sound: First sample of the medium's sound and the one after its last; not empty.
        segment: The same for the segment, anywhere.
        count: Samples of the window.
    """
    first, last = sound[0], sound[1] - count
    if last < first:
        return (first + last) // 2, (first + last) // 2
    low, high = max(first, segment[0]), min(last, segment[1] - count)
    if low <= high:
        return low, high
    start = min(max((segment[0] + segment[1] - count) // 2, first), last)
    return start, start


def view_starts(low: int, high: int, count: int, rule: str) -> list[int]:
    """Return the start frames of `count` evaluation clips; one clip is the middle one.

    Args:
        low: Least start frame.
        high: Greatest start frame (segment length minus clip length).
        count: Clips.
        rule: "ends" covers low..high including both; "pyslowfast" (high - low) * i / count never reaches the end;
            "offset" i * floor((high - low) / (count - 1)).
    """
    room = high - low
    if count == 1:
        return [low + room // 2]
    if rule == "pyslowfast":
        return [low + room * i // count for i in range(count)]
    if rule == "offset":
        return [low + i * (room // (count - 1)) for i in range(count)]
    assert rule == "ends", rule
    return [low + round(i * room / (count - 1)) for i in range(count)]


def crop_window(
    table: MediaTable, media: int, short_side_px: int, size_px: tuple[int, int], at: tuple[float, float]
) -> CropWindow:
    """Return the stored-picture rectangle that a resize to `short_side_px` followed by a crop would keep.

    Args:
        table: Media.
        media: Row.
        short_side_px: Short side of the displayed picture after the resize.
        size_px: Height and width of the crop.
        at: Vertical and horizontal place of the crop in the room that is left, 0..1 each.
    """
    shown_w, shown_h = float(table.display_width[media]), float(table.display_height[media])
    scale = short_side_px / min(shown_w, shown_h)
    resized_w, resized_h = max(shown_w * scale, size_px[1]), max(shown_h * scale, size_px[0])
    to_stored_x, to_stored_y = float(table.width[media]) / resized_w, float(table.height[media]) / resized_h
    return CropWindow(
        left=(resized_w - size_px[1]) * at[1] * to_stored_x,
        top=(resized_h - size_px[0]) * at[0] * to_stored_y,
        width=size_px[1] * to_stored_x,
        height=size_px[0] * to_stored_y,
    )


def view_windows(
    table: MediaTable, media: int, num_crops: int, crop_size_px: int
) -> tuple[tuple[CropWindow, ...], tuple[int, int]]:
    """Return the crop windows of an evaluation clip and the size of the input.

    Args:
        table: Media.
        media: Row.
        num_crops: 1: centre; 3: start, middle and end of the longer side; 0: the whole frame, short side
            `crop_size_px`, both sides rounded to multiples of 16 (AVA, fully convolutional).
        crop_size_px: Short side, and side of the crops.
    """
    if num_crops == 0:
        shown_w, shown_h = float(table.display_width[media]), float(table.display_height[media])
        scale = crop_size_px / min(shown_w, shown_h)
        size = (max(16, round(shown_h * scale / 16) * 16), max(16, round(shown_w * scale / 16) * 16))
        whole = CropWindow(0.0, 0.0, float(table.width[media]), float(table.height[media]))
        return (whole,), size
    size = (crop_size_px, crop_size_px)
    places = [0.5] if num_crops == 1 else [0.0, 0.5, 1.0]
    tall = int(table.display_height[media]) > int(table.display_width[media])
    ats = [(p, 0.5) if tall else (0.5, p) for p in places]
    return tuple(crop_window(table, media, crop_size_px, size, at) for at in ats), size
