"""Clips without sound inside a batch: nothing of them reaches vision, the classifier or the audio's statistics.

A clip without sound (no track, an empty one, digital silence) is one whose audio is dropped, as DropPathway drops that
of a whole step (section 3.5), not one with the mean spectrum. Its rows still run, so that shapes stay what they are and
a CUDA graph holds: another clip's sound stands in for it, and nothing that comes out of those rows is used.
Legend: N clips, M audio frames, F mel bins.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.layout import group_count
from kernels.sync import rows_of_ranks


def stand_ins(sound: Tensor, clips_per_group: int) -> Tensor:
    """Which clip's sound runs in each row: its own where there is one, else that of a clip which has some.

    Batch statistics are over groups of clips, so stand-ins come from the same group: its clips with sound in turn,
    which leaves their weights equal up to one. A group without any takes from the whole batch. Never synchronises.

    Args:
        sound: (N,) bool.
        clips_per_group: clips that share statistics (section 4.1).
    Returns:
        (N,) int64 rows; the row itself where no clip of the batch has sound.
    """
    clips = sound.shape[0]
    rows = torch.arange(clips, device=sound.device)
    group = rows // (clips // group_count(clips, clips_per_group))
    together = group[:, None] == group[None, :]  # (N, N)
    candidates = together & sound[None, :]
    candidates = torch.where(candidates.any(1, keepdim=True), candidates, sound[None, :])
    place = candidates.cumsum(1)  # of the first candidate 1, of the second 2, ...
    turn = (together & ~sound[None, :]).cumsum(1).diagonal() - 1  # of the group's first clip without sound 0
    wanted = turn.clamp(min=0) % place[:, -1].clamp(min=1) + 1
    found = (candidates & (place == wanted[:, None])).to(torch.int8).argmax(1)
    return torch.where(sound | ~sound.any(), rows, found)


def with_stand_ins(
    log_mel: Tensor,
    negative: Tensor | None,
    has_audio: Tensor,
    has_negative: Tensor | None,
    clips_per_group: int,
    process_group: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Give every row a spectrogram of real sound, see `stand_ins`.

    Args:
        log_mel, negative: (N, 1, M, F); no negative: None.
        has_audio, has_negative: (N,) bool, which of them there are; None = all negatives.
        clips_per_group: clips that share statistics.
        process_group: whose ranks form such groups together: stand-ins then come from the clips of all of them.
    Returns:
        both; a clip without a negative has another clip's, or, where there is none at all, the sound of its own row.
    """
    if process_group is not None:
        clips, rank = log_mel.shape[0], torch.distributed.get_rank(process_group)
        sound, other = rows_of_ranks(log_mel, process_group), None
        if negative is not None:
            other = rows_of_ranks(negative, process_group)
        if has_negative is not None:
            has_negative = rows_of_ranks(has_negative, process_group)
        sound, other = with_stand_ins(
            sound, other, rows_of_ranks(has_audio, process_group), has_negative, clips_per_group
        )
        own = slice(clips * rank, clips * (rank + 1))
        return sound[own], None if other is None else other[own]
    log_mel = log_mel[stand_ins(has_audio, clips_per_group)]
    if negative is None or has_negative is None:
        return log_mel, negative
    return log_mel, torch.where(has_negative.any(), negative[stand_ins(has_negative, clips_per_group)], log_mel)
