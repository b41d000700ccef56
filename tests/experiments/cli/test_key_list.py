"""What the commands say of themselves: keys, commands, versions, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS
from experiments.cli.key_list import key_table
from experiments.config import Config, flat_config, load_config

QUICKSTART = "experiments/configs/quickstart.yaml"
LIGHT = """import sys
from experiments.train import main
main({arguments!r})
print('torch' in sys.modules, file=sys.stderr)
"""


def test_every_key_is_listed_once_with_its_default() -> None:
    lines = key_table(Config)
    assert [line.split()[0] for line in lines] == list(flat_config(Config()))
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert found["optim.momentum"] == "0.9 number >= 0.0 < 1.0"
    assert found["runtime.device"] == "auto auto | cpu | cuda"
    assert found["data.flip"] == "true true | false"


@pytest.mark.parametrize("arguments", [["--keys"], [QUICKSTART, "--print-config", "train.seed=7"]])
def test_what_only_tells_imports_no_torch(arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stderr.strip() == "False"
    assert "optim.lr" in ran.stdout or "seed: 7" in ran.stdout


def test_a_wrong_data_path_imports_no_torch() -> None:
    code = (
        "import sys\nfrom experiments.train import main\ntry:\n    main([sys.argv[1], 'data.path=nowhere'])\n"
        "except ValueError as error:\n    print(error, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, QUICKSTART], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "data.path (nowhere) must exist; make a store with: python -m experiments.prepare False\n"


def test_printed_configuration_reads_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.train import main

    assert main([QUICKSTART, "--print-config", "optim.lr=0.25", "name=mine"]) == 0
    written = tmp_path / "mine.yaml"
    written.write_text(capsys.readouterr().out)
    assert load_config(written) == load_config(Path(QUICKSTART), ["optim.lr=0.25", "name=mine"])


def test_every_command_is_listed() -> None:
    files = {path.stem for path in Path("experiments").glob("*.py")} - {"__init__", "__main__", "config", "runtime"}
    assert set(COMMANDS) == files
