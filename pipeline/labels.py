"""What a clip is labelled with: the classes that count for it, and its boxes through crop, flip and rotation."""

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipBox, CropWindow
from pipeline.config import DataConfig
from pipeline.dataset import Dataset, SampleTable


def clip_labels(
    samples: SampleTable, sample: int, config: DataConfig, moment: tuple[float, float] | None
) -> tuple[int, ...]:
    """Return the classes that count for a clip.

    Args:
        samples: Sample table of the split.
        sample: Row.
        config: Label set and kind. Kind `single` gives at most one class, `boxes` none: they have their own.
        moment: Times of the first and the last frame: with timed labels those count that last into this span, both
            ends included. None (evaluation): all of the sample's, also those whose time lies behind the file's end.

    Raises:
        ValueError: several labels where kind `single` wants one.
    """
    name = config.label_set
    if config.label_kind == "boxes":
        return ()
    if config.label_kind == "single":
        known = samples.has(name) and len(samples.labels(name).row(sample)) > 0
        return (samples.label_of(sample, name),) if known else ()
    if config.label_kind == "multi_hot":
        return tuple(samples.labels(name).row(sample).tolist())
    actions = samples.actions(sample)
    if moment is None:
        whole = samples.labels(name).row(sample) if samples.has(name) else ()
        return tuple(np.union1d(actions.label, np.asarray(whole, np.int32)).tolist())
    begin, end = moment
    return tuple(np.unique(actions.label[(actions.start_s <= end) & (actions.end_s >= begin)]).tolist())


def clip_boxes(
    dataset: Dataset,
    sample: int,
    crops: tuple[CropWindow, ...],
    size_px: tuple[int, int],
    flip: bool,
    rotation: int,
    *,
    labelled: bool = True,
) -> tuple[ClipBox, ...] | None:
    """Return the boxes that lie in the crops of a clip, cut at their edges; None if the split has no boxes at all.

    Args:
        dataset: The split.
        sample: Row of its sample table.
        crops: The clip's crop windows.
        size_px: Height and width of the model's input.
        flip: Whether the clip is mirrored.
        rotation: Quarter turns counter-clockwise.
        labelled: The boxes with labels (ground truth, and in training detections that match it), or those without
            (detections to be scored).
    """
    table, samples = dataset.media, dataset.samples
    if samples.box_columns is None or not len(samples.box_columns[0].values):
        return None
    media, described = int(samples.media[sample]), samples.boxes(sample)
    stored, classes = (int(table.height[media]), int(table.width[media])), described.classes()
    found = []
    for crop, window in enumerate(crops):
        pixels, keep = to_input_pixels(described.boxes, window, stored, size_px, flip, rotation)
        for index in np.flatnonzero(keep & ((described.label_counts > 0) == labelled)).tolist():
            x1, y1, x2, y2 = pixels[index].tolist()
            found.append(ClipBox(crop, index, (x1, y1, x2, y2), classes[index]))
    return tuple(found)


def to_input_pixels(
    boxes: NDArray[np.float32],
    window: CropWindow,
    stored_size_px: tuple[int, int],
    size_px: tuple[int, int],
    flip: bool,
    quarter_turns: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Carry boxes from the picture into the model's input.

    Args:
        boxes: (R, 4) x1, y1, x2, y2 in [0, 1] of the picture.
        window: The crop, in stored pixels.
        stored_size_px: Height and width of the stored picture.
        size_px: Height and width of the input.
        flip: Whether the clip is mirrored left and right.
        quarter_turns: Quarter turns counter-clockwise that follow (square inputs).

    Returns:
        (R, 4) float32 boxes in input pixels clipped to the input, and (R,) bool: whether anything of the box is left.
    """
    height, width = stored_size_px
    to_stored = np.array([width, height, width, height], np.float32)
    origin = np.array([window.left, window.top, window.left, window.top], np.float32)
    scale = np.array([size_px[1] / window.width, size_px[0] / window.height] * 2, np.float32)
    out = (boxes * to_stored - origin) * scale
    out[:, 0::2] = out[:, 0::2].clip(0, size_px[1])
    out[:, 1::2] = out[:, 1::2].clip(0, size_px[0])
    if flip:
        out[:, [0, 2]] = size_px[1] - out[:, [2, 0]]
    for _ in range(quarter_turns):  # a point (x, y) goes to (y, side - x)
        out = np.stack([out[:, 1], size_px[1] - out[:, 2], out[:, 3], size_px[1] - out[:, 0]], axis=1)
    keep = (out[:, 2] - out[:, 0] >= 1) & (out[:, 3] - out[:, 1] >= 1)
    return out.astype(np.float32), keep
