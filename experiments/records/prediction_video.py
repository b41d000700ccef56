"""An annotated copy of a video: the best classes at each moment drawn on it, and boxes with theirs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from experiments.records.fonts import font_runs, shown
from experiments.records.media_views import Picture, picture_size
from experiments.records.prediction_files import clock
from experiments.records.predictions import Prediction
from pipeline.dataset import SAMPLE_RATE_HZ
from pipeline.folder.describe import PlainFile
from pipeline.folder.read import shown_frames
from pipeline.folder.sound import read_samples

MOST_PX, LEAST_PX, TOP, SOUND_S = 1280, 480, 3, 5
_TICKS = 90_000  # a second
_HALF_S = 0.5  # how long before and after its key frame a box is shown, at most
_COLOURS = ((255, 214, 0), (0, 200, 255), (255, 110, 180), (120, 230, 80), (255, 140, 40), (190, 150, 255))


def write_annotated(found: Prediction, path: Path, num_threads: int = 1) -> None:
    """Write an MP4 (H.264, AAC mono of 16 kHz: what the model hears) with the predictions drawn on its pictures.

    Frames keep their times; memory does not grow with the length.

    Args:
        found: scored, with its file.
        path: appears when it is whole, replaced if there.
        num_threads: of the encoder.

    Raises:
        MediaError: pictures or sound that cannot be decoded.
    """
    assert found.file is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            _write(container, found, found.file, num_threads)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(container: Any, found: Prediction, file: PlainFile, num_threads: int) -> None:
    size = picture_size(file, MOST_PX, LEAST_PX)
    stream = container.add_stream("libx264", rate=file.fps, options={"crf": "23", "preset": "veryfast"})
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, _TICKS)
    stream.codec_context.thread_count = num_threads
    sound = _Sound(container, file) if file.num_samples else None
    annotator, last = Annotator(found, size), -1
    for seconds, frame in shown_frames(file):
        ticks = round(seconds * _TICKS)
        if ticks <= last:
            continue  # two pictures at the same time: players show one
        last = ticks
        picture = annotator.drawn(_upright(frame, file, size), float(seconds))
        made = av.VideoFrame.from_ndarray(picture, format="rgb24")
        made.pts, made.time_base = ticks, Fraction(1, _TICKS)
        container.mux(stream.encode(made))
        if sound is not None:
            sound.write_until(float(seconds) + 1)
    container.mux(stream.encode(None))
    if sound is not None:
        sound.finish()


def _upright(frame: Any, file: PlainFile, size: tuple[int, int]) -> Picture:
    """Return a decoded frame as (H, W, 3), turned and of the wanted size."""
    width, height = size if file.quarters % 2 == 0 else size[::-1]
    picture = frame.reformat(width, height, format="rgb24").to_ndarray()
    picture = np.rot90(picture, file.quarters)
    return np.ascontiguousarray(picture[:, ::-1] if file.mirror else picture)


class _Sound:
    """The sound of a file, encoded piece by piece."""

    def __init__(self, container: Any, file: PlainFile) -> None:
        self._container, self._file, self._done = container, file, 0
        self._total = min(file.num_samples, int(file.num_frames / file.fps * SAMPLE_RATE_HZ))
        self._stream = container.add_stream("aac", rate=SAMPLE_RATE_HZ)
        self._stream.layout = "mono"

    def write_until(self, seconds: float) -> None:
        """Write what comes before a time, in pieces of `SOUND_S` seconds."""
        while self._done < min(self._total, int(seconds * SAMPLE_RATE_HZ)):
            count = min(SOUND_S * SAMPLE_RATE_HZ, self._total - self._done)
            samples = read_samples(self._file, self._done, count)
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = SAMPLE_RATE_HZ, Fraction(1, SAMPLE_RATE_HZ), self._done
            self._container.mux(self._stream.encode(frame))
            self._done += count

    def finish(self) -> None:
        """Write the rest."""
        self.write_until(self._total / SAMPLE_RATE_HZ + 1)
        self._container.mux(self._stream.encode(None))


class Annotator:
    """Draws predictions on pictures of one size.

    Args:
        found: scored.
        size: width and height, px.
    """

    def __init__(self, found: Prediction, size: tuple[int, int]) -> None:
        self._found, (self._width, self._height) = found, size
        self._text_px = max(10, round(min(size) / 22))
        self._middles: NDArray[np.float64] = found.times_s.mean(1)
        times = found.boxes.times_s if found.boxes is not None else np.zeros(0)
        gaps = np.diff(np.unique(times))
        self._half_s = min(_HALF_S, float(gaps.min()) / 2) if len(gaps) else _HALF_S
        self._panel: tuple[int, Any] | None = None  # of the moment drawn last

    def drawn(self, picture: Picture, time_s: float) -> Picture:
        """Return a picture (H, W, 3) with what is known of its time."""
        from PIL import Image, ImageDraw

        image = Image.fromarray(picture)
        if self._found.boxes is not None:
            self._draw_boxes(ImageDraw.Draw(image), time_s)
        elif len(self._middles):
            moment = int(np.argmin(np.abs(self._middles - time_s)))
            if self._panel is None or self._panel[0] != moment:
                self._panel = (moment, self._panel_of(moment))
            panel = self._panel[1]
            image.paste(panel, (0, self._height - panel.height), panel)
        return np.asarray(image)

    def _panel_of(self, moment: int) -> Any:
        """Return the panel of a moment: its time, and for each of its best classes name, score and a bar."""
        from PIL import Image, ImageDraw

        best = self._found.best_of_moment(moment, TOP)
        start_s, end_s = self._found.times_s[moment].tolist()
        line = round(self._text_px * 1.5)
        panel = Image.new("RGBA", (self._width, line * (len(best) + 1)), (0, 0, 0, 150))
        draw = ImageDraw.Draw(panel)
        heard = "" if self._found.heard[moment] else "  (no sound)"
        self._text(draw, (self._text_px // 2, 0), f"{clock(start_s)} to {clock(end_s)}{heard}", (200, 200, 200))
        for row, (name, value) in enumerate(best, 1):
            draw.rectangle((0, row * line, round(self._width * value), (row + 1) * line - 2), fill=(40, 110, 200, 170))
            text = f"{100 * value:3.0f} %  {self._named(name)}"
            self._text(draw, (self._text_px // 2, row * line), text, (255, 255, 255))
        return panel

    def _named(self, name: str) -> str:
        return shown(name, self._found.class_names.index(name))

    def _text(self, draw: Any, place: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
        """Write a text on one line, piece after piece in the fonts that have it."""
        x, first = place[0], _font(font_runs("0")[0][0], self._text_px)
        base = place[1] + first.getmetrics()[0]  # below the ascent of the first font: one base line for all
        for file, piece in font_runs(text):
            font = _font(file, self._text_px)
            draw.text((x, base), piece, fill=colour, font=font, anchor="ls")
            x += font.getlength(piece)

    def _draw_boxes(self, draw: Any, time_s: float) -> None:
        boxes = self._found.boxes
        assert boxes is not None
        near = np.abs(boxes.times_s - time_s)
        shown_boxes = np.flatnonzero(near <= min(self._half_s, float(near.min()) + 1e-6)).tolist()
        for number, box in enumerate(shown_boxes):
            colour = _COLOURS[number % len(_COLOURS)]
            x1, y1, x2, y2 = (boxes.corners[box] * np.array([self._width, self._height] * 2)).tolist()
            draw.rectangle((x1, y1, x2, y2), outline=colour, width=max(2, self._text_px // 8))
            for row, (name, value) in enumerate(self._found.best_of_box(box, TOP)):
                text = f"{100 * value:.0f} % {self._named(name)}"
                line = round(self._text_px * 1.3)
                place = (x1 + 2, y1 + 2 + row * line)
                width = sum(_font(file, self._text_px).getlength(piece) for file, piece in font_runs(text))
                draw.rectangle((x1 + 1, place[1] - 1, x1 + 3 + width, place[1] + line - 2), fill=colour)
                self._text(draw, place, text, (0, 0, 0))


def _font(file: str, size_px: int) -> Any:
    """Return a font of Pillow, each file and size once."""
    from PIL import ImageFont

    key = (file, size_px)
    if key not in _fonts:
        _fonts[key] = ImageFont.truetype(file, size_px)
    return _fonts[key]


_fonts: dict[tuple[str, int], Any] = {}
