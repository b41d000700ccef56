"""How one clip lies in shared memory: a reply, then its picture bytes, its sound and the out-of-sync sound.

Picture bytes are planes of the stored size, whose shape the reply tells (`Reply`): workers hand over no encoded cuts,
which cost no process.
"""

import pickle
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipPlan
from pipeline.dataset import Dataset, used_media
from pipeline.source import HostClip, Int16, Planner, UInt8, Unreadable, Wanted, plane_bytes, planes_of

REPLY_BYTES = 8192  # of a pickled reply; a longer one leaves out the plan, which the parent can make itself
_PAGE = 4096


class Reply(NamedTuple):
    """What a worker says about a clip.

    Args:
        plan: what it is; None where the reply would be too long with it.
        planes: frames, height and width of its pictures; None where no video is wanted.
        reason: why it is unreadable. error: an error that is nobody's clip's.
    """

    plan: ClipPlan | None
    planes: tuple[int, int, int] | None = None
    has_audio: bool = False
    has_negative: bool = False
    reason: str = ""
    error: BaseException | None = None


@dataclass(frozen=True)
class SlotSpec:
    """Sizes of a slot's parts.

    Args:
        picture_bytes: Of the largest clip.
        num_audio_samples: Of the sound; 0: none.
        with_negative: Whether there is room for out-of-sync sound.
    """

    picture_bytes: int
    num_audio_samples: int
    with_negative: bool

    @property
    def audio_offset(self) -> int:
        """First byte of the sound."""
        return REPLY_BYTES + _aligned(self.picture_bytes)

    @property
    def sound_bytes(self) -> int:
        """Bytes of one sound window."""
        return _aligned(2 * self.num_audio_samples, 64)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a whole slot, a multiple of the page."""
        return _aligned(self.audio_offset + self.sound_bytes * (2 if self.with_negative else 1))


def _aligned(size: int, unit: int = _PAGE) -> int:
    return -(-size // unit) * unit


def picture_bytes(dataset: Dataset, num_frames: int, wanted: Wanted) -> int:
    """Return the bytes of the largest clip of a split that `wanted.max_clip_bytes` allows; 0 where there is none."""
    if not wanted.video:
        return 0
    table, media = dataset.media, used_media(dataset)
    pixels = np.asarray(table.width)[media].astype(np.int64) * np.asarray(table.height)[media]
    sizes = plane_bytes(num_frames, 1, 1 << 20) * pixels >> 20
    return int(sizes[sizes <= wanted.max_clip_bytes].max(initial=0))


class Slot:
    """The memory of one slot; a `ClipMemory` for the worker, a `HostClip` for the parent.

    Args:
        spec: Sizes.
        memory: (slot_bytes,) uint8.
    """

    def __init__(self, spec: SlotSpec, memory: UInt8) -> None:
        self._spec, self._memory = spec, memory
        self._picture = memory[REPLY_BYTES : REPLY_BYTES + spec.picture_bytes]
        sounds = [spec.audio_offset + i * spec.sound_bytes for i in range(2 if spec.with_negative else 1)]
        self._sounds = [memory[at : at + 2 * spec.num_audio_samples].view(np.int16) for at in sounds]

    def planes(self, count: int, height: int, width: int) -> tuple[UInt8, UInt8]:
        """See ClipMemory."""
        return planes_of(self._picture, count, height, width)

    def audio(self, samples: Int16) -> Int16:
        """See ClipMemory."""
        self._sounds[0][:] = samples
        return self._sounds[0]

    def negative(self, samples: Int16) -> Int16:
        """See ClipMemory."""
        self._sounds[1][:] = samples
        return self._sounds[1]

    def write_reply(self, reply: Reply) -> int:
        """Put a reply in front of the clip; returns its bytes."""
        data = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
        if len(data) > REPLY_BYTES:
            short = reply._replace(plan=None, reason=reply.reason[:2000])
            if reply.error is not None:
                short = short._replace(error=RuntimeError(f"{type(reply.error).__name__}: {reply.error}"[:2000]))
            data = pickle.dumps(short, protocol=pickle.HIGHEST_PROTOCOL)
        self._memory[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def read_reply(self, size: int, planner: Planner, position: int, attempt: int) -> HostClip | Unreadable:
        """Return the clip that lies here; its arrays are views of the slot.

        Args:
            size: Bytes of the reply.
            planner: Makes the plan where the reply has none.
            position: Of the clip.
            attempt: Of the clip.
        """
        reply: Reply = pickle.loads(self._memory[:size].data)  # of our own worker, in memory that no one else has
        if reply.error is not None:
            raise reply.error
        plan = reply.plan or planner.at(position, attempt)
        if reply.reason:
            return Unreadable(plan, reply.reason)
        luma, chroma = (None, None) if reply.planes is None else self.planes(*reply.planes)
        frames: NDArray[np.int32] = np.asarray(plan.frames, np.int32)
        negative = self._sounds[1] if reply.has_negative else None
        return HostClip(plan, None, frames, luma, chroma, self._sounds[0], reply.has_audio, negative)


def reply_of(clip: HostClip | Unreadable) -> Reply:
    """Return what the parent has to know of a clip that lies in a slot."""
    if isinstance(clip, Unreadable):
        return Reply(clip.plan, reason=clip.reason)
    assert clip.encoded is None, "what workers read they decode"
    planes = None if clip.luma is None else clip.luma.shape[:3]
    return Reply(clip.plan, planes, clip.has_audio, clip.negative is not None)
