"""A folder of plain videos: frames and sound by number, in step, for the files that people have."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.dataset import FLAG_REPAIRED, FLAG_SILENT, MediaError
from pipeline.folder.dataset import FolderError, FolderSplit, PlainFolder
from tests.pipeline.support.plain_videos import (
    FLASHES,
    FPS,
    NUM_FRAMES,
    chirp_track,
    click_track,
    flash_frames,
    onset,
    truncated,
    turn_in_header,
    write_video,
)
from tests.pipeline.support.stores import numbered_frames, read_number

VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}, "audio_codec": "libopus"}
FORMS: dict[str, dict[str, Any]] = {
    "b-frames.mp4": {"options": {"g": "250", "bf": "3"}},
    "open-gop.mp4": {"options": {"g": "20", "bf": "3", "x264-params": "open-gop=1"}},
    "44k.mov": {"rate_hz": 44_100},
    "aac.mkv": {"options": {"g": "30", "bf": "3"}, "rate_hz": 44_100},
    "opus.webm": VP9,
    "b-frames.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}, "audio_codec": "mp3"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "audio_codec": "pcm_s16le", "rate_hz": 22_050},
    "h264.ts": {"options": {"g": "30", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}, "audio_codec": "mp2"},
    "h264.flv": {"rate_hz": 44_100},
    "surround.mp4": {"layout": "5.1"},
    "10bit444.mp4": {"pix_fmt": "yuv444p10le"},
    "422flac.mkv": {"pix_fmt": "yuv422p", "audio_codec": "flac"},
    "late-video.mkv": {"times": range(10, 10 + NUM_FRAMES)},
    "late-audio.mp4": {"audio_start_s": 0.5},
    "8k.avi": {"codec": "mpeg4", "audio_codec": "pcm_s16le", "rate_hz": 8000},
}


QUICK = ("b-frames.mp4", "opus.webm", "b-frames.avi")
ALL_FORMS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.integration) for name in FORMS]
IN_STEP = [name for name in FORMS if name not in ("surround.mp4", "late-audio.mp4")]
STEP_FORMS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.integration) for name in IN_STEP]


def only(folder: Path) -> FolderSplit:
    """All videos of a folder as a split."""
    return PlainFolder.open(folder).split("all")


@pytest.mark.parametrize("name", ALL_FORMS)
def test_frames_are_those_asked_for(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, **FORMS[name])
    split = only(tmp_path)
    assert list(split.media.num_frames) == [NUM_FRAMES]
    assert split.media.fps(0) == FPS
    rng = np.random.default_rng(0)
    requests = [np.arange(NUM_FRAMES), np.array([74]), np.array([40, 12, 12, 0])]
    requests += [np.arange(first, NUM_FRAMES, step)[:20] for first, step in rng.integers(1, 60, (6, 2))]
    for numbers in requests:
        y, uv = split.read_frames(0, numbers)
        assert [read_number(picture.astype(float)) for picture in y] == numbers.tolist()
        assert uv.shape == (len(numbers), 32, 48, 2)
        assert np.abs(uv.astype(int) - 128).max() <= 3


@pytest.mark.parametrize("name", ALL_FORMS)
def test_sound_does_not_depend_on_where_reading_begins(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, **FORMS[name])
    split = only(tmp_path)
    total = int(split.media.num_samples[0])
    assert total >= 2.4 * 16_000
    whole = split.read_audio(0, 0, total).astype(int)
    assert np.abs(whole).max() > 5000
    rng = np.random.default_rng(0)
    for start in rng.integers(0, total - 8000, 8).tolist():
        assert np.abs(split.read_audio(0, start, 8000) - whole[start : start + 8000]).max() <= 2
    padded = split.read_audio(0, -100, total + 200).astype(int)
    assert not padded[:100].any()
    assert not padded[100 + total :].any()
    assert np.array_equal(padded[100 : 100 + total], whole)


def test_range_of_the_sound_begins_where_the_source_does(tmp_path: Path) -> None:
    write_video(tmp_path / "late-audio.mp4", **FORMS["late-audio.mp4"])
    split = only(tmp_path)
    first, end = split.sound_range(0)
    assert 7600 <= first <= 8000  # AAC begins up to one frame early
    assert end == split.media.num_samples[0]
    assert not split.read_audio(0, 0, first).any()
    assert split.read_audio(0, first, 4000).any()


def reference_offsets(path: Path) -> list[float]:
    """Click minus flash in seconds, from the time stamps that PyAV gives when it decodes the whole file."""
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    if path.suffix == ".avi":  # no presentation times: frames are equally spaced from 0
        times = [i / FPS for i in range(len(pictures))]
    else:
        times = [float(frame.pts * frame.time_base) for frame in pictures]
    flashes = [t for t, frame in zip(times, pictures, strict=True) if frame.to_ndarray(format="gray").mean() > 128]
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    rate, start = frames[0].sample_rate, float(frames[0].pts * frames[0].time_base)
    sound = np.concatenate(
        [np.atleast_2d(f.to_ndarray()).mean(0) if f.format.is_planar else f.to_ndarray()[0] for f in frames]
    )
    scaled = (sound / np.abs(sound).max() * 20_000).astype(np.int16)
    offsets = []
    for flash in flashes:
        middle = round((flash - start) * rate)
        offsets.append(onset(scaled, max(0, middle - rate // 5), middle + rate // 5) / rate + start - flash)
    return offsets


@pytest.mark.parametrize("name", STEP_FORMS)
def test_flash_and_click_stay_together(tmp_path: Path, name: str) -> None:
    form = {"rate_hz": 48_000} | FORMS[name]
    begin_s = form["times"][0] / FPS if "times" in form else 0.0
    clicks = click_track(int(4.0 * form["rate_hz"]), form["rate_hz"], [begin_s + f / FPS for f in FLASHES])
    write_video(tmp_path / name, frames=flash_frames(), audio=clicks, **FORMS[name])
    split = only(tmp_path)
    y, _ = split.read_frames(0, np.arange(NUM_FRAMES))
    assert np.flatnonzero(y.mean((1, 2, 3)) > 128).tolist() == list(FLASHES)
    sound = split.read_audio(0, 0, NUM_FRAMES * 16_000 // FPS)
    expected = reference_offsets(tmp_path / name)
    assert len(expected) == len(FLASHES)
    for flash, offset in zip(FLASHES, expected, strict=True):
        middle = flash * 16_000 // FPS
        found = (onset(sound, max(0, middle - 3200), middle + 3200) - middle) / 16_000
        assert abs(found - offset) <= 0.0015, "half a frame (20 ms) would be allowed"


def test_variable_rate_shows_the_last_frame_not_later(tmp_path: Path) -> None:
    times = np.cumsum([0, *([40, 40, 120, 20, 80] * 9)])[:40].tolist()
    write_video(tmp_path / "v.mkv", frames=numbered_frames(40), times=times, time_base=Fraction(1, 1000))
    split = only(tmp_path)
    assert list(split.media.flags) == [FLAG_REPAIRED]
    count = int(split.media.num_frames[0])
    fps = split.media.fps(0)
    assert abs(count / fps - times[-1] / 1000) < 0.15
    y, _ = split.read_frames(0, np.arange(count))
    shown = [read_number(picture.astype(float)) for picture in y]
    expected = [int(np.searchsorted(times, number * 1000 / fps + 1.01, side="right")) - 1 for number in range(count)]
    assert shown == expected


def test_sizes_and_ranges_become_the_same_planes(tmp_path: Path) -> None:
    for level in (0, 255):
        frames = [np.full((65, 97, 3), level, np.uint8)] * 5
        write_video(tmp_path / f"full{level}.avi", codec="mjpeg", pix_fmt="yuvj444p", frames=frames, audio_codec=None)
        write_video(tmp_path / f"limited{level}.mp4", pix_fmt="yuv444p10le", frames=frames, audio_codec=None)
    split = only(tmp_path)
    assert list(split.media.width) == [96] * 4
    assert list(split.media.height) == [64] * 4
    assert list(split.media.flags) == [FLAG_SILENT] * 4
    lumas = {split.media.id(i): split.read_frames(i, np.array([3]))[0] for i in range(4)}
    for name, luma in lumas.items():
        assert luma.shape == (1, 64, 96, 1)
        assert np.abs(luma.astype(int) - (235 if "255" in name else 16)).max() <= 1, name
    assert not split.read_audio(0, 0, 100).any()


@pytest.mark.parametrize(("degrees", "quarters"), [(0, 0), (90, 3), (180, 2), (270, 1)])
def test_rotation_flag_is_applied(tmp_path: Path, degrees: int, quarters: int) -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = 255  # white in the upper left quarter
    write_video(tmp_path / "r.mp4", frames=[picture] * 10)
    turn_in_header(tmp_path / "r.mp4", degrees)
    split = only(tmp_path)
    y, uv = split.read_frames(0, np.array([2]))
    upright = np.rot90(picture[:, :, 0], quarters)  # counter-clockwise
    assert y.shape[1:3] == upright.shape
    assert uv.shape[1:3] == (upright.shape[0] // 2, upright.shape[1] // 2)
    assert np.abs(y[0, 4:-4:8, 4:-4:8, 0] > 128).tolist() == (upright[4:-4:8, 4:-4:8] > 128).tolist()
    assert (split.media.width[0], split.media.height[0]) == upright.shape[::-1]


def test_largest_video_stream_is_chosen(tmp_path: Path) -> None:
    write_video(tmp_path / "two.mp4", second_size=(32, 32))
    split = only(tmp_path)
    assert (split.media.width[0], split.media.height[0]) == (96, 64)
    assert "chosen of 2" in split.files[0].note
    assert read_number(split.read_frames(0, np.array([33]))[0][0].astype(float)) == 33


def test_unusable_files_are_listed_with_a_reason(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4")
    write_video(tmp_path / "cut.mp4", container_options={"movflags": "faststart"})
    truncated(tmp_path / "cut.mp4", 0.5)
    write_video(tmp_path / "headless.mp4")
    truncated(tmp_path / "headless.mp4", 0.5)
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "poster.JPG").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(chirp_track(48_000, 48_000).reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = 48_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    folder = PlainFolder.open(tmp_path)
    refused = dict(folder.refused)
    assert "Invalid data" in refused["text.mp4"]
    assert refused["empty.mp4"] == "empty file"
    assert refused["song.mp4"] == "no video stream, audio only"
    assert "does not open" in refused["list.mp4"]
    assert "does not open" in refused["headless.mp4"]
    assert refused["readme.txt"].startswith("suffix (.txt) must be one of .3g2 .3gp .asf .avi")
    assert refused["poster.JPG"] == "a picture, not a video"
    assert set(refused) | set(folder.files) == {path.name for path in tmp_path.iterdir()}
    assert 1 <= folder.files["cut.mp4"].num_frames < NUM_FRAMES


def test_a_file_that_shrinks_later_is_a_media_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the folder is there")
    write_video(tmp_path / "v.mkv", options={"g": "10"})
    split = only(tmp_path)
    truncated(tmp_path / "v.mkv", 0.4)
    with pytest.raises(MediaError, match=r"v\.mkv: video at 2\.800 s: "):
        split.read_frames(0, np.array([70, 71]))
    (tmp_path / "v.mkv").unlink()
    with pytest.raises(MediaError, match=r"v\.mkv: audio at 1\.000 s: .*No such file"):
        split.read_audio(0, 16_000, 100)


def test_a_file_that_another_takes_the_place_of_is_a_media_error(tmp_path: Path) -> None:
    """Both can be played: nothing but a look at the file tells that it is not what the run's fingerprint says."""
    (tmp_path / "notes.txt").write_text("the folder is there")
    write_video(tmp_path / "v.mp4")
    split = PlainFolder.open(tmp_path).split("all")
    (tmp_path / "v.mp4").unlink()
    with pytest.raises(MediaError, match=r"v\.mp4: audio at 0\.000 s: .*No such file.*put it back"):
        split.read_audio(0, 0, 100)
    write_video(tmp_path / "v.mp4", frames=numbered_frames(90))
    for read in (lambda: split.read_frames(0, np.arange(2)), lambda: split.read_audio(0, 0, 100)):
        with pytest.raises(MediaError, match=r"v\.mp4: .*file \(\d+ bytes, .*\) must be the one that was there when"):
            read()


def test_a_file_of_the_same_size_that_takes_the_place_of_another_is_a_media_error(tmp_path: Path) -> None:
    split = only(write_video(tmp_path / "v.mp4").parent)
    other = bytearray((tmp_path / "v.mp4").read_bytes())
    other[len(other) // 2] ^= 1
    (tmp_path / "w.mp4").write_bytes(other)
    (tmp_path / "w.mp4").replace(tmp_path / "v.mp4")
    words = r"v\.mp4: .*: file \((\d+) bytes, mtime \d+ ns\) must be .*\(\1 bytes, mtime \d+ ns\); put it back"
    for read in (lambda: split.read_frames(0, np.arange(2)), lambda: split.read_audio(0, 0, 100)):
        with pytest.raises(MediaError, match=words):
            read()


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_folder_that_goes_is_named_and_not_its_files(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    split = only(write_video(folder / "v.mp4").parent)
    folder.rename(tmp_path / "elsewhere")
    if how == "empty":
        folder.mkdir()
    why = "empty" if how == "empty" else "No such file or directory"
    words = rf"^{folder}: folder \({why}\) must be there while it is read; mount it or put it back, and resume$"
    for read in (lambda: split.read_frames(0, np.arange(2)), lambda: split.read_audio(0, 0, 100)):
        with pytest.raises(FolderError, match=words):
            read()


def test_frames_outside_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4")
    split = only(tmp_path)
    for numbers in ([-1, 3], [NUM_FRAMES], []):
        with pytest.raises(FolderError, match=r"must be in 0\.\.74"):
            split.read_frames(0, np.array(numbers))
    with pytest.raises(MediaError, match="plain files cannot be cut by bytes; use read_frames, or ingest"):
        split.read_video(0, 0, 3)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of two classes."""
    root = tmp_path_factory.mktemp("classes")
    write_video(root / "v.mp4", frames=numbered_frames(5))
    for i in range(10):
        target = root / "data" / ("run" if i % 2 else "Jump (high)") / f"{i}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "v.mp4", target)
    return root / "data"


def test_classes_are_folders_and_splits_follow_the_names(classes: Path) -> None:
    folder = PlainFolder.open(classes)
    assert folder.classes == {"action": ("Jump (high)", "run")}
    assert folder.splits == ("all", "train", "val")
    train, val = folder.split("train"), folder.split("val")
    assert (len(train), len(val), len(folder.split("all"))) == (8, 2, 10)
    names = [train.samples.id(i) for i in range(8)] + [val.samples.id(i) for i in range(2)]
    assert sorted(names) == [folder.split("all").samples.id(i) for i in range(10)]
    assert {val.samples.label_of(i, "action") for i in range(2)} <= {0, 1}
    for split in (train, val):
        for i in range(len(split)):
            name = split.classes["action"][split.samples.label_of(i, "action")]
            assert split.samples.id(i).startswith(name + "/")
    assert list(train.samples.end_s) == [5 / FPS] * 8
    assert train.fingerprint != val.fingerprint
    assert PlainFolder.open(classes).split("val").fingerprint == val.fingerprint


def test_fingerprint_names_contents_and_not_the_place(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes, tmp_path / "moved")
    before = PlainFolder.open(classes).split("train").fingerprint
    assert PlainFolder.open(tmp_path / "moved").split("train").fingerprint == before
    path = sorted((tmp_path / "moved").rglob("*.mp4"))
    for file in path:
        file.write_bytes(file.read_bytes() + b"\0\0\0\x08free")
    assert PlainFolder.open(tmp_path / "moved").split("train").fingerprint != before


def test_split_folders(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes / "run", tmp_path / "train" / "run")
    shutil.copytree(classes / "Jump (high)", tmp_path / "val" / "Jump (high)")
    folder = PlainFolder.open(tmp_path)
    assert folder.splits == ("all", "train", "val")
    assert folder.classes["action"] == ("Jump (high)", "run")
    assert folder.split("train").samples.label_of(0, "action") == 1
    with pytest.raises(FolderError, match=r"split \(test\) must be one of \['all', 'train', 'val'\]"):
        folder.split("test")
    shutil.copy(classes / "run" / "1.mp4", tmp_path / "stray.mp4")
    with pytest.raises(FolderError, match=r"stray\.mp4: a video beside the split folder train must be in one of"):
        PlainFolder.open(tmp_path)


def test_validation_folders_and_other_suffixes_are_those_of_prepare(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "Train" / "deep").mkdir(parents=True)
    (tmp_path / "validation" / ".git").mkdir(parents=True)
    shutil.copy(classes / "run" / "1.mp4", tmp_path / "Train" / "a.f4v")
    shutil.copy(classes / "run" / "1.mp4", tmp_path / "validation" / "b.mp4")
    for name in ("._a.mp4", "c.mp4.part", "notes.txt"):
        (tmp_path / "Train" / name).write_text("x")
    (tmp_path / "Train" / "loop").symlink_to(tmp_path)
    folder = PlainFolder.open(tmp_path)
    assert folder.splits == ("all", "train", "val")
    assert folder.classes == {}
    assert folder.split("val").samples.id(0) == "validation/b.mp4"
    refused = dict(folder.refused)
    assert sorted(refused) == [
        "Train/._a.mp4",
        "Train/c.mp4.part",
        "Train/loop/",
        "Train/notes.txt",
        "validation/.git/",
    ]
    assert refused["Train/._a.mp4"] == "hidden file"
    assert refused["validation/.git/"] == "hidden folder"


def test_loose_videos_beside_classes_are_an_error(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes, tmp_path / "d")
    shutil.copy(classes / "run" / "1.mp4", tmp_path / "d" / "loose.mp4")
    with pytest.raises(FolderError, match=r"loose\.mp4: a video beside class folders must be in one of them"):
        PlainFolder.open(tmp_path / "d")


def test_a_folder_without_classes_has_no_labels(classes: Path, tmp_path: Path) -> None:
    for i in (1, 3):
        shutil.copy(classes / "run" / f"{i}.mp4", tmp_path / f"{i}.mp4")
    folder = PlainFolder.open(tmp_path)
    split = folder.split("all")
    assert split.classes == {}
    assert not split.samples.has("action")
    assert folder.split("train").samples.id(0) in ("1.mp4", "3.mp4")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"playable videos \(0 of 0\) must be at least one; the folder is empty"):
        PlainFolder.open(tmp_path)
    with pytest.raises(FolderError, match=r"folder \(missing\) must exist"):
        PlainFolder.open(tmp_path / "gone")
    (tmp_path / "x.mp4").write_text("no")
    with pytest.raises(FolderError, match=r"playable videos \(0 of 1\).*x\.mp4: "):
        PlainFolder.open(tmp_path)


def test_pickling_and_threads(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4")
    split = only(tmp_path)
    other = pickle.loads(pickle.dumps(split))
    assert other.fingerprint == split.fingerprint

    def read(first: int) -> list[int]:
        return [read_number(picture.astype(float)) for picture in other.read_frames(0, np.arange(first, first + 5))[0]]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(0, 60, 5))) == [list(range(first, first + 5)) for first in range(0, 60, 5)]


def test_real_media(real_media: Path) -> None:
    folder = PlainFolder.open(real_media)
    split = folder.split("all")
    assert all(Path(name).suffix != ".mp4" for name, _ in folder.refused)
    for i in range(len(split)):
        count = int(split.media.num_frames[i])
        y, uv = split.read_frames(i, np.array([0, count // 2, count - 1]))
        size = (int(split.media.height[i]), int(split.media.width[i]))
        assert y.shape == (3, *size, 1)
        assert uv.shape == (3, size[0] // 2, size[1] // 2, 2)
        whole = split.read_audio(i, 0, int(split.media.num_samples[i]))
        assert bool(whole.any()) == (split.media.num_samples[i] > 0)


def test_clips_of_one_video_are_told_by_their_names(tmp_path: Path) -> None:
    names = ("AAAAAAAAAA1_000001_000011.mp4", "AAAAAAAAAA1_000061_000071.mp4", "BBBBBBBBBB1_000001_000011.mp4")
    for number, name in enumerate(names):
        write_video(tmp_path / name, frames=[np.full((32, 32, 3), 50 * number, np.uint8)] * 10, audio_codec=None)
    split = only(tmp_path)
    assert split.same_video(0, 1)
    assert not split.same_video(1, 2)
