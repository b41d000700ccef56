"""Folded and saved: each gives what the original gives (exported forms: test_export.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels.modules import GhostBatchNorm
from model.export import ExportError, load_model, save_model
from model.folding import fold
from tests.model.support.cases import built, inputs, tiny


@pytest.mark.parametrize(
    "changes",
    [
        {"sync_loss": "contrastive"},
        {"fusion": "a_f_s", "audio_block": "table1"},
        {"fusion": "av_nonlocal", "drop_pathway_mode": "running_average"},
        {"depth": 26, "nonlocal_blocks": (0,)},
        {"head": "sigmoid"},
    ],
)
def test_folded_equals_unfolded(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    model = built(config, settled=True).double().eval()
    frames, log_mel = (x.double() for x in inputs(config, clips=2))
    folded = fold(model)
    assert not any(isinstance(m, GhostBatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(frames, log_mel).scores, model(frames, log_mel).scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(folded(frames).scores, model(frames).scores, rtol=1e-9, atol=1e-12)
    assert any(isinstance(m, GhostBatchNorm) for m in model.modules())  # the original is as it was


def test_folded_in_float32_and_channels_last() -> None:
    config = tiny()
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config)
    folded = fold(model)
    with torch.no_grad():
        error = (folded(frames, log_mel).scores - model(frames, log_mel).scores).abs().max()
    assert error < 2e-6
    for module in folded.modules():
        if isinstance(module, nn.Conv3d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_save_and_load(tmp_path: Path) -> None:
    config = tiny(sync_loss="classification", fusion="av_nonlocal")
    model = built(config, settled=True).eval()
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == config
    frames, log_mel = inputs(config)
    torch.testing.assert_close(again(frames, log_mel).scores, model(frames, log_mel).scores, rtol=0, atol=0)
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    content["model"]["width"] = 16
    (tmp_path / "m" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="does not fit"):
        load_model(tmp_path / "m")
    with pytest.raises(ExportError, match=r"must hold config\.json"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ExportError, match="is folded and must have its batch normalisations"):
        save_model(fold(model), tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "text", ["[]", "null", "[" * 100_000, "{}", '{"format": "avslowfast-model", "version": 1}', "\udcff", "{"]
)
def test_damaged_configuration_is_an_export_error(tmp_path: Path, text: str) -> None:
    save_model(built(tiny()), tmp_path)
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ExportError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_torn_weights_are_an_export_error(tmp_path: Path, keep: int) -> None:
    save_model(built(tiny()), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ExportError, match="of save_model"):
        load_model(tmp_path)


def test_folding_again_changes_nothing() -> None:
    config = tiny()
    folded = fold(built(config, settled=True))
    frames, log_mel = inputs(config)
    torch.testing.assert_close(fold(folded)(frames, log_mel).scores, folded(frames, log_mel).scores, rtol=0, atol=0)
