"""Names of SlowFast's tensors in released files: PySlowFast (.pyth), its caffe2 blobs (.pkl), pytorchvideo."""

from collections.abc import Callable, Iterator

from model.config import ModelConfig

_NORM = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}  # caffe2's suffixes of a BN blob
_NONLOCAL = {"query": "theta", "key": "phi", "value": "g", "out": "out"}
_SHORT = {"weight": "w", "bias": "b"}
Layer = Callable[[int, int, int, str], tuple[str, str]]


def file_names(config: ModelConfig, kind: str) -> Iterator[tuple[str, str]]:
    """Pairs (name in the model, name in the file) of every tensor of the visual pathways.

    Args:
        config: has visual pathways.
        kind: "caffe2", "pyslowfast" or "pytorchvideo".
    """
    layer = {"caffe2": _caffe2, "pyslowfast": _pyslowfast, "pytorchvideo": _pytorchvideo}[kind]
    for ours, convolution, norm in _layers(config, layer):
        yield f"{ours[0]}.weight", convolution.format(_SHORT["weight"] if kind == "caffe2" else "weight")
        for key, short in _NORM.items():
            yield f"{ours[1]}.{key}", norm.format(short if kind == "caffe2" else key)
    for block in config.nonlocal_blocks:
        where = f"slow.stages.res4.nonlocal{block}"
        for ours_name, theirs in _NONLOCAL.items():
            for key, short in _SHORT.items():
                yield (
                    f"{where}.{ours_name}.{key}",
                    f"nonlocal_conv4_{block}_{theirs}_{short}"
                    if kind == "caffe2"
                    else f"s4.pathway0_nonlocal{block}.conv_{theirs}.{key}",
                )
        for key, short in _NORM.items():
            caffe2 = f"nonlocal_conv4_{block}_bn_{short}"
            yield f"{where}.norm.{key}", caffe2 if kind == "caffe2" else f"s4.pathway0_nonlocal{block}.bn.{key}"
    fc = {"caffe2": "pred_{}", "pyslowfast": "head.projection.{}", "pytorchvideo": "blocks.6.proj.{}"}[kind]
    for key, short in _SHORT.items():
        yield f"head.classifier.visual.{key}", fc.format(short if kind == "caffe2" else key)


def _layers(config: ModelConfig, layer: Layer) -> Iterator[tuple[tuple[str, str], str, str]]:
    """(our convolution, our norm), their convolution, their norm: of stems, blocks and F->S, in order."""
    for number, pathway in enumerate(("slow", "fast")):
        stem = f"{pathway}.stem"
        yield (f"{stem}.conv", f"{stem}.norm"), *layer(number, 1, 0, "stem")
        for stage, blocks in enumerate(config.stage_blocks, start=2):
            for block in range(blocks):
                for part in ("shortcut", "a", "b", "c") if block == 0 else ("a", "b", "c"):
                    ours = f"{pathway}.stages.res{stage}.{block}.{part}"
                    yield (f"{ours}.conv", f"{ours}.norm"), *layer(number, stage, block, part)
    for stage, name in enumerate(("pool1", "res2", "res3", "res4"), start=1):
        if name in config.lateral_stages:
            ours = f"stages.{name}.fast_to_slow"
            last = 0 if stage == 1 else config.stage_blocks[stage - 2] - 1
            yield (f"{ours}.conv", f"{ours}.fuse.norm"), *layer(0, stage, last, "fuse")


def _pyslowfast(pathway: int, stage: int, block: int, part: str) -> tuple[str, str]:
    if part == "stem":
        return f"s1.pathway{pathway}_stem.conv.{{}}", f"s1.pathway{pathway}_stem.bn.{{}}"
    if part == "fuse":
        return f"s{stage}_fuse.conv_f2s.{{}}", f"s{stage}_fuse.bn.{{}}"
    branch = "branch1" if part == "shortcut" else f"branch2.{part}"
    where = f"s{stage}.pathway{pathway}_res{block}.{branch}"
    return f"{where}.{{}}", f"{where}_bn.{{}}"


def _caffe2(pathway: int, stage: int, block: int, part: str) -> tuple[str, str]:
    prefix = "t_" if pathway else ""
    if part == "stem":
        return f"{prefix}conv1_{{}}", f"{prefix}res_conv1_bn_{{}}"
    if part == "fuse":
        where = "t_pool1_subsample" if stage == 1 else f"t_res{stage}_{block}_branch2c_bn_subsample"
        return f"{where}_{{}}", f"{where}_bn_{{}}"
    branch = "branch1" if part == "shortcut" else f"branch2{part}"
    where = f"{prefix}res{stage}_{block}_{branch}"
    return f"{where}_{{}}", f"{where}_bn_{{}}"


def _pytorchvideo(pathway: int, stage: int, block: int, part: str) -> tuple[str, str]:
    blocks = f"blocks.{stage - 1}."
    if part == "fuse":
        return f"{blocks}multipathway_fusion.conv_fast_to_slow.{{}}", f"{blocks}multipathway_fusion.norm.{{}}"
    where = f"{blocks}multipathway_blocks.{pathway}."
    if part == "stem":
        return f"{where}conv.{{}}", f"{where}norm.{{}}"
    where += f"res_blocks.{block}."
    if part == "shortcut":
        return f"{where}branch1_conv.{{}}", f"{where}branch1_norm.{{}}"
    return f"{where}branch2.conv_{part}.{{}}", f"{where}branch2.norm_{part}.{{}}"
