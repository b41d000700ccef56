"""ModelOutput: it says what it is, and torch's machinery finds the tensors in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from model.output import ModelOutput, ModelOutputError
from tests.model.support.cases import audio_names, built, inputs, tiny


def test_wrong_use_names_the_right_one() -> None:
    values = torch.randn(2, 3)
    training, evaluation = ModelOutput(values, "logits"), ModelOutput(values, "scores")
    assert training.logits is values
    assert evaluation.scores is values
    with pytest.raises(ModelOutputError, match=r"was in training mode; read \.logits, or call model\.eval\(\)"):
        _ = training.scores
    with pytest.raises(ModelOutputError, match=r"was in evaluation mode; read \.scores, or call model\.train\(\)"):
        _ = evaluation.logits
    assert not hasattr(training, "scores")


def test_the_mode_of_the_model_decides() -> None:
    config = tiny(sync_loss="contrastive")
    model = built(config)
    frames, log_mel = inputs(config)
    plain, asked = model(frames, log_mel), model(frames, log_mel, negative_log_mel=log_mel.flip(0))
    assert plain.logits.shape == (4, 5)
    assert plain.sync_loss is plain.sync_accuracy is plain.sync_pairs is plain.rotation_logits is None
    assert [asked.sync_loss.shape, asked.sync_accuracy.shape, asked.sync_pairs.item()] == [(), (), 4]
    assert model.eval()(frames, log_mel).scores.sum().item() == pytest.approx(4, abs=1e-4)


def test_leaves_are_the_tensors_that_are_there() -> None:
    output = ModelOutput(torch.ones(2, 3), "logits", sync_loss=torch.tensor(2.0))
    leaves, spec = tree_flatten(output)
    assert [leaf.shape for leaf in leaves] == [(2, 3), ()]
    again = tree_unflatten(leaves, spec)
    assert again.logits is output.values
    assert again.sync_loss is output.sync_loss
    doubled = tree_map(lambda x: 2 * x, output)
    assert isinstance(doubled, ModelOutput)
    assert doubled.logits.sum() == 12
    assert doubled.sync_loss is not None
    assert doubled.sync_loss.item() == 4
    assert doubled.sync_pairs is None


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_data_parallel_finds_what_a_step_used() -> None:
    config = tiny(sync_loss="contrastive")
    model, plain = built(config), built(config)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for seed, drop_audio in enumerate((False, True, False)):
        frames, log_mel = inputs(config, seed=seed)
        for which in (parallel, plain):
            which.zero_grad(set_to_none=True)
            negative = None if drop_audio else log_mel.flip(0)
            out: Any = which(frames, log_mel, negative_log_mel=negative, drop_audio=drop_audio)
            assert isinstance(out, ModelOutput)
            (out.logits.square().sum() + (0 if out.sync_loss is None else out.sync_loss)).backward()
        unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert unused == {name for name, parameter in plain.named_parameters() if parameter.grad is None}
        assert not drop_audio or audio_names(model) <= unused
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.integration
def test_an_exported_model_gives_it_back(tmp_path: Path) -> None:
    config = tiny(pathways=("audio",), fusion="none")  # the smallest: what comes out is of the same kind
    model = built(config, settled=True).eval()
    _, log_mel = inputs(config)
    torch.export.save(torch.export.export(model, (None, log_mel)), tmp_path / "m.pt2")
    program: Any = torch.export.load(tmp_path / "m.pt2").module()
    found = program(None, log_mel)
    assert isinstance(found, ModelOutput)
    torch.testing.assert_close(found.scores, model(None, log_mel).scores, rtol=1e-5, atol=1e-6)
