"""The fused operation: DALI's CPU graph is its twin, float64 its reference; bitwise the same on every machine."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import CropWindow
from pipeline.frames.native import LEVELS, best_level, library_text, make_frames
from tests.pipeline.support.frames import LEVEL, Case, clip_of, random_case, random_planes, reference

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(bool(library_text()), reason="no library of frames is built")


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_graph(seed: int) -> None:
    """Of white noise, the hardest case, at most a value in ten thousand differs: sums that lie between two levels."""
    rng = np.random.default_rng(seed)
    for _ in range(2):
        case = random_case(rng)
        fused, graph = case.fused().astype(np.float64), case.by_graph().astype(np.float64)
        apart = np.abs(fused - graph) / LEVEL
        print(f"max {apart.max():.2f} levels, mean {apart.mean():.1e}, {np.mean(apart > 0):.1e} of the values")
        assert apart.max() <= 4.05  # one level of y, cb and cr; float16: a level is not exact there
        assert (apart > 0).mean() <= 5e-4
        assert apart.mean() <= 5e-4


def test_equals_the_graph_bit_for_bit_in_nearly_all_of_a_training_clip() -> None:
    """340x256, windows of jitter to 224 px and crops of an evaluation: the tolerance that the documentation states."""
    rng = np.random.default_rng(0)
    luma, chroma = random_planes(rng, 4, 256, 340)
    jitter = [CropWindow(left, top, side, side) for side, left, top in ((199.1, 31.3, 20.7), (179.2, 0.0, 76.8))]
    thirds = tuple(CropWindow(left, 0.0, 256.0, 256.0) for left in (0.0, 42.0, 84.0))
    cases = [Case(clip_of(luma, chroma, (window,), (224, 224), flip=True)) for window in jitter]
    for case in (*cases, Case(clip_of(luma, chroma, thirds, (256, 256)))):
        apart = np.abs(case.fused().astype(np.float64) - case.by_graph()) / LEVEL
        assert apart.max() <= 4.01
        assert (apart > 0).mean() <= 2e-5


@pytest.mark.parametrize("flip", [False, True])
def test_the_graph_rounds_halves_up_in_columns_beyond_a_multiple_of_16(flip: bool) -> None:
    """A whole-number reduction gives sums between two levels: to even here, in DALI's last columns up."""
    whole = CropWindow(0.0, 0.0, 112.0, 112.0)
    case = Case(clip_of(*random_planes(np.random.default_rng(0), 4, 112, 112), (whole,), (56, 56), flip=flip))
    ours, theirs = case.fused(), case.by_graph()
    apart = np.abs(ours.astype(np.float64) - theirs) / LEVEL
    first = apart[:, :, :, ::-1] if flip else apart
    assert not first[:, :, :, :48].any()
    assert 0.005 < (apart > 0).mean() < 0.02
    assert apart.max() <= 4.01


@pytest.mark.parametrize("seed", range(6))
def test_against_float64(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    case = replace(random_case(rng, 1, 120, even=False), half=False)
    got = case.fused()[..., :3].astype(np.float64) / LEVEL + 0.45 * 255
    assert np.abs(got - reference(case, rounded=False)).max() <= 2.1  # half a level of y, cb and cr, and of the colour
    apart = np.abs(got - reference(case, rounded=True))
    assert apart.max() <= 3.01
    assert (apart > 0.01).mean() <= 2e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (17, 18)])
def test_small_and_odd_pictures(height: int, width: int) -> None:
    rng = np.random.default_rng(height * 100 + width)
    for size in ((1, 1), (1, 7), (16, 5), (33, 40)):
        whole = CropWindow(0.0, 0.0, float(width), float(height))
        case = Case(clip_of(*random_planes(rng, 3, height, width), (whole,), size))
        got = case.fused().astype(np.float64) / LEVEL + 0.45 * 255
        apart = np.abs(got - reference(case, rounded=True))
        assert apart.max() <= 3.01
        assert (apart > 0.01).mean() <= 0.1


@pytest.mark.parametrize("seed", range(4))
def test_instruction_sets_agree_bit_for_bit(seed: int) -> None:
    case = random_case(np.random.default_rng(200 + seed))
    assert 0 <= best_level() < len(LEVELS)
    first = case.fused(level=0)
    for level in range(1, best_level() + 1):
        assert np.array_equal(case.fused(level=level), first), LEVELS[level]
    assert np.array_equal(case.fused(), first)
    if best_level() + 1 < len(LEVELS):
        with pytest.raises(ValueError, match="no such instruction set on this machine"):
            case.fused(level=best_level() + 1)


def test_types_channels_mirror_and_crops() -> None:
    rng = np.random.default_rng(1)
    planes = random_planes(rng, 3, 64, 96)
    crops = (CropWindow(0, 0, 64, 64), CropWindow(16, 0, 64, 64), CropWindow(31.5, 0.25, 63.5, 60))
    case = Case(clip_of(*planes, crops, (40, 48)))
    dense = case.fused()
    assert dense.shape == (3, 3, 40, 48, 3)
    assert np.array_equal(Case(case.clip, half=True).fused(), dense.astype(np.float16))
    four = Case(case.clip, channels=4).fused()
    assert np.array_equal(four[..., :3], dense)
    assert not four[..., 3].any()
    for number, window in enumerate(crops):
        assert np.array_equal(Case(clip_of(*planes, (window,), (40, 48))).fused()[0], dense[number])
    turned = Case(clip_of(*planes, crops, (40, 48), flip=True)).fused()
    assert np.array_equal(turned, dense[:, :, :, ::-1])


def test_planes_may_lie_in_larger_memory() -> None:
    luma, chroma = random_planes(np.random.default_rng(2), 6, 32, 48)
    inner = CropWindow(1, 2, 20, 18)
    views = luma[::2, 2:30, 4:40], chroma[::2, 1:15, 2:20]
    dense = tuple(np.ascontiguousarray(view) for view in views)
    assert views[0].strides[0] == 2 * 32 * 48
    given, copied = (Case(clip_of(*planes, (inner,), (24, 24))).fused() for planes in (views, dense))
    assert np.array_equal(given, copied)


def test_threads_give_what_one_gives() -> None:
    cases = [random_case(np.random.default_rng(300 + i)) for i in range(8)]
    alone = [case.fused() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(Case.fused, cases * 4))
    assert all(np.array_equal(alone[i % 8], got) for i, got in enumerate(together))


def test_wrong_arguments_are_named() -> None:
    luma, chroma = random_planes(np.random.default_rng(3), 2, 16, 20)
    windows, out = np.array([[0, 0, 16, 20]], np.float32), np.empty((1, 2, 8, 8, 3), np.float32)
    make_frames(luma, chroma, windows, False, out)
    read_only = np.empty_like(out)
    read_only.flags.writeable = False
    wrong = [
        (luma[..., 0], chroma, windows, out, "luma must be"),
        (luma.astype(np.int16), chroma, windows, out, "luma must be"),
        (luma[:, :, ::2], chroma, windows, out, "luma must be"),
        (luma[:, ::-1], chroma, windows, out, "luma must be"),
        (luma, chroma[:, 1:], windows, out, "chroma must be"),
        (luma, chroma[:1], windows, out, "chroma must be"),
        (luma, chroma[..., ::-1], windows, out, "chroma must be"),
        (luma, chroma, windows.astype(np.float64), out, "windows must be"),
        (luma, chroma, windows[:0], out[:0], "windows must be"),
        (luma, chroma, windows, out.astype(np.float64), "out must be"),
        (luma, chroma, windows, out[..., :2], "out must be"),
        (luma, chroma, windows, out[:, :1], "out must be"),
        (luma, chroma, windows, out.transpose(0, 1, 3, 2, 4)[:, :, :, ::-1], "out must be"),
        (luma, chroma, windows, read_only, "out must be"),
        (luma, chroma, windows, np.empty((1, 2, 0, 8, 3), np.float32), "sizes must be 1..32768 px"),
    ]
    for *arguments, box, to, message in wrong:
        with pytest.raises(ValueError, match=message):
            make_frames(*arguments, box, False, to)


@pytest.mark.parametrize(
    "window",
    [(-0.1, 0, 16, 20), (0, -0.1, 16, 20), (0, 0, 16.1, 20), (0, 0, 16, 20.1), (8, 0, 8, 20), (9, 0, 8, 20),
     (float("nan"), 0, 16, 20), (0, 0, float("nan"), 20), (0, 0, 16, float("inf")), (float("-inf"), 0, 16, 20)],
)  # fmt: skip
def test_windows_beyond_the_picture_are_refused(window: tuple[float, ...]) -> None:
    luma, chroma = random_planes(np.random.default_rng(4), 1, 16, 20)
    out = np.empty((2, 1, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="every crop window must be finite, not empty and inside the picture"):
        make_frames(luma, chroma, np.array([(0, 0, 16, 20), window], np.float32), False, out)


@pytest.mark.integration
def test_neither_torch_nor_dali_is_loaded() -> None:
    code = (
        "import sys; from pipeline.frames.native import best_level; best_level(); "
        "print([n for n in ('torch', 'nvidia.dali', 'av', 'pyarrow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
