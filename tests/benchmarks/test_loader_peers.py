"""The comparison of loaders: what it reads back is right, what is wrong is found, rows say what failed."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from benchmarks.peers import clips as loader_clips
from benchmarks.peers import compare as loader_peers
from benchmarks.peers import runs as peer_runs
from benchmarks.peers.clips import CLIP_FRAMES, CLIP_SAMPLES, FRAME_STEP, check_clip, pictures, read_number
from benchmarks.peers.common import Draw, crop_first, log_mel, source_window, whole_frames
from benchmarks.peers.compare import arms_of, chosen, goals
from benchmarks.peers.environment import OUTCOME
from benchmarks.peers.runs import Arm, Run, Turns, combined, decoded, run_arm

FIRST = 37
DRAW = Draw("", FIRST, 300, (0.2, 0.9), True)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    chosen = dict(enumerate(pictures(3, FIRST + CLIP_FRAMES * FRAME_STEP)))
    return torch.from_numpy(np.stack([chosen[FIRST + FRAME_STEP * i] for i in range(CLIP_FRAMES)]))


def mel_of(first: int, shift_samples: int = 0) -> np.ndarray:
    """Log-mel of the sound of a clip, taken `shift_samples` late."""
    wave = loader_clips.sound(10.0)[::3].astype(np.float32) / 32768
    begin = round(first * 16_000 / 30) + loader_clips.audio_offset() + shift_samples
    return log_mel(torch.from_numpy(wave[begin : begin + CLIP_SAMPLES]))[0].numpy()


@pytest.mark.parametrize("number", [0, 1, 254, 299])
@pytest.mark.parametrize("side", [256, 320])
def test_a_number_is_read_from_any_crop(number: int, side: int) -> None:
    picture = next(p for n, p in enumerate(pictures(number)) if n == number)
    for at in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.3)):
        for flip in (False, True):
            drawn = Draw("", 0, side, at, flip)
            clip = crop_first(torch.from_numpy(picture)[None].permute(0, 3, 1, 2), drawn)
            shown = ((clip[:, 0] * 0.225 + 0.45) * 255).permute(1, 2, 0).numpy()
            assert read_number(shown) == number


def test_both_ways_to_augment_give_the_same_picture(frames: torch.Tensor) -> None:
    tuned = crop_first(frames.permute(0, 3, 1, 2), DRAW)
    plain = whole_frames(frames, DRAW)
    assert tuned.shape == plain.shape == (3, CLIP_FRAMES, 224, 224)
    assert (tuned - plain).abs().mean() * 0.225 * 255 < 8  # crops of whole source pixels, another order


def test_a_right_clip_passes(frames: torch.Tensor) -> None:
    first, error_ms = check_clip(crop_first(frames.permute(0, 3, 1, 2), DRAW).numpy(), mel_of(FIRST))
    assert first == FIRST
    assert error_ms < 8


def test_a_wrong_frame_is_found(frames: torch.Tensor) -> None:
    clip = crop_first(frames.permute(0, 3, 1, 2), DRAW).numpy()
    clip[:, 9] = clip[:, 8]
    with pytest.raises(ValueError, match="frames read back"):
        check_clip(clip, mel_of(FIRST))


@pytest.mark.parametrize("shift_ms", [-60, 40, 700])
def test_sound_from_elsewhere_is_found(frames: torch.Tensor, shift_ms: int) -> None:
    clip = crop_first(frames.permute(0, 3, 1, 2), DRAW).numpy()
    with pytest.raises(ValueError, match="clicks"):
        check_clip(clip, mel_of(FIRST, shift_ms * 16))


def test_a_picture_without_a_strip_is_found() -> None:
    with pytest.raises(ValueError, match="strip"):
        read_number(np.full((224, 224, 3), 90.0))


def test_the_window_of_a_crop_lies_in_the_source() -> None:
    for side in (256, 288, 320):
        top, left, size = source_window(256, 340, Draw("", 0, side, (1.0, 1.0), False))
        assert size == round(224 * 256 / side)
        assert (top + size, left + size) == (256, 340)


def test_a_video_shows_the_numbers_of_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_clips, "NUM_FRAMES", 40)
    monkeypatch.setattr(loader_clips, "pictures", lambda seed: pictures(seed, 40))
    loader_clips.write_video(tmp_path / "a.mp4", 1, 12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        found = [
            (frame.key_frame, read_number(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)
        ]
    assert [number for _, number in found] == list(range(40))
    assert [number for is_key, number in found if is_key] == [0, 12, 24, 36]


def test_a_loader_that_is_not_installed_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSF_PEERS", str(tmp_path / "none"))
    arm = Arm(loader_peers.TORCHCODEC, loader_peers.SHORT, tmp_path)
    row = combined(arm, [run_arm(arm, Run(8, 2, 1.0, 1, 5.0), 0)])
    assert "make peers" in row["failed"]
    assert row["loader"] == loader_peers.TORCHCODEC


@pytest.mark.integration
def test_a_run_that_takes_too_long_ends_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = tmp_path / "peers"
    (peers / "bin").mkdir(parents=True)
    (peers / "bin" / "python").write_text(f"#!/bin/sh\n{sys.executable} -c 'import time; time.sleep(60)'\n")
    (peers / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("AVSF_PEERS", str(peers))
    row = run_arm(Arm(loader_peers.TORCHCODEC, loader_peers.SHORT, tmp_path), Run(8, 2, 1.0, 1, 1.0), 0)
    assert row == {"failed": "not done within 1 s"}


def run_row(cpu_s: float, **more: object) -> dict[str, object]:
    """Figures of one run."""
    row = dict.fromkeys(peer_runs.FIGURES, 1.0) | {"cpu_s_per_clip": cpu_s, "first_frames": [0, 13], "versions": {}}
    return row | more


def test_repeats_become_a_row_of_medians(tmp_path: Path) -> None:
    arm = Arm(loader_peers.PROJECT, loader_peers.STORE, tmp_path)
    row = combined(arm, [run_row(0.03), run_row(0.01), run_row(0.02), {"failed": "lost"}])
    assert row["cpu_s_per_clip"] == 0.02
    assert row["repeats"] == 3
    assert row["failed_repeats"] == ["lost"]
    assert row["frames_decoded_per_clip"] == 63.5  # 0..62, and 12..75


def test_decoded_frames_count_from_the_key_frame(tmp_path: Path) -> None:
    published = Arm(loader_peers.PYSLOWFAST, loader_peers.ORIGINALS, tmp_path)
    assert decoded(Arm("x", loader_peers.ORIGINALS, tmp_path), [100]) == 163
    assert decoded(published, [100]) == 100 + 63 + 5 + 1
    assert decoded(Arm("x", loader_peers.SHORT, tmp_path), [24]) == 63


def test_goals_are_ratios_of_cpu_seconds() -> None:
    rows = [
        {"loader": loader_peers.PROJECT, "source": loader_peers.STORE, "cpu_s_per_clip": 0.03},
        {"loader": loader_peers.PYSLOWFAST, "source": loader_peers.ORIGINALS, "cpu_s_per_clip": 0.21},
        {"loader": loader_peers.TORCHCODEC, "source": loader_peers.SHORT, "failed": "not installed"},
    ]
    found = goals(rows)
    assert (found[0]["ratio"], found[0]["at_least"]) == (7.0, 6.0)
    assert [goal["ratio"] for goal in found[1:]] == [None, None, None]


def test_a_loader_that_pip_could_not_install_is_a_row_with_the_words_of_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / OUTCOME).write_text('{"decord": "no wheel for this machine", "spdl": "ok"}')
    monkeypatch.setenv("AVSF_PEERS", str(tmp_path))
    row = run_arm(Arm("decord + DataLoader", loader_peers.SHORT, tmp_path), Run(8, 2, 1.0, 1, 5.0), 0)
    assert row == {"failed": "not installed: no wheel for this machine"}


ARMS = [Arm("SPDL", loader_peers.SHORT, Path()), Arm(loader_peers.PROJECT, loader_peers.STORE, Path())]


def played(monkeypatch: pytest.MonkeyPatch, takes_s: list[float], *, seconds: float, repeats: int) -> list[list[dict]]:
    """Rows after each run of `ARMS`, whose runs take `takes_s` by a clock that only they move."""
    clock, left = [100.0], list(takes_s)
    monkeypatch.setattr(peer_runs.time, "monotonic", lambda: clock[0])

    def run(arm: Arm, how: Run, seed: int) -> dict[str, object]:
        clock[0] += left.pop(0)
        return run_row(0.01 * (seed + 1))

    monkeypatch.setattr(peer_runs, "run_arm", run)
    turns, seen = Turns(ARMS, Run(8, 2, 1.0, repeats, 5.0), seconds, began=100.0), []
    turns.go(lambda text: seen.append(turns.rows))
    assert not left
    return seen


def test_rows_are_there_after_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = played(monkeypatch, [5, 6, 5, 6], seconds=60, repeats=2)
    assert [[(row["loader"], row["repeats"], row["cpu_s_per_clip"]) for row in rows] for rows in seen] == [
        [("SPDL", 1, 0.01)],
        [("SPDL", 1, 0.01), (loader_peers.PROJECT, 1, 0.01)],
        [("SPDL", 2, 0.015), (loader_peers.PROJECT, 1, 0.01)],
        [("SPDL", 2, 0.015), (loader_peers.PROJECT, 2, 0.015)],
    ]


def test_a_repeat_that_would_end_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, last) = played(monkeypatch, [10, 4, 4], seconds=20, repeats=2)  # 14 s after the first round: 10 do not fit
    assert [(row["loader"], row["repeats"]) for row in last] == [("SPDL", 1), (loader_peers.PROJECT, 2)]


def test_an_arm_that_there_was_no_time_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, last) = played(monkeypatch, [30], seconds=45, repeats=1)
    assert last[0]["repeats"] == 1
    assert last[1]["failed"] == "not run: the time for all (0.75 minutes) is over; use --only"


def test_names_choose_loaders_and_wrong_ones_are_told() -> None:
    assert chosen("decord, spdl", list(loader_peers.LOADERS), "--only") == ["decord", "spdl"]
    assert chosen(None, ["a", "b"], "--only") == ["a", "b"]
    with pytest.raises(ValueError, match=r"--only \(decor\) must be of pyslowfast, .*pytorchvideo, project"):
        chosen("decor", list(loader_peers.LOADERS), "--only")


def test_only_what_is_chosen_is_made_and_goals_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    folders = {gop: tmp_path / f"gop{gop}" for gop in loader_clips.GOPS}
    monkeypatch.setattr(
        loader_peers, "make_videos", lambda root, count, gops: made.append(tuple(gops)) or {g: folders[g] for g in gops}
    )
    monkeypatch.setattr(loader_peers, "make_store", lambda root, videos: made.append(videos) or root / "store")
    arms = arms_of(tmp_path, 1, ["decord", "threads", "project"], ["gop12"], [])
    assert made == [(12,)]
    assert [arm.loader for arm in arms] == [loader_peers.TORCHCODEC, loader_peers.PROJECT, "decord + DataLoader"]
    made.clear()
    arms = arms_of(tmp_path, 1, ["project"], ["store"], [4])
    assert made == [(250,), folders[250]]
    assert [(arm.source, arm.keys) for arm in arms] == [("store", {}), ("store, 4 workers", {"num_workers": 4})]
