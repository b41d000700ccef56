"""What a benchmark cannot measure is said in one line before it begins, without a traceback."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import fusion, model_speed, step

CASES: list[tuple[Callable[[list[str]], Any], str, str]] = [
    (step.main, "--repeats 0", "repeats (0) must be at least 1"),
    (step.main, "--clips 0", "clips (0) must be at least 1"),
    (step.main, "--clips 12", "batch of 12 clips must be"),
    (step.main, "--pixels -4", "pixels (-4) must be at least 32"),
    (
        step.main,
        "--variants audio_r50",
        "variant (audio_r50): head (softmax) and pathways (audio) must classify frames",
    ),
    (step.main, "--variants avslowfast_r50_4x16_ssl", "must classify frames"),
    (step.main, "--out nowhere/x.json", "--out (nowhere/x.json) must be a file in a folder that can be written"),
    (fusion.main, "--out nowhere/x.json", "--out (nowhere/x.json) must be a file in a folder that can be written"),
    (model_speed.main, "folded --out .", "--out (.) must be a file in a folder that can be written"),
    (
        model_speed.main,
        "dropped --variants slowfast_r50_4x16",
        "(slowfast_r50_4x16) must have sound for dropped",
    ),
    (model_speed.main, "step --variants audio_r50", "variant (audio_r50) must classify frames for step"),
    (model_speed.main, "folded --variants avslowfast_r50_4x16_ava", "must classify frames for folded"),
    (model_speed.main, "precision --px -5", "--px (-5) must be 0 (as in the paper) or at least 32"),
]


@pytest.mark.parametrize(("main", "arguments", "words"), CASES)
def test_wrong_use(
    main: Callable[[list[str]], Any], arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert words in capsys.readouterr().err
