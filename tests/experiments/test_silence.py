"""How a file lacks its sound changes nothing: no track, an empty one, digital zeros; in training and in evaluation."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.predictor import Predictor
from experiments.engine.trained_model import load_target
from experiments.train import main
from tests.pipeline.support.plain_videos import RATE_HZ, chirp_track, write_video

pytestmark = pytest.mark.integration


def with_track(source: Path, path: Path, samples: NDArray[np.int16]) -> Path:
    """The same packets beside an audio stream that has (samples,) or none; an encoder need not give them twice."""
    with av.open(str(source)) as found, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(found.streams.video[0])
        sound = made.add_stream("pcm_s16le", rate=RATE_HZ)
        sound.layout = "mono"
        for packet in found.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
        if len(samples):
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE_HZ, Fraction(1, RATE_HZ), 0
            made.mux([*sound.encode(frame), *sound.encode(None)])
    return path


def videos(folder: Path) -> dict[str, Path]:
    """The same pictures in Matroska with and without sound."""
    folder.mkdir(parents=True)
    options = {"bf": "0"}  # packets are in the order of their pictures
    source = write_video(folder / "a.mkv", options=options, audio_codec=None)
    return {
        "no track": source,
        "empty track": with_track(source, folder / "b.mkv", np.zeros(0, np.int16)),
        "zeros": with_track(source, folder / "c.mkv", np.zeros(3 * RATE_HZ, np.int16)),
        "sound": with_track(source, folder / "d.mkv", chirp_track(3 * RATE_HZ, RATE_HZ)),
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
    digests, made = [], videos(tmp_path / "made")
    for kind in ("no track", "zeros"):
        root = tmp_path / kind.replace(" ", "-")
        for split in ("train", "val"):
            for name, wanted in (("quiet", kind), ("loud", "sound")):
                place = root / split / name
                place.mkdir(parents=True)
                for number in range(2):
                    (place / f"{number}.mkv").write_bytes(made[wanted].read_bytes())
        path = write_config(root.name)
        keys = [f"data.path={root}", "model.num_classes=2", "train.steps=3", "data.target_fps=25"]
        assert run_command(main, [str(path), *keys, "model.drop_pathway_rate=0.0"]) == 0
        config = load_config(path, keys)
        state = load_target(config.run_dir, "last", [])[1].load()["model"]
        digests.append({name: value.numpy().tobytes() for name, value in state.items()})
    assert digests[0] == digests[1]
