"""evaluate --robustness: the score with the sound muted, of other videos, and shifted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.robustness import Heard, NoSoundError, conditions, require_audio
from experiments.evaluate import main as evaluate
from pipeline.batch import Batch
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.open import open_dataset
from pipeline.plan import EvalPlan, Pretext

NAMES = ["as it is", "muted", "of another video", "shifted by 0.5 s", "shifted by 1 s", "shifted by 2 s"]
FLAGS = torch.tensor([True, True, False, False])


def batch(*, has_negative: torch.Tensor | None) -> Batch:
    """Four clips whose sound is their number, out-of-sync sound 10 more."""
    mel = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 3)
    none = torch.zeros(4, dtype=torch.bool)
    rows = torch.arange(4)
    return Batch(
        frames=None, log_mel=mel, negative_log_mel=None if has_negative is None else mel + 10, has_audio=FLAGS,
        has_negative=none if has_negative is None else has_negative, is_substitute=none, labels=rows, rotation=None,
        sample=rows, view=rows, position=rows, ids=list("abcd"), start_s=[0.0] * 4,
    )  # fmt: skip


def test_only_clips_with_sound_are_heard_with_another_one() -> None:
    heard = Heard("of another video", Pretext(negatives="easy"))
    changed = heard.change(batch(has_negative=torch.tensor([True, False, True, False])))
    assert changed.has_audio.tolist() == [True, False, False, False]
    assert changed.log_mel is not None
    assert changed.log_mel[:, 0, 0, 0].tolist() == [10, 0, 0, 0]
    assert heard.lost == 1
    muted = Heard("muted").change(batch(has_negative=None))
    assert muted.log_mel is not None
    assert (muted.has_audio.any(), muted.log_mel.any()) == (False, False)
    assert [item.name for item in conditions()] == NAMES[1:]


def test_a_shift_goes_where_there_is_more_sound(tiny_store: Path) -> None:
    dataset = open_dataset(tiny_store, "val")
    spec = ClipSpec(16, 4, num_mel_frames=16)

    def starts(pretext: Pretext) -> list[tuple[int, int, int]]:
        plan = EvalPlan(dataset, spec, DataConfig(), ViewConfig(num_clips=2, num_crops=1, crop_size_px=32), pretext)
        clips = [plan.clip(position) for position in range(plan.num_positions)]
        return [(clip.audio_start, clip.negative_start, clip.negative_media - clip.media) for clip in clips]

    near = starts(Pretext(negatives="shifted", shift_s=0.5))
    assert {abs(other - own) for own, other, _ in near} == {8000}
    assert {media for *_, media in near} == {0}
    first, last = dataset.sound_range(0)
    for own, other, _ in near:
        opposite = 2 * own - other
        inside = [min(start + spec.num_audio_samples, last) - max(start, first) for start in (other, opposite)]
        assert inside[0] >= inside[1]
    assert starts(Pretext(negatives="shifted", shift_s=0.5)) == near
    assert {media < 0 for *_, media in starts(Pretext(negatives="shifted", shift_s=900.0))} == {True}


@pytest.mark.integration
@pytest.mark.pictures
def test_the_table_is_the_same_every_time(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    found = []
    for name in ("a", "b"):
        out = tmp_path / name
        command = [str(tiny_run), "--robustness", "--output", str(out), "data.num_workers=0"]
        assert run_command(evaluate, command) == 0
        found.append(json.loads((out / "robustness.json").read_text())["sounds"])
        assert (out / "robustness.png").stat().st_size > 5_000
    assert found[0] == found[1]
    assert [row["sound"] for row in found[0]] == NAMES
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert found[0][0]["metrics"] == report["metrics"]
    assert [row["samples"]["silent"] for row in found[0][:2]] == [0, 16]
    assert all(0 <= row["metrics"]["top1"] <= 1 for row in found[0])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(NAMES)) for line in lines) == 2 * len(NAMES)


def test_a_model_that_hears_nothing_has_no_table(write_config: Any) -> None:
    visual = ['model.pathways=["slow","fast"]', "model.fusion=none"]
    with pytest.raises(NoSoundError, match="must be given for a model of classes with an audio pathway"):
        require_audio(load_config(write_config(), visual))
    require_audio(load_config(write_config()))
