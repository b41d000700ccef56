"""What commands import before there is work for it: help, typos and mistakes of a configuration need no torch."""

import json
import subprocess
import sys
from pathlib import Path

QUICKSTART = "experiments/configs/quickstart.yaml"
HEAVY = ("torch", "torchvision", "torchaudio", "nvidia.dali", "mlflow", "matplotlib", "sklearn", "pandas")
# What is typed, and what is said of it (help: on stdout; a mistake: on stderr).
CALLS = (
    ("train --help", "section.key=value"),
    (f"train {QUICKSTART} optim.lrr=1", "did you mean 'lr'?"),
    (f"train {QUICKSTART} --dryrun", "did you mean --dry-run?"),
    ("train experiments/configs/quickstrat.yaml", "did you mean experiments/configs/quickstart.yaml?"),
    ("evaluate --help", "--scores FILE"),
    ("evaluate runz/nothing", "must be a run folder, a checkpoint folder or a configuration file and exist"),
    (f"evaluate {QUICKSTART} views.num_clps=2", "did you mean 'num_clips'?"),
    ("evaluate x --checkpoint newest", "invalid choice: 'newest'"),
    ("predict --help", "--top"),
    ("predict runs/nothing", "the following arguments are required"),
    ("export --help", "--format"),
    ("export runz/nothing --out x", "must be a run folder, a checkpoint folder or a configuration file and exist"),
    ("export runs/x --out x --format onx", "did you mean onnx?"),
    ("sweep --help", "--commands"),
    ("sweep experiments/sweeps/nothing.yaml", "cannot be read"),
    ("combine --help", "ensemble"),
    ("combine ensembel x", "invalid choice: 'ensembel'"),
    ("prepare --help", "kinetics400"),
    ("prepare folder --help", "--short-side"),
    ("prepare folder --video x --out y --codec av1", "invalid choice: 'av1'"),
    ("track --help", "ui"),
    ("track ui --output-dir /nowhere", "must hold mlflow.db"),
)
PROGRAM = """
import contextlib, importlib, io, json, sys
calls, heavy = json.loads(sys.argv[1])
found = []
for call in calls:
    name, *words = call.split()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        module = importlib.import_module(f"experiments.{name}")
        try:
            module.main(words)
        except (ValueError, OSError) as error:
            print("error:", error)
        except SystemExit as end:
            pass
    found.append([call, out.getvalue(), [m for m in heavy if m in sys.modules]])
print(json.dumps(found))
"""


def test_help_and_mistakes_import_nothing_heavy() -> None:
    calls = [call for call, _ in CALLS]
    command = [sys.executable, "-c", PROGRAM, json.dumps([calls, HEAVY])]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(ran.stdout)
    assert [call for call, _, _ in found] == calls
    for (call, text, heavy), (_, said) in zip(found, CALLS, strict=True):
        assert heavy == [], f"{call} imported {heavy}"
        assert said in text, f"{call} said {text}"


def test_every_command_has_help_with_its_examples() -> None:
    named = {call.split()[0] for call, _ in CALLS}
    files = {path.stem for path in Path("experiments").glob("*.py")} - {"__init__", "__main__", "config", "runtime"}
    assert files == named
