"""Wrong command lines, configurations, files and folders: one line with what is wrong and what to do, exit code 2."""

import importlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command

QUICKSTART = "experiments/configs/quickstart.yaml"
# Words of the command line (TMP: the folder of `places`; CONFIG: the tiny configuration), and what must be said.
COMMAND_LINES = (
    ("train", "a configuration must be given, such as experiments/configs/quickstart.yaml"),
    ("train nothing.yaml", "config file nothing.yaml cannot be read (No such file or directory)"),
    ("train experiments/config/quickstart.yaml", "did you mean experiments/configs/quickstart.yaml?"),
    ("train quikstart", "did you mean experiments/configs/quickstart.yaml?"),
    (f"train data.path=x {QUICKSTART}", "the file comes first, settings as section.key=value behind it"),
    ("train TMP/run", "cannot be read (Is a directory); did you mean TMP/run/config.yaml?"),
    ("train TMP/empty", "cannot be read (Is a directory); give the path of a YAML file"),
    ("train TMP/text.yaml", "text.yaml:1: the file must hold 'key: value' lines, not the value 'hello'"),
    ("train TMP/bytes.yaml", "must be UTF-8 text; byte 0 is not"),
    ("train TMP/list.yaml", "list.yaml:1: the file must hold 'key: value' lines, not a list"),
    ("train TMP/tab.yaml", "tab.yaml:2:1: not valid YAML"),
    ("train TMP/both.yaml", "both.yaml:1: train: steps (3) and epochs (2.0): exactly one must be > 0"),
    ("train TMP/nan.yaml", "nan.yaml:1: optim.lr (.nan) must be a number"),
    (f"train {QUICKSTART} optim.lr", "override 'optim.lr' must have the form section.key=value"),
    (f"train {QUICKSTART} lr=0.1", "override 'lr=0.1': unknown key 'lr'; did you mean optim.lr?"),
    (f"train {QUICKSTART} num_threads=2", "did you mean data.num_threads or runtime.num_threads?"),
    (f"train {QUICKSTART} optim.lrate=1", "unknown key 'optim.lrate'; did you mean 'lr"),
    (f"train {QUICKSTART} optim.lr=abc", "optim.lr (abc) must be a number"),
    (f"train {QUICKSTART} optim.lr=0,1", "optim.lr (0,1) must be a number; write it in decimal"),
    (f"train {QUICKSTART} optim.lr=-1", "optim.lr (-1.0) must be greater than 0.0"),
    (f"train {QUICKSTART} optim=0.1", "optim must be a section of 'key: value' lines, not the value '0.1'"),
    (f"train {QUICKSTART} --lr 0.1", "unrecognized arguments: --lr 0.1; settings are written section.key=value"),
    (f"train {QUICKSTART} --dryrun", "unrecognized arguments: --dryrun; did you mean --dry-run?"),
    (f"train {QUICKSTART} model.variant=r50", "must be one of 31 names; did you mean slowfast_r50_4x16 or "),
    (f"train {QUICKSTART} model.variant=avslowfast-r50-4x16", "did you mean avslowfast_r50_4x16?"),
    (f"train {QUICKSTART} data.path=", "data.path (nothing) must be a text"),
    (f"train {QUICKSTART} train.steps=0", "override 'train.steps=0': train: steps (0) and epochs (0.0): exactly one"),
    (f"train {QUICKSTART} train.epochs=5", "override 'train.epochs=5': train: steps (1000) and epochs (5.0)"),
    (
        f"train {QUICKSTART} train.epochs=5",
        "exactly one must be > 0; set the other to 0, train.steps=0 or train.epochs=0",
    ),
    (f"train {QUICKSTART} data.crop_size_px=64", "override 'data.crop_size_px=64': data: data.crop_size_px (64) <="),
    (f"train {QUICKSTART} model.pathways=[slow]", "pathways ([slow]) must be one of [slow, fast], [slow, fast, audio]"),
    (f"train {QUICKSTART} model.pathways=audio", "model.pathways (audio) must be a list; write [a, b]"),
    (f"train {QUICKSTART} name=a/b", "override 'name=a/b': name (a/b) must be letters, digits"),
    (f"train {QUICKSTART} runtime.device=gpu", "must be one of: auto, cpu, cuda; did you mean cuda?"),
    (f"train {QUICKSTART} views.num_crops=5", "views.num_crops (5) must be 0 (whole frame), 1 (centre) or 3"),
    (f"train {QUICKSTART} train.task=detect", "did you mean detection?"),
    (f"train {QUICKSTART} tracking.uri=ftp://x", "must be empty (a file in output_dir), http://host:port"),
    (f"train {QUICKSTART} train.seed=-1 optim.lr=x", "override 'train.seed=-1': train.seed (-1) must be at least 0"),
    ("evaluate", "the following arguments are required: target; see --help"),
    ("evaluate TMP/rum", "a checkpoint folder or a configuration file and exist; did you mean TMP/run?"),
    ("evaluate TMP/empty", "and holds nothing of a model; name one first, such as runs/quickstart"),
    (
        "predict TMP/text TMP/run",
        "TMP/text must be a run folder, a checkpoint folder or a configuration file, and holds",
    ),
    (
        "predict TMP/bytes.yaml TMP/run",
        "bytes.yaml must be a run folder, a checkpoint folder or a configuration file, ",
    ),
    ("evaluate TMP/run", "must hold a checkpoint; train first"),
    (f"evaluate {QUICKSTART} output_dir=TMP/none", "must hold a checkpoint; train first"),
    ("evaluate TMP/run --checkpoint newest", "invalid choice: 'newest'"),
    ("predict TMP/run", "the following arguments are required"),
    ("export TMP/run", "the following arguments are required: --out"),
    ("export TMP/run --out x --format onx", "did you mean onnx?"),
    ("prepare", "the following arguments are required: DATASET | verify"),
    ("prepare foldr", "did you mean folder?"),
    ("prepare folder --videos /nowhere --out TMP/s", "must be a readable folder; check --videos"),
    ("prepare folder --videos TMP/empty --out TMP/s", "must hold video files or class folders with them"),
    ("prepare folder --videos TMP/pictures --out TMP/s", "(picture among the videos, not used)"),
    ("prepare folder --videos TMP/text --out TMP/empty/x/y --gop 99", "gop (99) must be 1 to 16 frames"),
    ("prepare folder --videos TMP/text --out TMP/s --annotations TMP/paths.csv", "did you mean label?"),
    ("prepare folder --videos TMP/text --out TMP/s --option sed=1", "option (sed) must be one of val_fraction, seed"),
    ("prepare folder --videos TMP/text --out TMP/text", "target (no store) must not exist; choose another path"),
    ("prepare verify TMP/rum", "must be a folder; name the one that was given to prepare as --out"),
    ("prepare kinetics400 --videos TMP/text --annotations TMP/empty --out TMP/s", "give the official files"),
    ("combine", "the following arguments are required: WHAT"),
    ("combine ensembel TMP/no.npz", "did you mean ensemble?"),
    ("combine ensemble TMP/no.npz", "must exist; evaluate --scores writes one"),
    ("combine ensemble TMP/text.npz", "must be one that evaluate --scores wrote (it is no archive)"),
    ("sweep TMP/sweep.yaml", "missing metrics, rows; known are metrics, rows, table, title"),
    ("sweep experiments/sweeps/table5d.yml", "did you mean experiments/sweeps/table5d.yaml?"),
    ("track sync /nowhere", "must hold tracking.json"),
    ("track ui --output-dir TMP/empty", "must hold mlflow.db; train with tracking.backend=mlflow first"),
    ("track ui --output-dir TMP/empty --port 99999", "--port (99999) must be 1 to 65535"),
)
# Data and weights: what ends a training before its first step.
TRAININGS = (
    ("data.path=''", "data.path ('') must name a store or a folder of videos"),
    ("data.path=TMP/emty", "did you mean TMP/empty?"),
    ("data.path=TMP/empty", "playable videos (0 of 0) must be at least one; the folder is empty"),
    ("data.path=TMP/text.yaml", "must be a folder, not a file"),
    ("data.path=TMP/pictures", "a/1.jpg: a picture, not a video"),
    ("data.path=TMP/text", "playable videos (0 of 1) must be at least one; a/notes.mp4"),
    ("data.path=TMP/short", "must be"),
    ("data.path=TMP/unindexed", "file (missing) must exist; copy the whole store again"),
    ("data.val_split=vall", "data.val_split (vall) must be one of the splits train, val of"),
    ("data.train_split=training", "did you mean train?"),
    ("data.label_set=verb", "data.label_set (verb) must be one of action"),
    ("model.num_classes=5", "model.num_classes (5) must be 4"),
    ("train.clips_per_step=12", "use train.clips_per_step=16"),
    ("train.init_from=TMP/rum", "did you mean TMP/run?"),
    ("train.init_from=TMP/weights.pth", "must hold arrays in plain containers and nothing else"),
    ("train.init_from=TMP/empty", "but is empty; train first"),
    ("output_dir=TMP/text.yaml", "must be a folder that can be made (Not a directory); choose another output_dir"),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """Files and folders that are not what commands want."""
    top = tmp_path_factory.mktemp("wrong")
    texts = {
        "text.yaml": "hello", "list.yaml": "- a\n- b\n", "tab.yaml": "train:\n\tsteps: 3\n",
        "both.yaml": "train: {steps: 3, epochs: 2}\n", "nan.yaml": "optim: {lr: .nan}\n", "sweep.yaml": "table: 1\n",
        "paths.csv": "path,lable\na.mp4,x\n", "text.npz": "hello", "run/config.yaml": "version: 1\n",
        "text/a/notes.mp4": "hello", "pictures/a/1.jpg": "x", "weights.pth": "hello",
    }  # fmt: skip
    for name, text in texts.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (top / "bytes.yaml").write_bytes(b"\xff\xfe\x00x")
    (top / "empty").mkdir()
    for name in ("short", "unindexed"):
        shutil.copytree(tiny_store, top / name)
    shard = next((top / "short" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    (top / "unindexed" / "index.arrow").unlink()
    return top


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Commands set logging up for their process: put back what was there."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def said(command: str, words: list[str], capsys: Any) -> str:
    """Run a command in this process; return its one line of complaint."""
    logging.getLogger().handlers[:] = []  # pytest's, in whose presence `prepare` makes none
    main = importlib.import_module(f"experiments.{command}").main
    try:
        code = run_command(main, words)
    except SystemExit as end:
        code = int(str(end.code))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert errors, captured.err
    assert "Traceback" not in captured.err
    return "\n".join(errors)


@pytest.mark.parametrize(("line", "text"), COMMAND_LINES, ids=[line[:60] for line, _ in COMMAND_LINES])
def test_wrong_command_lines(places: Path, capsys: Any, line: str, text: str) -> None:
    command, *words = line.replace("TMP", str(places)).split()
    assert text.replace("TMP", str(places)) in said(command, words, capsys)
    assert not (places / "s").exists()


@pytest.mark.integration
@pytest.mark.parametrize(("override", "text"), TRAININGS, ids=[override for override, _ in TRAININGS])
def test_trainings_that_cannot_be(
    places: Path, tmp_path: Path, write_config: Callable[..., Path], capsys: Any, override: str, text: str
) -> None:
    words = [str(write_config()), override.replace("TMP", str(places)), "data.num_workers=0"]
    assert text.replace("TMP", str(places)) in said("train", words, capsys)
    assert not (tmp_path / "runs").exists()


def test_there_are_sixty() -> None:
    assert len(COMMAND_LINES) + len(TRAININGS) >= 60
