"""Broken annotation files of every format: a ValueError or rows, never another exception, and no code runs.

The slow form reads 100,000 broken files of each format; the fast form lets hypothesis look for a few.
"""

import io
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.annotations import (
    AnnotationError,
    Annotations,
    ava_files,
    charades,
    epic_kitchens,
    folder,
    hmdb51,
    kinetics,
    kinetics_lists,
    read,
    text,
    ucf101,
)
from pipeline.annotations.report import ReportBuilder
from tests.pipeline.support import miniatures as mini

INPUTS_PER_FORMAT = 100_000
WITHOUT_FILES = ("folder_classes", "folder_splits", "folder_flat")
VIDEOS = Path("/videos")
CLASSES = ["ApplyEyeMakeup", "HandstandPushups"]
CHARADES_HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
EPIC100_ROW = "P01_01_0,P01,P01_01,00:00:01,00:00:00.14,00:00:03.37,8,202,open door,open,3,door,3,['door'],[3]"

#: Format -> (file name, seed text, parser of that file).
FORMATS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "kinetics_csv": (
        "train.csv",
        f"{mini.KINETICS_HEADER}\n{mini.KINETICS_TRAIN[0]}\n{mini.KINETICS_TRAIN[6]}\n",
        lambda path: (kinetics.detect(path), list(kinetics.read_clips(path, ReportBuilder("fuzz")))),
    ),
    "kinetics_list": (
        "val.csv",
        "abseiling/a 1.mp4 0\n/videos/yoga/c.mp4 12\n",
        lambda path: (kinetics.detect(path), list(kinetics_lists.read_list(path, VIDEOS))),
    ),
    "class_names": ("names.txt", "abseiling\nair drumming\nyoga\n", kinetics_lists.read_class_names),
    "epic55": (
        "EPIC_train_action_labels.csv",
        f"{mini.EPIC55_HEADER}\n0,P01,P01_01,open door,00:00:00.14,00:00:03.37,8,202,open,2,door,8,['door'],[8]\n",
        lambda path: list(epic_kitchens.read_segments(path, epic_kitchens.EDITION_55, True)),
    ),
    "epic100": (
        "EPIC_100_train.csv",
        f"{mini.EPIC100_HEADER}\n{EPIC100_ROW}\n",
        lambda path: list(epic_kitchens.read_segments(path, epic_kitchens.EDITION_100, True)),
    ),
    "epic_test": (
        "EPIC_test_s1_timestamps.csv",
        "uid,video_id,start_timestamp,stop_timestamp\n1924,P01_11,00:00:00.00,00:00:01.89\n",
        lambda path: list(epic_kitchens.read_segments(path, epic_kitchens.EDITION_55, False)),
    ),
    "epic_classes": (
        "EPIC_verb_classes.csv",
        "verb_id,class_key,verbs\n0,take,\"['take']\"\n1,put,\"['put', 'place']\"\n",
        lambda path: epic_kitchens.read_epic_classes(path, "verb"),
    ),
    "charades": (
        "Charades_v1_train.csv",
        f'{CHARADES_HEADER}\nN11GT,0KZ7,"A, b",6,7,Yes,"c, d",e,f,c098 8.60 14.20;c075 0.00 11.70,18.33\n',
        lambda path: list(charades.read_videos(path, "train", 157, ReportBuilder("fuzz"))),
    ),
    "charades_classes": ("Charades_v1_classes.txt", "c000 Holding\nc001 Putting\n", charades.read_charades_classes),
    "ava": (
        "ava_train_v2.2.csv",
        "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1\n-5KQ66BBWC4,0903,,,,,,\n",
        lambda path: list(ava_files.read_labelled(path, ReportBuilder("fuzz"))),
    ),
    "ava_boxes": (
        "ava_val_predicted_boxes.csv",
        "1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,,0.995518\n1j20qq1JyX4,0902,0.1,0.098,0.550,0.979,12,1\n",
        lambda path: list(ava_files.read_detected(path, ReportBuilder("fuzz"))),
    ),
    "ava_excluded": (
        "ava_val_excluded.csv",
        "0f39OWEqJ24,0903\n0f39OWEqJ24,0904\n",
        lambda p: list(ava_files.read_excluded(p)),
    ),
    "ava_actions": (
        "list.pbtxt",
        'item {\n  name: "bend"\n  id: 1\n}\nlabel { label_id: 2 name: "sit" }\n',
        ava_files.read_action_list,
    ),
    "ucf101_classes": ("classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n", ucf101.read_class_index),
    "ucf101": (
        "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_g08_c01.avi\r\n",
        lambda path: list(ucf101.read_list(path, CLASSES)),
    ),
    "hmdb51": (
        "wave_test_split1.txt",
        "#20_(x)!_wave.avi 1 \nb.avi 2 \nc.avi 0 \n",
        lambda path: list(hmdb51.read_split(path)),
    ),
    "folder": (
        "mine.csv",
        "path,label,split\ncats/a.mp4,cats,train\n/videos/dogs/b.mp4,dogs,val\n",
        lambda path: list(folder.read_paths(path, VIDEOS)),
    ),
}
TOKENS = [
    *(
        b"nan",
        b"inf",
        b"-1",
        b"1e999",
        b"1e9",
        b"9" * 40,
        b"0x10",
        b"1_0",
        "١٢".encode(),
        b"",
        b" ",
        b"\t",
        b"0",
        b"2147483648",
    ),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b"\r\n",
        b'"',
        b"'",
        b",",
        b";",
        b":",
        b"{",
        b"}",
        b"#",
        b"\\",
        b"%s%n",
    ),
    *(
        b"../",
        b"/etc/passwd",
        b"pipe:0",
        b"http://h/x",
        b"file:",
        b"concat:a|b",
        b"~",
        b"\xef\xbb\xbf",
        b"A" * 300,
        b"," * 50,
    ),
    *(
        b"__import__('os').system('x')",
        b"!!python/object:os.system",
        b"cos\nsystem\n(S'x'\ntR.",
        b"=cmd|'/c x'!A1",
        b"${x}",
    ),
]
FORBIDDEN = re.compile(
    r"exec|compile|open|import|marshal\..*|pickle\..*|os\..*|subprocess\..*|socket\..*|shutil\..*|ctypes\..*"
)


class Watch:
    """Collects what the interpreter does (audit events) while it is on; audit hooks stay for the process's life."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, _: tuple[object, ...]) -> None:
        if self.on and FORBIDDEN.fullmatch(event):
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Return a function that sets the bytes of the next file to be opened."""
    content = b""

    def opened(_: Path) -> io.BytesIO:
        return io.BytesIO(content)

    def set_content(data: bytes) -> None:
        nonlocal content
        content = data

    monkeypatch.setattr(text, "open_bytes", opened)
    return set_content


def broken(seed: bytes, rng: random.Random) -> bytes:
    """Return a copy of a file with one to four changes."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 2:
            del data[at : at + rng.randint(1, 12)]
        elif kind == 3:
            data[at:at] = data[max(0, at - rng.randint(1, 40)) : at]
        elif kind == 4:
            data[at : at + rng.randint(1, 8)] = rng.choice(TOKENS)
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def outcome(name: str, path: Path) -> str:
    """Read one file; ValueErrors are the only way to refuse it, and they name the file."""
    refusal: ValueError | None = None
    try:
        FORMATS[name][2](path)
    except ValueError as problem:
        refusal = problem
    if refusal is None:
        return "accepted"
    assert isinstance(refusal, AnnotationError), repr(refusal)
    assert str(path) in str(refusal)
    return "refused"


@pytest.mark.parametrize("name", FORMATS)
def test_the_seed_itself_is_accepted(name: str, tmp_path: Path) -> None:
    path = tmp_path / FORMATS[name][0]
    path.write_bytes(FORMATS[name][1].encode())
    assert outcome(name, path) == "accepted"


@pytest.mark.parametrize("name", FORMATS)
def test_some_broken_files(name: str, feed: Callable[[bytes], None]) -> None:
    path = Path(FORMATS[name][0])
    seed = FORMATS[name][1].encode()

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.binary(max_size=80), st.text(max_size=40).map(str.encode), st.randoms().map(lambda r: broken(seed, r))
        )
    )
    def check(data: bytes) -> None:
        feed(data)
        assert outcome(name, path) in ("accepted", "refused")

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_hundred_thousand_broken_files(name: str, feed: Callable[[bytes], None], watch: Watch) -> None:
    path = Path(FORMATS[name][0])
    seed = FORMATS[name][1].encode()
    rng = random.Random(name)
    tally = {"accepted": 0, "refused": 0}
    feed(seed)
    outcome(name, path)  # imports that happen once
    feed(b"\x00\xff")
    outcome(name, path)
    watch.seen.clear()
    watch.on = True
    try:
        for _ in range(INPUTS_PER_FORMAT):
            feed(broken(seed, rng))
            tally[outcome(name, path)] += 1
    finally:
        watch.on = False
    assert watch.seen == []
    assert tally["accepted"] > 100
    assert tally["refused"] > 10_000
    assert sum(tally.values()) == INPUTS_PER_FORMAT


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in mini.MINIATURES if name not in WITHOUT_FILES])
def test_whole_readers_with_one_broken_file(name: str, tmp_path: Path) -> None:
    miniature = mini.MINIATURES[name](tmp_path).touch()
    root = miniature.annotations
    assert root is not None
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    originals = {path: path.read_bytes() for path in files}
    rng = random.Random(name)
    tally = {"accepted": 0, "refused": 0}
    for _ in range(400):
        target = rng.choice(files)
        target.write_bytes(broken(originals[target], rng))
        found: Annotations | None = None
        try:
            found = read(miniature.dataset, root, miniature.videos, miniature.options)
        except AnnotationError:
            tally["refused"] += 1
        target.write_bytes(originals[target])
        if found is not None:
            tally["accepted"] += 1
            assert found.report.listed == len(found.rows) + found.report.without_video + sum(
                found.report.dropped.values()
            )
            assert all((miniature.videos / row.video).is_file() for row in found.rows)
    assert tally["accepted"] > 0
    assert tally["refused"] > 0
