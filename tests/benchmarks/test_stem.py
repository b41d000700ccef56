"""The first convolutions' benchmark runs small, keeps its rows and says what it cannot measure."""

import json
from pathlib import Path

import pytest

from benchmarks import stem


def test_rows_of_both_pathways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stem.json"
    words = f"--device cpu --clips 2 1 --frames 8 --pixels 16 --repeats 1 --out {out}"
    result = stem.main(words.split())
    assert json.loads(out.read_text()) == result
    assert result["finished"]
    assert [(row["clips"], row["pathway"]) for row in result["rows"]] == [
        (1, "fast"),
        (1, "slow"),
        (2, "fast"),
        (2, "slow"),
    ]
    for row in result["rows"]:
        # The library's kernels serve CUDA only.
        assert set(row) - {"clips", "pathway"} == {
            f"{way}_{part}" for way in ("grouped", "plain") for part in ("forward", "weight_grad")
        }
        assert all(value["ms"] > 0 for value in row.values() if isinstance(value, dict))
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--clips 0", "clips (0) must be at least 1"),
        ("--repeats 0", "repeats (0) must be at least 1"),
        ("--out nowhere/x.json", "--out (nowhere/x.json) must be a file in a folder that can be written"),
    ],
)
def test_wrong_use(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        stem.main(words.split())
    assert message in capsys.readouterr().err
