"""Exported models score files as their run does, say what they are, and run beside scripts of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from experiments.cli.command_line import run_command
from experiments.engine.data import eval_loader
from experiments.engine.predictor import Predictor
from experiments.export import main as export
from experiments.predict import main as predict
from pipeline.folder.dataset import FolderSplit
from pipeline.folder.describe import describe
from pipeline.folder.standalone import clip_of
from tests.pipeline.support.plain_videos import write_video

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
THREADS = "data.num_workers=0"


@pytest.fixture(scope="module")
def exports(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of one run: weights and program."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("weights", "program"):
        assert run_command(export, [str(tiny_run), "--out", str(folder / kind), "--format", kind]) == 0
    return folder


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Three seconds of noise with a rising tone, in Matroska without B-frames."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 60 + 2 * i, (48, 64, 3), dtype=np.uint8) for i in range(75)]
    return write_video(tmp_path / "film.mkv", frames=frames, options={"bf": "0"}, audio_codec="flac")


def test_an_export_says_how_to_try_it(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(export, [str(tiny_run), "--out", str(tmp_path / "own")]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert {line.split()[-1] for line in files} == {"KiB", "MiB"}
    assert last.endswith(f" {tmp_path / 'own' / 'example.py'} VIDEO")


def test_exports_score_files_as_their_run_does(tiny_run: Path, exports: Path, film: Path) -> None:
    keys = [THREADS, "views.num_clips=2"]
    (expected,) = Predictor.open(tiny_run, overrides=keys).predict([film])
    for kind in ("weights", "program"):
        predictor = Predictor.open(exports / kind, overrides=keys)
        (found,) = predictor.predict([film])
        assert np.abs(found.scores - expected.scores).max() < 1e-5
        assert (found.views, found.class_names) == (2, expected.class_names)
        assert predictor.scorer.step == 2


def test_weights_and_programs_say_what_they_are(tiny_run: Path, exports: Path) -> None:
    facts = json.loads((exports / "weights" / "inputs.json").read_text())
    with safe_open(exports / "weights" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("avslowfast-model", "1")
    for key in ("class_names", "inputs", "settings", "step"):
        assert json.loads(metadata[key]) == facts[key]
    assert facts["class_names"] == [f"class_{k}" for k in range(4)]
    assert facts["inputs"]["frames"]["clip_s"] == pytest.approx(64 / 30)
    assert facts["project_version"] == metadata["project_version"]
    assert str(tiny_run.parent.parent) not in json.dumps(facts["settings"])  # no paths of the machine
    inside = {"inputs.json": ""}
    torch.export.load(exports / "program" / "model.pt2", extra_files=inside)
    assert json.loads(inside["inputs.json"]) == json.loads((exports / "program" / "inputs.json").read_text())


@pytest.mark.parametrize("kind", ["program", pytest.param("weights", marks=pytest.mark.slow)])
def test_the_example_beside_an_export_runs(exports: Path, film: Path, tmp_path: Path, kind: str) -> None:
    """In a process that finds nothing of this project, but its model where the weights are exported."""
    path = {"PYTHONPATH": str(ROOT)} if kind == "weights" else {}
    script = exports / kind / "example.py"
    done = subprocess.run(
        [sys.executable, str(script), str(film)], cwd=tmp_path, text=True, capture_output=True, timeout=300,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: float(share) for share, name in re.findall(r"([\d.]+) %  (\w+)", done.stdout)}
    (expected,) = Predictor.open(exports / kind, overrides=[THREADS, "views.num_clips=1"]).predict([film])
    assert found == pytest.approx({name: 100 * score for name, score in expected.best()}, abs=1.0)
    code = [line for line in script.read_text().splitlines() if line and not line.startswith(('"""', "import", "from"))]
    assert len(code) <= 10


@pytest.mark.parametrize("sound", ["flac", None])
def test_a_clip_prepared_alone_is_the_pipeline_s(exports: Path, tmp_path: Path, sound: str | None) -> None:
    y, x = np.mgrid[0:72, 0:128]
    frames = [np.stack([(x * 2 + 3 * i) % 256, (y * 3 + i) % 256, x + y], 2).astype(np.uint8) for i in range(100)]
    film = write_video(tmp_path / "film.mkv", frames=frames, options={"bf": "0"}, audio_codec=sound)
    predictor = Predictor.open(exports / "weights", overrides=[THREADS, "views.num_clips=1"])
    facts = json.loads((exports / "weights" / "inputs.json").read_text())
    split = FolderSplit.of_files([describe(film)], ["0"])
    (batch,) = eval_loader(predictor.config, split, predictor.runtime)
    found = clip_of(film, facts["inputs"])
    assert batch.frames is not None
    assert batch.log_mel is not None
    assert (found["frames"] - batch.frames.float()).square().mean().sqrt() < 0.1  # of a spread of 1
    assert (found["log_mel"] - batch.log_mel).abs().max() < 1e-3
    assert bool(found["log_mel"].any()) == (sound is not None)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("weights", "model.width=16", "must not be of the model"),
        ("program", "views.crop_size_px=64", "must have views.crop_size_px=32"),
        ("weights", "eval.class_subset=some", "must be a class list of the run's data, which are not"),
        ("weights", "views.num_clip=2", "num_clips"),
    ],
)
def test_what_an_export_fixes(exports: Path, film: Path, capsys: Any, kind: str, override: str, message: str) -> None:
    assert run_command(predict, [str(exports / kind), str(film), override]) == 2
    assert message in capsys.readouterr().err


def test_an_export_that_scores_no_files(exports: Path, film: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "inputs.json").write_text("{}")
    assert run_command(predict, [str(tmp_path / "old"), str(film)]) == 2
    assert "must hold model.safetensors or model.pt2 to score files" in capsys.readouterr().err
    (tmp_path / "old" / "model.pt2").write_bytes((exports / "program" / "model.pt2").read_bytes())
    assert run_command(predict, [str(tmp_path / "old"), str(film)]) == 2
    assert "must say with which settings it scores, and does not; export it again" in capsys.readouterr().err
