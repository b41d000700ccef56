"""predict --attention: the affinity of the sound with every place, and its picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.engine.attention import NoAttentionError, affinities, attending_stages
from experiments.predict import main as predict
from experiments.train import main as train
from model.fusion import mean_frequency
from tests.model.support.cases import built, inputs, tiny
from tests.pipeline.support.plain_videos import write_video


def test_the_maps_are_what_the_model_multiplies() -> None:
    """Queries of every step times keys over their number, computed apart; the frame that is bright has another map."""
    model = built(tiny(fusion="av_nonlocal"), settled=True).eval()
    stages = attending_stages(model)
    assert sorted(stages) == ["res3", "res4"]
    frames, log_mel = inputs(model.config, clips=2)
    given: dict[str, Any] = {}
    module = stages["res4"]
    hook = module.register_forward_pre_hook(lambda _m, args: given.update(slow=args[0], fast=args[1], audio=args[2]))
    with torch.inference_mode():
        maps = affinities(stages, lambda: model(frames, log_mel))
        hook.remove()
        fused = module.fast_to_slow(given["slow"], given["fast"])
        key = module.key(torch.nn.functional.max_pool3d(fused, (1, *(min(2, s) for s in fused.shape[3:]))))
        query = module.query(mean_frequency(given["audio"].positive))  # (2, C, M, 1)
        products = query.flatten(2).transpose(1, 2) @ key.flatten(2) / key.shape[2:].numel()  # (2, M, places)
    expected = products.mean(1).unflatten(1, key.shape[2:])
    torch.testing.assert_close(maps["res4"], expected, rtol=1e-4, atol=1e-6)
    assert maps["res3"].shape[1] == model.config.num_frames
    assert maps["res4"].std() > 0


def test_other_models_have_no_such_attention() -> None:
    for model in (built(tiny()), None):
        with pytest.raises(NoAttentionError, match=r"must be given for a model with model\.fusion=av_nonlocal"):
            attending_stages(model)


@pytest.mark.integration
def test_the_picture_of_a_file(write_config: Any, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2", "model.fusion=av_nonlocal"]) == 0
    rng = np.random.default_rng(0)
    film = write_video(
        tmp_path / "film.mkv", frames=[rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(75)]
    )
    command = [str(film), "--attention", str(tmp_path / "out"), "data.num_workers=0"]
    assert run_command(predict, [str(tmp_path / "runs" / "tiny"), *command]) == 0
    assert (tmp_path / "out" / "film.png").stat().st_size > 20_000
    capsys.readouterr()
    assert run_command(predict, [str(tiny_run), *command]) == 2
    assert "must be given for a model with model.fusion=av_nonlocal, not other fusions" in capsys.readouterr().err
