"""The measurement of grouped pixels: what it tries is what the model would run, and a site gives whole rows."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import pixel_groups
from model.avslowfast import AVSlowFast
from model.pixel_groups import widest_groups
from model.variants import VARIANTS


@pytest.mark.parametrize(("preset", "variant"), [("r50", "avslowfast_r50_4x16"), ("small", "small")])
def test_every_site_is_a_convolution_of_the_model(preset: str, variant: str) -> None:
    with torch.device("meta"):
        model = AVSlowFast(VARIANTS[variant])
    shapes = {
        (m.in_channels, m.out_channels, tuple(k for k in m.kernel_size if k > 1), max(m.stride))
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Conv3d)
    }
    sites = pixel_groups.sites(preset)
    for site in sites:
        taps = tuple(k for k in site.kernel if k > 1)
        assert (site.channels, site.out_channels, taps, max(site.stride)) in shapes, site.name
    assert {widest_groups(s.channels, s.out_channels) for s in sites} > {(8, 8), (4, 4)}


def test_a_measured_site(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = "--device cpu --preset small --clips 1 --repeats 1 --sites res3 --out"
    pixel_groups.main([*words.split(), str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["site"] for row in rows] == ["fast res3 reduce", "fast res3 strided 3x3", "fast res3 expand"]
    for row in rows:
        assert set(row["ms"]["1:1"]) == set(pixel_groups.PASSES)
        assert row["total_ms"]["1:1"] == pytest.approx(sum(row["ms"]["1:1"].values()), abs=2e-4)
        assert row["best_over_plain"] <= 1
        assert row["rule"] in row["total_ms"]


def test_no_such_site(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pixel_groups.main(["--sites", "res9"])
    assert "--sites (['res9'])" in capsys.readouterr().err
