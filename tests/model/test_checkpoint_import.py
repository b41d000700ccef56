"""Toy checkpoints in the three documented namings, written here by rule, and files that have to be refused."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint_files import CheckpointImportError
from model.checkpoint_import import import_weights
from model.folding import fold
from tests.model.support.cases import built, inputs, tiny, visual

ALL = ("pool1", "res2", "res3", "res4")
LAYOUT: dict[str, Any] = {"depth": 26, "lateral_stages": ALL, "nonlocal_blocks": (1,)}


def pyslowfast_name(name: str) -> str:
    """PySlowFast's name of one of our tensors, by regular expressions over ours (independent of the importer)."""
    attention = {"query": "theta", "key": "phi", "value": "g", "out": "out"}
    rules = [
        (r"^(slow|fast)\.stem\.conv", lambda m: f"s1.pathway{path(m[1])}_stem.conv"),
        (r"^(slow|fast)\.stem\.norm", lambda m: f"s1.pathway{path(m[1])}_stem.bn"),
        (r"^slow\.stages\.res4\.nonlocal(\d+)\.norm", lambda m: f"s4.pathway0_nonlocal{m[1]}.bn"),
        (
            r"^slow\.stages\.res4\.nonlocal(\d+)\.(query|key|value|out)",
            lambda m: f"s4.pathway0_nonlocal{m[1]}.conv_{attention[m[2]]}",
        ),
        (
            r"^(slow|fast)\.stages\.res(\d)\.(\d+)\.shortcut\.(conv|norm)",
            lambda m: f"s{m[2]}.pathway{path(m[1])}_res{m[3]}.branch1{'_bn' if m[4] == 'norm' else ''}",
        ),
        (
            r"^(slow|fast)\.stages\.res(\d)\.(\d+)\.([abc])\.(conv|norm)",
            lambda m: f"s{m[2]}.pathway{path(m[1])}_res{m[3]}.branch2.{m[4]}{'_bn' if m[5] == 'norm' else ''}",
        ),
        (r"^stages\.pool1\.fast_to_slow\.conv", lambda m: "s1_fuse.conv_f2s"),
        (r"^stages\.pool1\.fast_to_slow\.fuse\.norm", lambda m: "s1_fuse.bn"),
        (r"^stages\.res(\d)\.fast_to_slow\.conv", lambda m: f"s{m[1]}_fuse.conv_f2s"),
        (r"^stages\.res(\d)\.fast_to_slow\.fuse\.norm", lambda m: f"s{m[1]}_fuse.bn"),
        (r"^head\.classifier\.visual", lambda m: "head.projection"),
    ]  # fmt: skip
    for pattern, made in rules:
        found = re.match(pattern, name)
        if found:
            return made(found) + name[found.end() :]
    raise AssertionError(name)


def path(pathway: str) -> int:
    return {"slow": 0, "fast": 1}[pathway]


def pytorchvideo_name(name: str) -> str:
    """From PySlowFast's name to pytorchvideo's."""
    name = re.sub(r"^s1\.pathway(\d)_stem\.(conv|bn)", r"blocks.0.multipathway_blocks.\1.\2", name)
    name = re.sub(
        r"^s(\d)\.pathway(\d)_res(\d+)\.",
        lambda m: f"blocks.{int(m[1]) - 1}.multipathway_blocks.{m[2]}.res_blocks.{m[3]}.",
        name,
    )
    name = re.sub(
        r"^s(\d)_fuse\.conv_f2s", lambda m: f"blocks.{int(m[1]) - 1}.multipathway_fusion.conv_fast_to_slow", name
    )
    name = re.sub(r"^s(\d)_fuse\.bn", lambda m: f"blocks.{int(m[1]) - 1}.multipathway_fusion.norm", name)
    name = name.replace("branch1_bn", "branch1_norm").replace("branch1.", "branch1_conv.")
    name = re.sub(r"branch2\.([abc])_bn", r"branch2.norm_\1", name)
    name = re.sub(r"branch2\.([abc])\.", r"branch2.conv_\1.", name)
    name = re.sub(r"(multipathway_blocks\.\d)\.bn", r"\1.norm", name)
    return name.replace("head.projection", "blocks.6.proj")


def caffe2_name(name: str) -> str:
    """From PySlowFast's name to the caffe2 blob's (two blocks a stage here: F->S follows block 1)."""
    name = re.sub(r"^s1\.pathway0_stem\.conv", "conv1", re.sub(r"^s1\.pathway1_stem\.conv", "t_conv1", name))
    name = re.sub(r"^s1\.pathway0_stem\.bn", "res_conv1_bn", re.sub(r"^s1\.pathway1_stem\.bn", "t_res_conv1_bn", name))
    name = re.sub(r"^s1_fuse\.conv_f2s", "t_pool1_subsample", re.sub(r"^s1_fuse\.bn", "t_pool1_subsample_bn", name))
    name = re.sub(r"^s(\d)_fuse\.conv_f2s", r"t_res\1_1_branch2c_bn_subsample", name)
    name = re.sub(r"^s(\d)_fuse\.bn", r"t_res\1_1_branch2c_bn_subsample_bn", name)
    name = re.sub(r"^s4\.pathway0_nonlocal(\d)\.(?:conv_)?", r"nonlocal_conv4_\1_", name)
    name = re.sub(r"^s(\d)\.pathway0_res(\d)\.branch1", r"res\1_\2_branch1", name)
    name = re.sub(r"^s(\d)\.pathway1_res(\d)\.branch1", r"t_res\1_\2_branch1", name)
    name = re.sub(r"^s(\d)\.pathway0_res(\d)\.branch2\.", r"res\1_\2_branch2", name)
    name = re.sub(r"^s(\d)\.pathway1_res(\d)\.branch2\.", r"t_res\1_\2_branch2", name)
    name = name.replace("head.projection", "pred")
    is_norm = "_bn." in name
    for key, short in {
        "weight": "s" if is_norm else "w",
        "bias": "b",
        "running_mean": "rm",
        "running_var": "riv",
    }.items():
        name = re.sub(rf"\.{key}$", f"_{short}", name)
    return name


def visual_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}


def write_pkl(state: dict[str, Tensor], folder: Path) -> Path:
    blobs = {caffe2_name(pyslowfast_name(n)): v.contiguous().numpy() for n, v in state.items()}
    blobs["conv1_w_momentum"], blobs["lr"] = np.zeros(3, np.float32), np.zeros(1, np.float32)
    file = folder / "toy.pkl"
    file.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    return file


def write_pyth(state: dict[str, Tensor], folder: Path) -> Path:
    file = folder / "toy.pyth"
    named = {pyslowfast_name(n): v for n, v in state.items()}
    torch.save({"epoch": 3, "model_state": named, "optimizer_state": {"lr": 0.1}, "cfg": "TRAIN: true"}, file)
    return file


def write_pytorchvideo(state: dict[str, Tensor], folder: Path) -> Path:
    file = folder / "toy_ptv.pyth"
    torch.save({"model_state": {pytorchvideo_name(pyslowfast_name(n)): v for n, v in state.items()}}, file)
    return file


@pytest.mark.parametrize(
    ("write", "kind", "layout"),
    [
        (write_pkl, "caffe2", LAYOUT),
        (write_pyth, "pyslowfast", LAYOUT),
        (write_pytorchvideo, "pytorchvideo", LAYOUT | {"nonlocal_blocks": ()}),  # pytorchvideo has no Non-local blocks
    ],
)
def test_imported_weights_give_the_same_activations(
    write: Callable[[dict[str, Tensor], Path], Path], kind: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    config = visual(**layout)
    source = built(config, seed=1, settled=True).eval()
    file = write(visual_state(source), tmp_path)
    target = built(config, seed=2)
    report = import_weights(target, file)
    frames, _ = inputs(config)
    torch.testing.assert_close(target.eval()(frames).scores, source(frames).scores, rtol=0, atol=0)
    assert report.format == kind
    assert set(report.loaded) == set(visual_state(source))
    assert report.kept == {}
    assert set(report.unused.values()) == ({"optimizer state"} if kind == "caffe2" else set())
    for module in target.modules():
        if isinstance(module, torch.nn.Conv3d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_audiovisual_model_takes_the_visual_part(tmp_path: Path) -> None:
    source = built(visual(**LAYOUT), seed=1, settled=True).eval()
    file = write_pyth(visual_state(source), tmp_path)
    target = built(tiny(**LAYOUT), seed=2)
    assert target.audio is not None
    audio = target.audio.stem.time.weight.clone()
    report = import_weights(target, file)
    frames, _ = inputs(target.config)
    torch.testing.assert_close(target.eval()(frames).scores, source(frames).scores, rtol=0, atol=0)
    assert torch.equal(target.audio.stem.time.weight, audio)
    assert "head.classifier.audio.weight" in report.kept
    assert all("audio" in n or "average" in n for n in report.kept)
    assert "have no audio" in str(report)


def test_classifier_can_stay_behind(tmp_path: Path) -> None:
    file = write_pkl(visual_state(built(visual(**LAYOUT), seed=1)), tmp_path)
    target = built(visual(**LAYOUT | {"num_classes": 9}), seed=2)
    with pytest.raises(CheckpointImportError, match=r"pred_w has shape \(5, 320\), the model \(9, 320\)"):
        import_weights(target, file)
    report = import_weights(target, file, classifier=False)
    assert report.kept == dict.fromkeys(
        ("head.classifier.visual.weight", "head.classifier.visual.bias"), "classifier=False"
    )
    assert report.unused["pred_w"] == "classifier=False"


def test_other_shapes_are_refused_with_all_differences_and_nothing_is_changed(tmp_path: Path) -> None:
    file = write_pyth(visual_state(built(visual(**LAYOUT), seed=1)), tmp_path)
    target = built(visual(**LAYOUT | {"lateral_stages": ("res3", "res4")}), seed=2)
    before = visual_state(target)
    with pytest.raises(CheckpointImportError) as caught:
        import_weights(target, file)
    text = str(caught.value)
    assert "differences (4)" in text
    for name in ("res2.0.a", "res2.0.shortcut", "res3.0.a", "res3.0.shortcut"):
        assert f"slow.stages.{name}.conv.weight" in text
    assert all(torch.equal(v, before[n]) for n, v in visual_state(target).items())
    deeper = built(visual(**LAYOUT | {"depth": 50}), seed=2)
    with pytest.raises(CheckpointImportError, match=r"the file has no s2\.pathway0_res2\.branch2\.a\.weight"):
        import_weights(deeper, file)


WEIGHT, VARIANCE = "s5.pathway1_res1.branch2.c.weight", "s5.pathway1_res1.branch2.c_bn.running_var"
LATE = "fast.stages.res5.1.c"  # nearly all other tensors come before it


def spoiled(change: Callable[[dict[str, Tensor]], None], folder: Path) -> Path:
    state = {pyslowfast_name(n): v for n, v in visual_state(built(visual(**LAYOUT), seed=1)).items()}
    change(state)
    torch.save({"model_state": state}, folder / "spoiled.pyth")
    return folder / "spoiled.pyth"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            WEIGHT,
            lambda v: v.index_fill(0, torch.tensor(0), torch.nan),
            rf"{LATE}.conv.weight: .* 16 values that are not finite",
        ),
        (WEIGHT, lambda v: v / 0, "not finite"),
        (WEIGHT, lambda v: v.double().fill_(1e300), "not finite in torch.float32"),
        (VARIANCE, lambda v: v - 2, rf"{LATE}.norm.running_var: .* negative variances, down to -1"),
        (WEIGHT, lambda v: v > 0, "has type torch.uint8, not floating point"),
        (WEIGHT, lambda v: v.long(), "has type torch.int64, not floating point"),
        (WEIGHT, lambda v: v.to(torch.complex64), "ComplexFloatStorage"),
        (WEIGHT, lambda v: v.to_sparse(), "_rebuild_sparse_tensor"),
        (WEIGHT, lambda v: v.to("meta"), "_rebuild_meta_tensor"),
        (WEIGHT, lambda v: [1, 2], f"the file has no {WEIGHT}"),
    ],
)
def test_one_unsound_tensor_changes_nothing(
    name: str, change: Callable[[Tensor], object], message: str, tmp_path: Path
) -> None:
    file = spoiled(lambda state: state.update({name: change(state[name])}), tmp_path)  # type: ignore[call-overload]
    target = built(visual(**LAYOUT), seed=2)
    before = visual_state(target)
    with pytest.raises(CheckpointImportError, match=message):
        import_weights(target, file)
    assert all(torch.equal(v, before[n]) for n, v in visual_state(target).items())


def test_half_precision_and_strided_weights_fit(tmp_path: Path) -> None:
    file = spoiled(lambda state: state.update({WEIGHT: state[WEIGHT].repeat(2, 1, 1, 1, 1)[::2].half()}), tmp_path)
    target = built(visual(**LAYOUT), seed=2)
    import_weights(target, file)
    source = built(visual(**LAYOUT), seed=1).state_dict()[f"{LATE}.conv.weight"]
    read = target.state_dict()[f"{LATE}.conv.weight"]
    assert torch.equal(read, source.repeat(2, 1, 1, 1, 1)[::2].half().float())


def test_models_without_the_layers_are_refused(tmp_path: Path) -> None:
    file = write_pyth(visual_state(built(visual(**LAYOUT), seed=1)), tmp_path)
    with pytest.raises(CheckpointImportError, match="must include slow and fast"):
        import_weights(built(tiny(pathways=("audio",), fusion="none")), file)
    folded = fold(built(visual(**LAYOUT), seed=2).eval())
    before = visual_state(folded)
    with pytest.raises(CheckpointImportError, match=r"has no slow\.stem\.norm\.weight .* before it is folded"):
        import_weights(folded, file)
    assert all(torch.equal(v, before[n]) for n, v in visual_state(folded).items())


class Hostile:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.flag,))


@pytest.mark.parametrize("suffix", [".pkl", ".pyth"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_runs_no_code(suffix: str, protocol: int, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    file = tmp_path / f"hostile{suffix}"
    content = {"blobs": {"conv1_w": Hostile(flag)}, "model_state": {"s1": Hostile(flag)}}
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, file, pickle_protocol=max(protocol, 2))
    with pytest.raises(CheckpointImportError, match="plain containers"):
        import_weights(built(visual()), file)
    assert not flag.exists()
    pickle.loads(pickle.dumps(Hostile(flag)))
    assert flag.exists()  # the pickle is a live one


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pkl"
    file.write_bytes(pickle.dumps({"blobs": {"fc_w": np.zeros(2)}}))
    with pytest.raises(CheckpointImportError, match="holds none of conv1_w"):
        import_weights(built(visual()), file)
    with pytest.raises(CheckpointImportError, match="missing"):
        import_weights(built(visual()), tmp_path / "missing.pyth")
    (tmp_path / "torn.pyth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointImportError, match="reading it failed"):
        import_weights(built(visual()), tmp_path / "torn.pyth")
