"""Classes of plain video files from a trained run."""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from experiments.cli.command_line import run_command
from experiments.predict import main as predict
from experiments.train import main

pytestmark = pytest.mark.integration


def write_video(path: Path) -> None:
    """75 silent frames of 64 x 48."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(75):
            picture = np.full((48, 64, 3), number * 3, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def test_files_are_scored_or_said_not_to_be(write_config: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert run_command(main, [str(write_config()), "train.steps=2"]) == 0
    run_dir = tmp_path / "runs" / "tiny"
    video, text = tmp_path / "a b.avi", tmp_path / "text.mp4"
    write_video(video)
    text.write_text("not a video")
    capsys.readouterr()
    assert run_command(predict, [str(run_dir), str(video), "--top", "4", "--set", "views.num_clips=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{video}: 2 views, without sound"
    shares = [float(re.fullmatch(r"  class_\d +([\d.]+) %", line).group(1)) for line in lines[1:]]  # type: ignore[union-attr]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100.0, abs=0.05)
    assert run_command(predict, [str(run_dir), str(video), str(text), "--set", "data.num_workers=1"]) == 2
    assert f"{text}: not scored: " in capsys.readouterr().out
    note = tmp_path / "note.txt"
    note.write_text("not a video")
    assert run_command(predict, [str(run_dir), str(text), str(note)]) == 2
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith(f"{text}: not scored: ")
    assert second.startswith(f"{note}: not scored: container does not open: ")
    assert "avsf-predict-" not in captured.out + captured.err
    assert run_command(predict, [str(run_dir), str(tmp_path / "none.mp4")]) == 2
    assert "must be an existing file" in capsys.readouterr().err
    assert run_command(predict, [str(tmp_path), str(video)]) == 2
    assert "holds nothing of a model" in capsys.readouterr().err
    other = ["--set", "model.variant=avslowfast_r50_4x16"]
    assert run_command(predict, [str(run_dir), str(video), *other]) == 2
    assert "must not be given: the weights are of the run's variant" in capsys.readouterr().err
    assert run_command(predict, [str(run_dir), str(video), "--set", "train.task=multilabel"]) == 2
    assert "must be multi_hot or timed for train.task=multilabel" in capsys.readouterr().err
