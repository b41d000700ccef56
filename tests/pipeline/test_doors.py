"""What a user's own script needs: public names, loaded when they are used, from any folder."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from model import VARIANTS
from pipeline import ClipSpec, DataConfig, EvalLoader, LoaderOptions, TrainLoader, open_dataset
from pipeline.open import DataPathError
from tests.pipeline.support.stores import noise, numbered_frames, write_store

ROOT = Path(__file__).resolve().parents[2]


def run_script(text: str, folder: Path) -> str:
    """Run Python text in a folder outside the checkout; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["pipeline", "pipeline.ingest.worker", "pipeline.open"])
def test_neither_torch_nor_dali_is_loaded_for_data_alone(tmp_path: Path, module: str) -> None:
    text = f"import {module}, sys; print([name for name in ('torch', 'nvidia.dali') if name in sys.modules])"
    assert run_script(text, tmp_path) == "[]\n"


def test_every_public_name_is_there() -> None:
    assert set(pipeline.__all__) <= set(dir(pipeline))
    found = {name: getattr(pipeline, name) for name in pipeline.__all__}
    assert all(value.__name__ == name for name, value in found.items())
    assert {"open_dataset", "ClipSpec", "TrainLoader", "EvalLoader", "Batch"} <= set(found)
    with pytest.raises(AttributeError, match=r"has no attribute 'Loader'; it offers Batch, ClipSpec"):
        pipeline.Loader  # type: ignore[attr-defined]  # noqa: B018


def test_stores_and_folders_open_by_their_path(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(30), noise(1))])
    opened = open_dataset(tmp_path / "s", "train")
    assert (opened.fingerprint, opened.decoders) == (split.fingerprint, ("cpu", "dali"))
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "m.mp4").write_bytes(split.read_video(0, 0, 29).data.tobytes())
    plain = open_dataset(str(videos), "all")
    assert (plain.decoders, list(plain.media.ids), int(plain.media.num_frames[0])) == (("cpu",), ["m.mp4"], 30)
    with pytest.raises(ValueError, match=r"split \(test\) must be one of"):
        open_dataset(tmp_path / "s", "test")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"data.path \(''\) must name a store or a folder"),
        ("nowhere", r"data.path \(nowhere\) must exist; make a store with: python -m experiments.prepare"),
        (__file__, r"must be a folder, not a file"),
    ],
)
def test_paths_without_data(path: str, message: str) -> None:
    with pytest.raises(DataPathError, match=message):
        open_dataset(path, "train")


def test_unknown_synthetic_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.path \(synthetic:none\) must be one of synthetic:quickstart"):
        open_dataset("synthetic:none", "train")


def test_arguments_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(30), noise(1))])
    model, spec = VARIANTS["small"], ClipSpec(8, 2)
    for loader in (TrainLoader, EvalLoader):
        with pytest.raises(TypeError, match=r"ModelConfig must be a ClipSpec: .* ClipSpec.for_model\(model_config\)"):
            loader(split, model)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"DataConfig must be a ClipSpec: a loader takes dataset, spec, config"):
            loader(split, DataConfig(), spec)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"LoaderOptions must be a DataConfig"):
            loader(split, spec, LoaderOptions())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"int must be a LoaderOptions"):
            loader(split, spec, DataConfig(), 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model \(str\) must be a ModelConfig, such as VARIANTS\['small'\]"):
        ClipSpec.for_model("small")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips_per_batch": 0}, r"clips_per_batch \(0\) of LoaderOptions must be at least 1 and at most 16777216"),
        ({"clips_per_batch": 10**9}, r"clips_per_batch \(1000000000\) of LoaderOptions must be at least 1 and at most"),
        ({"clips_per_batch": 2.5}, r"clips_per_batch \(2.5\) of LoaderOptions must be a whole number"),
        ({"clips_per_batch": "8"}, r"clips_per_batch \('8'\) of LoaderOptions must be a whole number"),
        ({"world_size": True}, r"world_size \(True\) of LoaderOptions must be a whole number"),
        ({"num_classes": -1}, r"num_classes \(-1\) of LoaderOptions must be at least 0"),
        ({"want_audio": "no"}, r"want_audio \('no'\) of LoaderOptions must be True or False"),
        ({"device": "tpu"}, r'device \(tpu\) of LoaderOptions must be "cpu", "cuda" or "cuda:N"'),
        ({"device": "meta"}, r'device \(meta\) of LoaderOptions must be "cpu", "cuda" or "cuda:N"'),
        ({"device": None}, r'device \(None\) of LoaderOptions must be "cpu", "cuda" or "cuda:N"'),
        ({"rank": 1}, r"rank \(1\) of LoaderOptions must be at least 0 and less than world_size \(1\)"),
        ({"dtype": torch.bfloat16}, r"dtype \(torch.bfloat16\) of LoaderOptions must be torch.float16 or"),
        ({"want_video": False, "want_audio": False}, r"want_video \(False\) of LoaderOptions must be True where"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderOptions(**options)


def test_clips_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frame_stride \(0\) of a ClipSpec must be a whole number, at least 1"):
        ClipSpec(8, 0)
    with pytest.raises(ValueError, match=r"num_frames \(2.5\) of a ClipSpec must be a whole number, at least 1"):
        ClipSpec(2.5, 1)  # type: ignore[arg-type]


def test_what_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(30), noise(1.0))])
    spec, config = ClipSpec(8, 2), DataConfig(crop_size_px=48, jitter_min_px=56, jitter_max_px=72)
    for loader in (TrainLoader, EvalLoader):
        with pytest.raises(ValueError, match=r"device \(cuda:99\) of LoaderOptions must be one of the \d+ CUDA"):
            loader(split, spec, config, LoaderOptions(device="cuda:99"))
        with pytest.raises(ValueError, match=r"data.label_set \(verb\) must be one of action; choose one"):
            loader(split, spec, replace(config, label_set="verb"))
    for seed in (-1, 2**63, 1.5, "7", True):
        with pytest.raises(ValueError, match=r"seed \(.*\) must be a whole number, at least 0 and less than 2\*\*63"):
            TrainLoader(split, spec, config, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["label_kind", "negatives", "shuffle", "decoder", "frames"])
def test_choices_of_another_type_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"data.{key} \(\[\]\) must be one of: "):
        DataConfig(**{key: []})  # type: ignore[arg-type]


EXAMPLE = """
from model import VARIANTS, build_model
from pipeline import ClipSpec, DataConfig, LoaderOptions, TrainLoader, open_dataset

config = VARIANTS["small"]
data = open_dataset("synthetic:quickstart", "train")
small = DataConfig(crop_size_px=48, jitter_min_px=48, jitter_max_px=56)
loader = TrainLoader(data, ClipSpec.for_model(config), small, LoaderOptions(clips_per_batch=4))
model = build_model(config)
for batch in loader:
    print(batch)
    print(tuple(model(batch.frames, batch.log_mel).logits.shape))
    break
"""


@pytest.mark.integration
def test_ten_lines_lead_from_data_to_logits(tmp_path: Path) -> None:
    shown, logits = run_script(EXAMPLE, tmp_path).splitlines()
    assert shown.startswith("Batch(4 clips: frames (4, 3, 16, 48, 48) float32 cpu; log_mel (4, 1, 64, 40) float32 cpu;")
    assert logits == "(4, 8)"
    assert (tmp_path / "data").is_dir()
