"""A checkpoint among MLflow's artifacts takes no space of its own where both lie on one file system."""

import os
from pathlib import Path
from typing import Any

import pytest

from experiments.records.local_artifacts import link_folder


def test_a_new_best_replaces_the_links_and_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    first, second, root = tmp_path / "first", tmp_path / "second", tmp_path / "with space"
    for folder in (first, second):
        folder.mkdir()
        (folder / "state.pt").write_text(folder.name)
    assert link_folder(first, root.as_uri(), "checkpoints/best")
    stored = root / "checkpoints" / "best" / "state.pt"
    assert stored.samefile(first / "state.pt")
    assert link_folder(second, str(root), "checkpoints/best")
    assert stored.samefile(second / "state.pt")
    assert (first / "state.pt").read_text() == "first"
    assert os.stat(first / "state.pt").st_nlink == 1


@pytest.mark.parametrize("uri", ["mlflow-artifacts:/1/a", "http://host/a", "s3://bucket/a", "file://host/a"])
def test_artifacts_elsewhere_are_left_to_mlflow(uri: str, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_text("x")
    assert not link_folder(tmp_path, uri, "checkpoints/best")


def test_without_links_what_is_copied_is_not_written_into_a_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    (source / "state.pt").write_text("old")
    assert link_folder(source, root.as_uri(), "best")

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert not link_folder(source, root.as_uri(), "best")
    assert not (root / "best" / "state.pt").exists()  # MLflow opens its target for writing: it must not be ours
