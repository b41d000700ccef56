"""config.yaml of a run that was edited between two starts: found and named, by whatever is started."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config, load_config
from experiments.engine.trained_model import load_target
from experiments.records.run_folder import RunFolderError, check_run_folder
from experiments.train import main
from tests.experiments.support.damage import make_run


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Config:
    """Of a run with checkpoints of steps 1 and 2."""
    config = load_config(write_config())
    make_run(config.run_dir, config)
    return config


def edit(path: Path, old: str, new: str) -> None:
    """Change a value of a configuration."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def line(run_dir: Path, step: int, keys: str) -> str:
    """What is said."""
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    return (
        f"{run_dir / 'config.yaml'} must hold what {checkpoint} was trained with, but differs ({keys}); "
        f"copy {checkpoint / 'config.yaml'} over it, and give settings that differ on the command line"
    )


def test_edited_configuration_is_named_whatever_is_started(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path = config.run_dir / "config.yaml"
    check_run_folder(config)
    edit(path, "seed: 0\n", "seed: 7\n")
    expected = line(config.run_dir, 2, "train.seed: 0 -> 7")
    for asked in (config, load_config(path)):  # the former settings, and the edited file itself
        with pytest.raises(RunFolderError) as found:
            check_run_folder(asked)
        assert str(found.value) == expected
    assert run_command(main, [str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {expected}"
    assert "seed: 7\n" in path.read_text()  # nothing was written
    with pytest.raises(ConfigError) as refused:
        load_target(config.run_dir, "last", [])
    assert str(refused.value) == expected
    path.write_bytes((config.run_dir / "checkpoints" / "step-00000002" / "config.yaml").read_bytes())  # as it says
    check_run_folder(config)
    load_target(config.run_dir, "last", [])


def test_damaged_copy_of_the_configuration_decides_nothing(config: Config) -> None:
    copy = config.run_dir / "checkpoints" / "step-00000002" / "config.yaml"
    edit(copy, "seed: 0\n", "seed: 5\n")
    check_run_folder(config)
    edit(config.run_dir / "config.yaml", "seed: 0\n", "seed: 7\n")
    with pytest.raises(RunFolderError) as found:
        check_run_folder(config)
    assert str(found.value) == line(config.run_dir, 1, "train.seed: 0 -> 7")


def test_operational_keys_may_be_edited(config: Config) -> None:
    edit(config.run_dir / "config.yaml", "clip_deadline_s: 60.0\n", "clip_deadline_s: 90.0\n")
    check_run_folder(config)
    assert load_target(config.run_dir, "last", [])[0].data.clip_deadline_s == 90.0
