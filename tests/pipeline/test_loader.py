"""The loader: same clips for any number of ranks, exact evaluation, quarantine, masks, multi-crop, memory."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import MediaError
from pipeline.loader import EvalLoader, LoaderOptions, QuarantineError, TrainLoader
from pipeline.nvdec.choice import choose_decoder
from pipeline.nvdec.hardware import why_not
from pipeline.plan import NegativeSchedule
from pipeline.store.reader import Store, StoreSplit
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(
    crop_size_px=64, jitter_min_px=64, jitter_max_px=72, num_threads=2, num_workers=0, max_quarantined_share=1.0
)


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    """Six media, the last one silent."""
    media = [(f"m{i}", numbered_frames(60), noise(2, seed=i) if i < 5 else None) for i in range(6)]
    return write_store(tmp_path / "store", media)


def take(split: StoreSplit, steps: int, start: int = 0, **options: object) -> list[object]:
    """The first batches of one rank."""
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(**options), seed=1)  # type: ignore[arg-type]
    batches = loader.batches(start)
    out = [next(batches) for _ in range(steps)]
    batches.close()
    return out


def test_two_ranks_see_what_one_sees(split: StoreSplit) -> None:
    whole = take(split, 3, clips_per_batch=4)
    halves = [take(split, 3, clips_per_batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        joined = torch.cat([halves[0][step].frames, halves[1][step].frames])  # type: ignore[attr-defined]
        assert torch.equal(joined, whole[step].frames)  # type: ignore[attr-defined]
        ids = halves[0][step].ids + halves[1][step].ids  # type: ignore[attr-defined]
        assert ids == whole[step].ids  # type: ignore[attr-defined]


def test_a_resumed_stream_is_the_uninterrupted_one(split: StoreSplit) -> None:
    through = take(split, 5, clips_per_batch=4)
    resumed = take(split, 2, start=3, clips_per_batch=4)
    for a, b in zip(through[3:], resumed, strict=True):
        assert torch.equal(a.frames, b.frames)  # type: ignore[attr-defined]
        assert torch.equal(a.log_mel, b.log_mel)  # type: ignore[attr-defined]


def test_silent_media_carry_a_mask_and_a_zero_spectrogram(split: StoreSplit) -> None:
    batch = take(split, 1, clips_per_batch=6)[0]
    silent = [name == "m5" for name in batch.ids]  # type: ignore[attr-defined]
    assert batch.has_audio.tolist() == [not s for s in silent]  # type: ignore[attr-defined]
    levels = batch.log_mel.abs().amax(dim=(1, 2, 3))  # type: ignore[attr-defined]
    assert levels[silent].tolist() == [0.0]
    assert (levels[[not s for s in silent]] > 0.1).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_is_exact_for_any_number_of_ranks(split: StoreSplit, world_size: int) -> None:
    views = ViewConfig(num_clips=3, num_crops=3, crop_size_px=64)
    seen = []
    for rank in range(world_size):
        options = LoaderOptions(4, rank=rank, world_size=world_size)
        for batch in EvalLoader(split, SPEC, CONFIG, options, views=views):
            seen += list(zip(batch.sample.tolist(), batch.view.tolist(), strict=True))
            assert batch.frames is not None
            assert batch.frames.shape == (len(batch), 3, 8, 64, 64)
    assert sorted(seen) == [(sample, view) for sample in range(6) for view in range(9)]


def test_crops_of_a_clip_differ_in_space_only(split: StoreSplit) -> None:
    views = ViewConfig(num_clips=1, num_crops=3, crop_size_px=64)
    batch = next(EvalLoader(split, SPEC, CONFIG, LoaderOptions(2), views=views).batches())
    assert batch.frames is not None
    assert batch.log_mel is not None
    first = batch.frames[:3].float()
    assert (first[0] - first[1]).abs().max() > 0.5
    assert torch.equal(batch.log_mel[0], batch.log_mel[2])
    assert batch.ids[0] == batch.ids[2]


def damage(split: StoreSplit, media: int) -> None:
    """Flip a byte in the middle of a medium's video."""
    shard = split.store.path / "shards" / "00000.bin"
    data = bytearray(shard.read_bytes())
    cut = split.read_video(media, 0, 59)
    place = -1
    for _ in range(media + 1):  # the media show the same frames, so the same bytes come once a medium
        place = data.find(bytes(cut.data[-200:]), place + 1)
    assert place > 0
    data[place + 100] ^= 0xFF
    shard.write_bytes(bytes(data))


def test_damaged_media_are_substituted_in_training_and_left_out_of_evaluation(split: StoreSplit) -> None:
    damage(split, 2)
    broken = Store.open(split.store.path).split("train")
    spec = replace(SPEC, num_frames=16, frame_stride=3)
    loader = TrainLoader(broken, spec, CONFIG, LoaderOptions(6), seed=1)
    batches = loader.batches()
    epochs = [next(batches) for _ in range(4)]
    batches.close()
    assert loader.stats.quarantined >= 1
    names = {name for name, _ in loader.quarantine}
    assert names == {"m2"}
    assert "crc32" in loader.quarantine[0][1]
    substitutes = sum(int(batch.is_substitute.sum()) for batch in epochs)
    assert substitutes >= 1
    assert loader.stats.yielded + substitutes == 24
    for batch in epochs:
        assert all(name != "m2" or not sub for name, sub in zip(batch.ids, batch.is_substitute, strict=True))

    evaluation = EvalLoader(broken, spec, CONFIG, LoaderOptions(4), views=ViewConfig(1, 1, 64))
    scored = [name for batch in evaluation for name in batch.ids]
    assert sorted(scored) == ["m0", "m1", "m3", "m4", "m5"]
    assert evaluation.stats.yielded + evaluation.stats.quarantined == len(broken.samples)


def test_too_many_damaged_media_stop_the_run(split: StoreSplit) -> None:
    damage(split, 2)
    damage(split, 3)
    broken = Store.open(split.store.path).split("train")
    config = replace(CONFIG, max_quarantined_share=0.1)
    spec = replace(SPEC, num_frames=16, frame_stride=3)
    with pytest.raises(QuarantineError, match=r"2 of 6 samples cannot be read.*max_quarantined_share"):
        list(EvalLoader(broken, spec, config, LoaderOptions(4), views=ViewConfig(1, 1, 64)))


def test_h264_store_is_decoded_by_ffmpeg_on_a_cpu(tmp_path: Path) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(60, 160, 128), noise(2))], codec="h264")
    assert choose_decoder(split, "auto", "cpu") == "cpu"
    assert choose_decoder(split, "dali", "cuda:0") == "dali"
    with pytest.raises(ValueError, match="cannot decode h264"):
        choose_decoder(split, "dali", "cpu")
    batch = next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(2), seed=0).batches())
    assert batch.frames is not None
    assert float(batch.frames.std()) > 0.5


def test_pictures_too_small_for_nvdec_are_refused_by_dali(tmp_path: Path) -> None:
    media = [(f"m{height}", numbered_frames(2, 144, height), None) for height in (128, 112, 144)]
    split = write_store(tmp_path / "s", media)
    assert choose_decoder(split, "cpu", "cuda:0") == "cpu"
    assert choose_decoder(split, "dali", "cpu") == "dali"
    found = "1 of 3 videos are smaller than 128x128 px, the least that NVDEC takes, the first is m112 (144x112)"
    with pytest.raises(ValueError, match=re.escape(f"cannot decode on cuda:0: {found}; use data.decoder=cpu")):
        choose_decoder(split, "dali", "cuda:0")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("codec", ["vp9", "h264"])
@pytest.mark.parametrize("side_px", [112, 128])
def test_least_pictures_of_nvdec(tmp_path: Path, codec: str, side_px: int) -> None:
    split = write_store(tmp_path / "s", [("m", numbered_frames(60, side_px, side_px), noise(2))], codec=codec)
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(2, device="cuda:0"), seed=0)
    frames = next(loader.batches()).frames
    with_nvdec = codec == "h264" and side_px == 128 and not why_not(0)
    assert loader.decoder == ("both" if with_nvdec else "cpu")
    assert frames is not None
    assert float(frames.std()) > 0.5


def test_rotation_turns_pictures_and_is_told(split: StoreSplit) -> None:
    config = replace(CONFIG, rotation=True, flip=False)
    loader = TrainLoader(split, SPEC, config, LoaderOptions(6))
    turned = loader.plan
    batch = next(loader.batches())
    assert batch.rotation is not None
    assert batch.rotation.tolist() == [turned.clip(i).rotation for i in range(6)]
    assert len(set(batch.rotation.tolist())) > 1
    still = replace(CONFIG, flip=False)
    straight = TrainLoader(split, SPEC, still, LoaderOptions(6))
    straight.plan.clip = lambda position: replace(turned.clip(position), rotation=0)  # type: ignore[method-assign]
    plain = next(straight.batches())
    assert plain.frames is not None
    assert batch.frames is not None
    for row, turns in enumerate(batch.rotation.tolist()):
        assert torch.equal(batch.frames[row], torch.rot90(plain.frames[row], turns, dims=(-2, -1)))


def test_negatives_are_other_sound(split: StoreSplit) -> None:
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(6), negatives=NegativeSchedule(enabled=True))
    batch = next(loader.batches())
    assert batch.negative_log_mel is not None
    assert batch.log_mel is not None
    both = batch.has_audio & batch.has_negative
    assert int(both.sum()) >= 4
    assert ((batch.negative_log_mel - batch.log_mel)[both].abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_video_or_audio_can_be_left_out(split: StoreSplit) -> None:
    deaf = next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(2, want_audio=False)).batches())
    blind = next(TrainLoader(split, SPEC, CONFIG, LoaderOptions(2, want_video=False)).batches())
    assert deaf.log_mel is None
    assert deaf.frames is not None
    assert blind.frames is None
    assert blind.log_mel is not None
    assert np.array_equal(deaf.position.numpy(), blind.position.numpy())


def test_a_negative_that_cannot_be_read_costs_nobody_its_clip(
    split: StoreSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = TrainLoader(split, SPEC, CONFIG, LoaderOptions(6), negatives=NegativeSchedule(enabled=True))
    broken = loader.plan.clip(0).negative_media
    read_audio = StoreSplit.read_audio

    def fail(self: StoreSplit, media: int, start: int, count: int) -> np.ndarray:
        if media == broken:
            raise MediaError("m", "audio", "crc32 must match")
        return read_audio(self, media, start, count)

    monkeypatch.setattr(StoreSplit, "read_audio", fail)
    batch = next(loader.batches())
    assert not bool(batch.has_negative[0])
    assert {name for name, _ in loader.quarantine} <= {split.media.id(broken)}


def test_wrong_use_says_what_to_use(split: StoreSplit) -> None:
    for kind in (TrainLoader, EvalLoader):
        with pytest.raises(TypeError, match=r"dataset \(Store\) must be one split .*open_dataset\(path, split\)"):
            kind(split.store, SPEC, CONFIG)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"has no length: it goes on without end; use plan\.samples_per_epoch"):
        len(TrainLoader(split, SPEC, CONFIG))


@pytest.mark.parametrize("step", [-1, 1.0, True, "0"])
def test_steps_that_are_none_are_refused(split: StoreSplit, step: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"start_step ({step!r}) must be a whole number, at least 0")):
        TrainLoader(split, SPEC, CONFIG).batches(step)  # type: ignore[arg-type]


def test_schedules_and_views_of_another_kind_are_refused(split: StoreSplit) -> None:
    with pytest.raises(TypeError, match=r"negatives \('curriculum'\) must be a NegativeSchedule"):
        TrainLoader(split, SPEC, CONFIG, negatives="curriculum")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"views \(3\) must be a ViewConfig"):
        EvalLoader(split, SPEC, CONFIG, views=3)  # type: ignore[arg-type]


def test_an_evaluation_knows_its_length(split: StoreSplit) -> None:
    for rank in range(2):
        loader = EvalLoader(split, SPEC, CONFIG, LoaderOptions(4, rank=rank, world_size=2), views=ViewConfig(3, 1, 64))
        assert len(loader) == len(list(loader)) == 3


@pytest.mark.parametrize("ahead", [1, 4])
def test_replaced_clips_count_when_they_are_handed_out(split: StoreSplit, ahead: int) -> None:
    damage(split, 2)
    broken = Store.open(split.store.path).split("train")
    config = replace(CONFIG, max_quarantined_share=1.0, prefetch_batches=ahead)
    loader = TrainLoader(broken, replace(SPEC, num_frames=16, frame_stride=3), config, LoaderOptions(6), seed=1)
    batches = loader.batches()
    substitutes = 0
    for step in range(1, 9):
        substitutes += int(next(batches).is_substitute.sum())
        assert loader.stats.yielded + loader.stats.quarantined == 6 * step
        assert loader.stats.quarantined == substitutes
    batches.close()
    assert substitutes >= 1
