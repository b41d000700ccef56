"""Plain files opened and set to a time: a clip opens its file once, for its pictures and then for its sound."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import av
from av.stream import Discard

from pipeline.dataset import MediaError
from pipeline.folder.describe import PlainFile
from pipeline.media.yuv import open_video

_SEEK_BACK_S = (Fraction(0), Fraction(2), Fraction(10), None)  # None: decode from the start
Decode = Callable[[Any, Any], Iterator[tuple[int, Any]]]  # of a container and a stream: ticks and frames


class _Kept(threading.local):
    """The container that a clip's pictures were read from, until the sound of that clip or other pictures are."""

    def __init__(self) -> None:
        self._kept: tuple[PlainFile, Any] | None = None
        self._open = ExitStack()

    def keep(self, file: PlainFile, container: Any, opened: ExitStack) -> None:
        """Keep an open container."""
        self._kept, self._open = (file, container), opened.pop_all()

    def take(self, file: PlainFile | None, opened: ExitStack) -> Any | None:
        """Return the container if it is of this file, closed with `opened`; any other is closed now."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0] is not file:
            self._open.close()
            return None
        opened.push(self._open.pop_all())
        return kept[1]


_KEPT = _Kept()


def frames_from(file: PlainFile, number: int, target: Callable[[Fraction], int], decode: Decode) -> Iterator[Any]:
    """Decoded frames with ticks, the first one not later than a target if the stream has such a frame.

    A seek may land late (transport streams have no index): then it is tried from further back, at last from the start.

    Args:
        number: of the stream. target: ticks, for the stream's time base. decode: gives ticks and frames of a stream.
    """
    for back_s in _SEEK_BACK_S if file.timing != "start" else (None,):
        with ExitStack() as opened:
            container, stream = _open(file, number, back_s is not None, opened)
            wanted = target(stream.time_base)
            if back_s is not None:
                begin = wanted - round(back_s / stream.time_base)
                if begin <= (stream.start_time or 0):
                    continue
                try:
                    container.seek(begin, stream=stream, backward=True)
                except av.error.FFmpegError:
                    continue
            frames = decode(container, stream)
            first = next(frames, None)
            if first is None or (back_s is not None and first[0] > wanted):
                continue
            try:
                yield first
                yield from frames
            except GeneratorExit:  # whoever asked has what it wanted
                _keep(file, number, container, opened)
                raise
            _keep(file, number, container, opened)
            return


def _open(file: PlainFile, number: int, seeks: bool, opened: ExitStack) -> tuple[Any, Any]:
    """Open a file, or for its sound take the container of its pictures, whose sound no decoder has seen yet.

    Only where every packet is in the container's index: there a seek lands at one place whatever was read before.
    """
    container = _KEPT.take(file if seeks and number == file.audio_stream else None, opened)
    if container is None:
        container, stream = opened.enter_context(open_video(file.path, number))
    else:
        stream = container.streams[number]
    if file.has_whole_index:
        for other in container.streams:
            other.discard = Discard.default if other.index == number else Discard.all  # not even read
    return container, stream


def _keep(file: PlainFile, number: int, container: Any, opened: ExitStack) -> None:
    if file.has_whole_index and number == file.video_stream and file.audio_stream >= 0:
        _KEPT.keep(file, container, opened)


def check_unchanged(file: PlainFile, stream: str, time_s: float) -> None:
    """Numbers of frames and samples are those of the file that was looked at, not of one that took its place."""
    try:
        found = os.stat(file.path)
    except OSError as error:
        raise MediaError(
            file.path, stream, f"{error}; put it back, or start again without it", time_s=time_s
        ) from error
    if (found.st_size, found.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        reason = (
            f"file ({found.st_size} bytes, mtime {found.st_mtime_ns} ns) must be the one that was there when the run "
            f"began ({file.size_bytes} bytes, mtime {file.mtime_ns} ns); put it back, or start again"
        )
        raise MediaError(file.path, stream, reason, time_s=time_s)
