"""How a file lacks its sound changes nothing: no track, an empty one, digital zeros; in training and in evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.predictor import Predictor
from experiments.engine.trained_model import load_target
from experiments.train import main
from tests.pipeline.support.plain_videos import RATE_HZ, write_video

pytestmark = pytest.mark.integration


def with_empty_track(source: Path, path: Path) -> Path:
    """The same packets beside an audio stream that has none."""
    with av.open(str(source)) as found, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(found.streams.video[0])
        made.add_stream("pcm_s16le", rate=RATE_HZ)
        for packet in found.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return path


def videos(folder: Path) -> dict[str, Path]:
    """The same pictures in Matroska with and without sound."""
    folder.mkdir(parents=True)
    zeros = np.zeros(3 * RATE_HZ, np.int16)
    plain: dict[str, Any] = {"options": {"bf": "0"}}  # packets are in the order of their pictures
    lossless = plain | {"audio_codec": "pcm_s16le"}
    return {
        "no track": write_video(folder / "a.mkv", **plain, audio_codec=None),
        "empty track": with_empty_track(folder / "a.mkv", folder / "b.mkv"),
        "zeros": write_video(folder / "c.mkv", audio=zeros, **lossless),
        "sound": write_video(folder / "d.mkv", **lossless),
    }


def test_scores_do_not_depend_on_how_a_file_lacks_its_sound(write_config: Callable[..., Path], tmp_path: Path) -> None:
    files = videos(tmp_path / "files")
    assert run_command(main, [str(write_config()), "model.drop_pathway_rate=0.0", "optim.lr=0.2"]) == 0
    for rule in ("dropped", "mean_spectrum"):
        predictor = Predictor.open(tmp_path / "runs" / "tiny", overrides=[f"model.clips_without_sound={rule}"])
        found = list(predictor.predict(list(files.values())))
        scores = {name: dict(item.best()) for name, item in zip(files, found, strict=True)}
        assert [item.has_audio for item in found] == [False, False, False, True]
        assert scores["no track"] == scores["empty track"] == scores["zeros"]
        if rule == "dropped":
            absent = scores["zeros"]
        else:
            assert scores["zeros"] != absent
    assert scores["sound"] != scores["zeros"]


def test_training_does_not_depend_on_it_either(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Two classes, one of them without sound in two ways; the weights are the same, bit by bit."""
    digests = []
    for kind in ("no track", "zeros"):
        root = tmp_path / kind.replace(" ", "-")
        made = videos(root / "made")
        for split in ("train", "val"):
            for name, wanted in (("quiet", kind), ("loud", "sound")):
                place = root / split / name
                place.mkdir(parents=True)
                for number in range(2):
                    (place / f"{number}.mkv").write_bytes(made[wanted].read_bytes())
        for file in made.values():
            file.unlink()
        (root / "made").rmdir()
        path = write_config(root.name)
        keys = [f"data.path={root}", "model.num_classes=2", "train.steps=3", "data.target_fps=25"]
        assert run_command(main, [str(path), *keys, "model.drop_pathway_rate=0.0"]) == 0
        config = load_config(path, keys)
        state = load_target(config.run_dir, "last", [])[1].load()["model"]
        digests.append({name: value.numpy().tobytes() for name, value in state.items()})
    assert digests[0] == digests[1]
