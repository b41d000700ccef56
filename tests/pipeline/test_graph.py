"""The graph against plain references: PyAV frame by frame, torchaudio bin by bin, flash against click."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio

from pipeline.batch import Batch, has_padded_channels
from pipeline.clip import ClipPlan, ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.graph import GraphSpec, build_graph, graph_inputs, host_inputs
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import TrainPlan
from pipeline.source import FreshMemory, HostClip, Wanted, read_clip
from pipeline.store.reader import StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, read_number, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=64, flip=False, num_threads=2)
MEAN, STD = 0.45 * 255, 0.225 * 255


def first_batch(split: StoreSplit, config: DataConfig = CONFIG, spec: ClipSpec = SPEC, clips: int = 8) -> Batch:
    """One training batch."""
    batches = TrainLoader(split, spec, config, LoaderOptions(clips), seed=3).batches()
    batch = next(batches)
    batches.close()
    return batch


def pixels(batch: Batch) -> np.ndarray:
    """Frames as (B, T, H, W, 3) in 0..255."""
    assert batch.frames is not None
    return (batch.frames.float() * STD + MEAN).permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("gop", [12, 30])
@pytest.mark.parametrize("decoder", ["dali", "cpu"])
def test_frame_numbers_are_exact_at_random_starts(tmp_path: Path, gop: int, decoder: str) -> None:
    media = [(f"m{i}", numbered_frames(120, 96, 64), noise(4)) for i in range(2)]
    split = write_store(tmp_path / "s", media, gop=gop)
    config = replace(CONFIG, decoder=decoder)
    loader = TrainLoader(split, SPEC, config, LoaderOptions(8), seed=1)
    plan, batches = loader.plan, loader.batches()
    seen = set()
    for _ in range(4):
        batch = next(batches)
        # Crops are 64 of 96 pixels wide: read the number from the luma of the whole picture instead.
        for row, position in enumerate(batch.position.tolist()):
            clip = plan.clip(position)
            seen.add(clip.frames[0])
            expected = reference_crop(split, clip)
            got = pixels(batch)[row]
            assert np.abs(got - expected).max() <= 2.0, f"position {position}"
    assert len(seen) > 10
    batches.close()


def reference_crop(split: StoreSplit, clip: ClipPlan) -> np.ndarray:
    """The same clip by PyAV: YUV of each frame, centre-sited bilinear chroma, BT.601, bilinear crop window."""
    video = split.read_video(clip.media, 0, int(split.media.num_frames[clip.media]) - 1)
    with av.open(io.BytesIO(video.data.tobytes())) as container:
        decoded = list(container.decode(video=0))
    frames = []
    for number in clip.frames:
        frame = decoded[number]
        planes = [np.asarray(p).reshape(p.height, p.line_size)[:, : p.width].astype(np.float32) for p in frame.planes]
        luma, (cb, cr) = planes[0], (upsample(plane) for plane in planes[1:])
        rgb = np.stack(
            [
                1.164383 * (luma - 16) + 1.596027 * (cr - 128),
                1.164383 * (luma - 16) - 0.391762 * (cb - 128) - 0.812968 * (cr - 128),
                1.164383 * (luma - 16) + 2.017232 * (cb - 128),
            ]
        ).clip(0, 255)
        frames.append(bilinear(rgb, clip.crops[0], clip.size_px))
    return np.stack(frames).transpose(0, 2, 3, 1)


def upsample(plane: np.ndarray) -> np.ndarray:
    """(H/2, W/2) -> (H, W), bilinear, centre-sited."""
    tensor = torch.from_numpy(plane)[None, None]
    return torch.nn.functional.interpolate(tensor, scale_factor=2, mode="bilinear", align_corners=False)[0, 0].numpy()


def bilinear(picture: np.ndarray, window: CropWindow, size: tuple[int, int]) -> np.ndarray:
    """(3, H, W) -> (3, size): bilinear samples of the window, pixel centres at half integers, edges clamped."""
    ys = window.top + (np.arange(size[0]) + 0.5) * window.height / size[0] - 0.5
    xs = window.left + (np.arange(size[1]) + 0.5) * window.width / size[1] - 0.5
    y0, x0 = np.floor(ys).astype(int), np.floor(xs).astype(int)
    fy, fx = (ys - y0)[:, None], (xs - x0)[None, :]
    rows = [y.clip(0, picture.shape[1] - 1) for y in (y0, y0 + 1)]
    columns = [x.clip(0, picture.shape[2] - 1) for x in (x0, x0 + 1)]
    top, bottom = (picture[:, r][:, :, columns[0]] * (1 - fx) + picture[:, r][:, :, columns[1]] * fx for r in rows)
    return top * (1 - fy) + bottom * fy


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(60)])
def test_other_frame_rates_keep_the_span_in_seconds(tmp_path: Path, fps: Fraction) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(200, 128, 128), noise(8))], fps=fps)
    config = replace(CONFIG, crop_size_px=128, jitter_min_px=128, jitter_max_px=128)
    plan = TrainPlan(split, SPEC, config, seed=3)
    batch = first_batch(split, config, SPEC, clips=2)
    clip = plan.clip(0)
    shown = [read_number(frame) for frame in pixels(batch)[0]]
    assert shown == [number % 256 for number in clip.frames]
    times = np.array(clip.frames) / float(fps)
    wanted = clip.start_s + np.arange(8) * 2 / 30
    assert np.all(times <= wanted + 1e-6)
    assert np.all(times > wanted - 1 / float(fps))


def test_log_mel_equals_torchaudio(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(120), noise(4, seed=5))])
    batch = first_batch(split, clips=4)
    plan = TrainPlan(split, SPEC, CONFIG, seed=3)
    reference = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, hop_length=256, power=2.0, n_mels=40, center=False, norm="slaney", mel_scale="htk"
    )
    for row in range(4):
        clip = plan.clip(row)
        wave = torch.from_numpy(split.read_audio(clip.media, clip.audio_start, SPEC.num_audio_samples)) / 32768.0
        wanted = ((reference(wave) + 1e-8).log() + 7.03) / 4.66
        assert batch.log_mel is not None
        assert (batch.log_mel[row, 0] - wanted.T).abs().max() <= 1e-4


def test_batch_shares_memory_with_dali_and_survives_later_batches(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(120), noise(4))])
    spec = GraphSpec(SPEC, max_clips=2, num_threads=2)
    wanted = Wanted(SPEC.num_audio_samples, "dali")
    plan = TrainPlan(split, SPEC, CONFIG, seed=0)
    read = [read_clip(split, plan.clip(i), wanted, FreshMemory()) for i in range(2)]
    clips = [clip for clip in read if isinstance(clip, HostClip)]
    pipe = build_graph(spec, lambda: host_inputs(spec, clips))
    assert len(host_inputs(spec, clips)) == len(graph_inputs(spec)) == 7
    output = pipe.run()[0].as_tensor()
    frames = torch.from_dlpack(output).permute(0, 4, 1, 2, 3)
    assert frames.data_ptr() == output.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last_3d)
    kept = frames.clone()
    del output
    for _ in range(6):
        pipe.run()
    assert torch.equal(frames, kept)


def test_float16_frames_on_request(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(60), noise(2))])
    halves, floats = (
        next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(2, dtype=dtype), seed=3).batches()).frames
        for dtype in (torch.float16, torch.float32)
    )
    assert halves is not None
    assert floats is not None
    assert halves.dtype == torch.float16
    assert (halves.float() - floats).abs().max() <= 2e-3


def test_flip_mirrors_left_and_right(tmp_path: Path) -> None:
    frames = numbered_frames(60, 64, 64)
    split = write_store(tmp_path / "s", [("m", frames, noise(2))])
    plan = TrainPlan(split, SPEC, CONFIG, seed=3)
    straight, mirrored = (clip_pixels(split, replace(plan.clip(0), flip=flip)) for flip in (False, True))
    assert np.abs(mirrored - straight[:, :, ::-1]).max() <= 1e-3


def clip_pixels(split: StoreSplit, clip: ClipPlan) -> np.ndarray:
    """One clip through the graph, (T, H, W, 3) in 0..255."""
    spec = GraphSpec(SPEC, max_clips=1, num_threads=1, want_audio=False, prefetch=1)
    read = read_clip(split, clip, Wanted(SPEC.num_audio_samples, "dali"), FreshMemory())
    assert isinstance(read, HostClip)
    pipe = build_graph(spec, lambda: host_inputs(spec, [read]))
    return np.array(pipe.run()[0][0]) * STD + MEAN


@pytest.mark.integration
def test_flash_and_click_stay_together(tmp_path: Path) -> None:
    """50 pairs through encoder, store, cut, decode and spectrogram window: offset at most one 16 kHz sample."""
    rng = np.random.default_rng(0)
    media, times = [], []
    for number in range(50):
        flash = int(rng.integers(40, 80))
        frames = [np.full((64, 96, 3), 20, np.uint8) for _ in range(120)]
        frames[flash][:] = 235
        click = np.zeros(4 * 16_000, np.int16)
        at = round(flash / 30 * 16_000)
        click[at : at + 16] = 20_000  # 1 ms
        media.append((f"m{number}", frames, click))
        times.append(flash / 30)
    split = write_store(tmp_path / "s", media)
    spec = replace(SPEC, num_frames=32, frame_stride=1, num_mel_frames=66)
    loader = TrainLoader(split, spec, CONFIG, LoaderOptions(10), seed=2)
    plan, batches = loader.plan, loader.batches()
    offsets: list[float] = []
    step = 0
    while len(offsets) < 50:
        batch = next(batches)
        shown = pixels(batch).mean(axis=(2, 3, 4))  # (B, T)
        for row, position in enumerate(batch.position.tolist()):
            clip = plan.clip(position)
            wave = split.read_audio(clip.media, clip.audio_start, spec.num_audio_samples)
            loud = np.flatnonzero(np.abs(wave.astype(int)) > 10_000)
            if shown[row].max() < 150 or not len(loud):
                continue
            seen_s = clip.start_s + int(shown[row].argmax()) / 30
            heard_s = (clip.audio_start + int(loud[0])) / 16_000
            assert batch.log_mel is not None
            column = int(batch.log_mel[row, 0].sum(1).argmax())  # the spectrogram shows it in the same place
            assert 0 <= int(loud[0]) - column * 256 < 512
            offsets.append(abs(seen_s - heard_s))
        step += 1
        assert step < 40
    batches.close()
    print(f"{len(offsets)} pairs: offset mean {np.mean(offsets) * 1e3:.3f} ms, max {np.max(offsets) * 1e3:.3f} ms")
    assert max(offsets) <= 1 / 16_000


def batch_of_layout(split: StoreSplit, pad_channels: bool, device: str, crops: int, dtype: torch.dtype) -> Batch:
    """One batch with flips and turns (one crop) or of an evaluation (three crops)."""
    config = replace(CONFIG, jitter_max_px=80, flip=True, rotation=True)
    options = LoaderOptions(6, device=device, dtype=dtype, pad_channels=pad_channels)
    if crops == 1:
        return next(TrainLoader(split, SPEC, config, options, seed=3).batches())
    views = ViewConfig(num_clips=2, num_crops=crops, crop_size_px=64)
    return next(EvalLoader(split, SPEC, config, options, views=views).batches())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_four_channels_in_memory_show_the_same_three(
    tmp_path: Path, device: str, crops: int, dtype: torch.dtype
) -> None:
    split = write_store(tmp_path / "s", [(f"m{i}", numbered_frames(60, 192, 128), None) for i in range(3)])
    dense, padded = (batch_of_layout(split, pad, device, crops, dtype).frames for pad in (False, True))
    assert dense is not None
    assert padded is not None
    if device == "cuda" and dtype is torch.float16:  # another kernel of DALI's: one place of values from 1 to 2
        torch.testing.assert_close(padded, dense, rtol=2**-10, atol=2**-10)
    else:
        assert torch.equal(dense, padded)
    assert dense.is_contiguous(memory_format=torch.channels_last_3d)
    clips, _, t, h, w = padded.shape
    assert padded.stride() == (4 * t * h * w, 1, 4 * h * w, 4 * w, 4)
    four = padded.as_strided((clips, 4, t, h, w), padded.stride())  # the last fourth channel is in the memory as well
    assert not four[:, 3].any()


def test_layout_of_frames_is_checked_and_kept_by_copies(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(60), noise(2))])
    for pad_channels in (False, True):
        batch = batch_of_layout(split, pad_channels, "cpu", 1, torch.float16)
        copy = batch.clone()
        assert batch.frames is not None
        assert copy.frames is not None
        assert copy.frames.stride() == batch.frames.stride()
        assert copy.frames.data_ptr() != batch.frames.data_ptr()
        assert torch.equal(copy.frames, batch.frames)
        assert has_padded_channels(copy.frames) == pad_channels
        assert copy.frames.untyped_storage().nbytes() == 6 * 8 * 64 * 64 * (4 if pad_channels else 3) * 2
        for wrong in (batch.frames.contiguous(), batch.frames[:, :, ::2], batch.frames[:, :2]):
            with pytest.raises(AssertionError, match="must be"):
                replace(batch, frames=wrong)


@pytest.mark.needs_cuda
def test_frames_on_a_gpu_have_four_channels_in_memory(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(60), noise(2))])
    options = LoaderOptions(2, device="cuda", dtype=torch.float16)
    frames = next(TrainLoader(split, SPEC, CONFIG, options, seed=3).batches()).frames
    assert frames is not None
    assert has_padded_channels(frames)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_gpu_graph_equals_cpu_graph(tmp_path: Path, codec: str) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(120, 192, 128), noise(4))], codec=codec)
    cpu = next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(4), seed=3).batches())
    gpu = next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(4, device="cuda:0"), seed=3).batches())
    assert cpu.frames is not None
    assert gpu.frames is not None
    assert gpu.log_mel is not None
    assert (gpu.frames.cpu() - cpu.frames).abs().max() * STD <= 3.0
    assert cpu.log_mel is not None
    assert (gpu.log_mel.cpu() - cpu.log_mel).abs().max() <= 1e-3
