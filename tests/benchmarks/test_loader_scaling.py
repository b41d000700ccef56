"""The tables of the workers: every row says what it measured."""

from pathlib import Path

import pytest

from benchmarks.loader_scaling import main, rows
from tests.pipeline.support.stores import noise, numbered_frames, write_store

pytestmark = pytest.mark.integration  # starts processes


def test_rows_are_whole(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(80, 320, 256), noise(3))], codec="h264")
    found = list(rows(split, [1, 2], clips=2, seconds=0.2, device="cpu"))
    assert [(row["what"], row.get("workers")) for row in found] == [
        ("stages", None), ("workers", 1), ("workers", 2), ("loader", 0), ("loader", 1), ("loader", 2),
    ]  # fmt: skip
    stages = found[0]["cpu_ms"]
    assert set(stages) == {"plan", "read and check the cut", "decode", "sound", "answer"}
    assert min(stages.values()) > 0
    assert found[0]["sum_cpu_ms"] == pytest.approx(sum(stages.values()), abs=1e-3)
    for row in found[1:]:
        assert row["clips_per_second"] > 0
    assert found[1]["to_first"] == 1.0
    assert found[1]["parent_cpu_ms"] > 0
    assert (found[3]["worker_cpu_ms"], found[4]["worker_cpu_ms"] > 0) == (0.0, True)


def test_wrong_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--workers", "0"])
    assert "--clips, --workers and --seconds must be at least 1" in capsys.readouterr().err
