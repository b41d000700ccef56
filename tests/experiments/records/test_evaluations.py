"""evaluations.json chooses `best`: every byte of it counts; what was lost is rebuilt from the metrics, and said."""

import json
import math
import os
from pathlib import Path

import pytest

from experiments.records.run_folder import RunFolderError, read_evaluations, record_evaluations
from experiments.records.sealed import SealError, read_sealed, sealed_json
from experiments.records.spool import Spool

RESULTS = {2: {"top1": 0.25, "mean_ap": math.nan}, 4: {"top1": 0.7512345678901234, "mean_ap": 1e-7}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that evaluated at steps 2 and 4 of 4."""
    spool = Spool(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        spool.metrics(step, {"train/loss": 1.0})
        if step in RESULTS:
            spool.metrics(step, {f"val/{name}": value for name, value in RESULTS[step].items()})
            spool.metrics(step, {"val/samples_missing": 0.0})
    spool.close()
    record_evaluations(tmp_path, RESULTS)
    return tmp_path


def test_every_flipped_bit_is_found_and_mended(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "evaluations.json"
    whole = path.read_bytes()
    for position in range(8 * len(whole)):
        data = bytearray(whole)
        data[position // 8] ^= 1 << (position % 8)
        with pytest.raises(SealError):
            read_sealed(bytes(data), "avsf-evaluations", 2)
        if position % 101:
            continue  # what follows writes to the disk
        path.write_bytes(data)
        caplog.clear()
        assert repr(read_evaluations(folder)) == repr(RESULTS), position
        assert f"{path} is damaged (" in caplog.text, position
        assert f"rebuilt from {folder / 'metrics.jsonl'}, with step 2, 4" in caplog.text
        assert path.read_bytes() == whole


def test_file_of_version_1_is_read_and_sealed_with_the_next_result(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "evaluations.json"
    path.write_text('{\n "2": {\n  "top1": 0.125,\n  "mean_ap": null\n },\n "4": {\n  "top1": 1\n }\n}\n')
    assert repr(read_evaluations(folder)) == "{2: {'top1': 0.125, 'mean_ap': nan}, 4: {'top1': 1.0}}"
    record_evaluations(folder, {6: {"top1": 0.5}})
    assert json.loads(path.read_text())["version"] == 2
    assert sorted(read_evaluations(folder)) == [2, 4, 6]
    assert caplog.text == ""


@pytest.mark.parametrize("text", ['{"2": 1}', '{"2": {"top1": "0.5"}}', '{"2": {"top1": [1]}}', "[]", "", "{" * 9999])
def test_what_is_of_no_version_is_rebuilt(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "evaluations.json").write_text(text)
    assert repr(read_evaluations(folder)) == repr(RESULTS)
    assert "is damaged" in caplog.text


def test_missing_file_gives_what_the_training_went_past(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "evaluations.json").unlink()
    assert repr(read_evaluations(folder)) == repr({2: RESULTS[2]})  # that of step 4 may have been cut off: done again
    assert f"{folder / 'evaluations.json'} is missing: it is rebuilt from" in caplog.text


def test_file_of_a_later_version_is_refused(folder: Path) -> None:
    path = folder / "evaluations.json"
    path.write_text(later := sealed_json("avsf-evaluations", 3, {}))
    with pytest.raises(RunFolderError, match=r"evaluations.json: it is of version 3; .* reads version 2; use the code"):
        read_evaluations(folder)
    assert path.read_text() == later
    with pytest.raises(SealError, match="of the format 'avsf-evaluations' and must be 'other'"):
        read_sealed(later.encode(), "other", 3)


def test_fifo_is_replaced_and_a_disk_that_refuses_is_no_obstacle_to_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "evaluations.json"
    path.unlink()
    os.mkfifo(path)

    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.records.run_folder.write_file", refuse)
        assert repr(read_evaluations(folder)) == repr(RESULTS)
    assert "it is a FIFO and must be a regular file" in caplog.text
    assert path.is_fifo()
    assert repr(read_evaluations(folder)) == repr(RESULTS)
    assert path.is_file()
