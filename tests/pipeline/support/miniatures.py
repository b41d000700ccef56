"""Miniatures of the official layout of every data set, with the traps of the real files in them.

Each function writes annotation files below the folder it is given and returns a `Miniature`: which reader reads them,
with which options, which video files have to be there (and how long each must be), and what the reader should find.
No video is written; `touch` puts empty files in their places for tests of the readers alone. To go end to end,
synthesise a video of at least ``files[path]`` seconds at ``videos / path`` for every path::

    miniature = MINIATURES["charades"](tmp_path)
    for path, seconds in miniature.files.items():
        write_video(miniature.videos / path, seconds)      # any codec; keep the path
    annotations = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    assert Counter(row.split for row in annotations.rows) == miniature.rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.annotations.kinetics_sounds import CLASSES as KINETICS_SOUNDS


@dataclass(frozen=True)
class Miniature:
    """What was written, and what has to come out of it.

    Args:
        dataset: name in ``pipeline.annotations.READERS``.
        annotations: file or folder to hand to the reader; None for a folder of videos without a CSV.
        videos: folder of the videos, not created yet where it holds nothing else.
        files: path relative to ``videos`` -> seconds that the video must last at least, so that every span, action and
            key frame of the annotations lies inside it.
        rows: split -> rows that the reader must return when exactly ``files`` are there.
        missing: samples whose video is not among ``files``, to be reported and not raised.
        options: options of the reader, as text.
        silent: paths among ``files`` that should get no audio track (UCF101 and Kinetics have such videos).
    """

    dataset: str
    annotations: Path | None
    videos: Path
    files: Mapping[str, float]
    rows: Mapping[str, int]
    missing: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()

    def touch(self) -> Miniature:
        """Create an empty file at every video's place and return the miniature itself."""
        for path in self.files:
            target = self.videos / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        self.videos.mkdir(parents=True, exist_ok=True)
        return self


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    """Write lines of text as UTF-8, creating the folders, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


KINETICS_HEADER = "label,youtube_id,time_start,time_end,split,is_cc"
KINETICS_TRAIN = (
    "abseiling,-3B32lodo2M,59,69,train,0",
    "abseiling,_4YTwq0-73Y,18,28,train,0",
    '"playing guitar",--0edUL8zmA,5,15,train,0',  # some copies quote every label
    "playing guitar,000AAAAAAAa,1,11,train,0",
    "massaging person's head,0m6PGKmsHAA,0,10,train,1",
    "skiing (not slalom or crosscountry),1rbLc7fNhWI,4,14,train,0",
    '"tapping pen, slowly",2JyVF4ZhYLQ,7,17,train,0',  # a comma inside quotes
    "playing guitar,GONE0000000,1,11,train,0",  # not among the files
)
KINETICS_VAL = ("abseiling,3caPS4FHFF8,36,46,val,0", '"playing guitar",3yaoNwz99xM,62,72,val,0')


def kinetics400(folder: Path, layout: str = "cvdf") -> Miniature:
    """Kinetics-400: official CSV with and without label, and the folders of one layout.

    Traps: quoted labels, apostrophe, parentheses, comma, ids that start with ``-`` and ``_``, a test file without
    labels, a missing clip, a replaced clip (``cvdf``: ``replacement_for_corrupted_k400`` holds a second, valid copy).

    Args:
        folder: where to write.
        layout: ``cvdf`` (flat), ``crawler`` (class folders), ``underscores`` (class folders of mmaction), ``untrimmed``
            (whole YouTube videos ``<id>.mp4``, cut by the CSV's times).
    """
    write(folder / "annotations/train.csv", KINETICS_HEADER, *KINETICS_TRAIN)
    write(folder / "annotations/val.csv", KINETICS_HEADER, *KINETICS_VAL)
    write(folder / "annotations/test.csv", KINETICS_HEADER.removeprefix("label,"), "4bykoxx-IOU,20,30,test,0")
    clips = {
        "train": [
            ("abseiling", "-3B32lodo2M", 59),
            ("abseiling", "_4YTwq0-73Y", 18),
            ("playing guitar", "--0edUL8zmA", 5),
            ("playing guitar", "000AAAAAAAa", 1),
            ("massaging person's head", "0m6PGKmsHAA", 0),
            ("skiing (not slalom or crosscountry)", "1rbLc7fNhWI", 4),
            ("tapping pen, slowly", "2JyVF4ZhYLQ", 7),
        ],
        "val": [("abseiling", "3caPS4FHFF8", 36), ("playing guitar", "3yaoNwz99xM", 62)],
        "test": [("", "4bykoxx-IOU", 20)],
    }
    files: dict[str, float] = {}
    for split, members in clips.items():
        for label, name, start in members:
            stem = f"{name}_{start:06d}_{start + 10:06d}.mp4"
            if layout == "cvdf" or not label:
                files[f"{split}/{stem}"] = 3.0
            elif layout == "crawler":
                files[f"{split}/{label}/{stem}"] = 3.0
            elif layout == "underscores":
                files[f"{split}/{label.replace(' ', '_')}/{stem}"] = 3.0
    options = {}
    if layout == "untrimmed":
        options = {"untrimmed": "true"}
        files = {f"{name}.mp4": start + 10.0 for members in clips.values() for _, name, start in members}
    if layout == "cvdf":
        files["replacement_for_corrupted_k400/_4YTwq0-73Y_000018_000028.mp4"] = 3.0
    silent = tuple(path for path in files if "0m6PGKmsHAA" in path)
    rows = {"train": 7, "val": 2, "test": 1}
    return Miniature("kinetics400", folder / "annotations", folder / "k400", files, rows, 1, options, silent)


def kinetics_lists(folder: Path) -> Miniature:
    """Kinetics-400 as lists of ``path label`` without header (PySlowFast), one of them with absolute paths.

    Traps: a blank inside a path, absolute paths below the folder of videos, a listed file that is missing.
    """
    videos = folder / "clips"
    write(folder / "lists/train.csv", "abseiling/a 1.mp4 0", "abseiling/b.mp4 0", "yoga/c.mp4 1", "yoga/gone.mp4 1")
    write(folder / "lists/val.csv", f"{videos.absolute()}/abseiling/d.mp4 0", f"{videos.absolute()}/yoga/e.mp4 1")
    files = dict.fromkeys(["abseiling/a 1.mp4", "abseiling/b.mp4", "yoga/c.mp4", "abseiling/d.mp4", "yoga/e.mp4"], 3.0)
    return Miniature("kinetics400", folder / "lists", videos, files, {"train": 3, "val": 2}, 1)


def kinetics600(folder: Path) -> Miniature:
    """Kinetics-600: no ``is_cc``, the two football classes that only case tells apart in sorting, ids used twice.

    Traps: ``passing American football (in game)`` sorts before ``passing american football (not in game)``; one
    YouTube id with two spans, the same span with two labels (both rows are kept), an exact repetition (one is dropped),
    an id that a spreadsheet has turned into ``#NAME?``, splits written ``validate``.
    """
    american, other = "passing American football (in game)", "passing american football (not in game)"
    write(
        folder / "train.csv",
        KINETICS_HEADER.removesuffix(",is_cc"),
        f"{other},AAAAAAAAAA1,10,20,train",
        f"{american},AAAAAAAAAA1,40,50,train",
        f"{american},AAAAAAAAAA2,3,13,train",
        f"{other},AAAAAAAAAA2,3,13,train",
        f"{american},AAAAAAAAAA2,3,13,train",
        "air drumming,#NAME?,3,13,train",
        "air drumming,AAAAAAAAAA3,0,10,train",
    )
    write(
        folder / "validate.csv", "label,youtube_id,time_start,time_end,split", f"{american},AAAAAAAAAA4,1,11,validate"
    )
    write(folder / "test.csv", "youtube_id,time_start,time_end,split", "AAAAAAAAAA5,1,11,test")
    files = {
        "train/AAAAAAAAAA1_000010_000020.mp4": 3.0,
        "train/AAAAAAAAAA1_000040_000050.mp4": 3.0,
        "train/AAAAAAAAAA2_000003_000013.mp4": 3.0,
        "train/AAAAAAAAAA3_000000_000010.mp4": 3.0,
        "val/AAAAAAAAAA4_000001_000011.mp4": 3.0,
        "test/AAAAAAAAAA5_000001_000011.mp4": 3.0,
    }
    return Miniature("kinetics600", folder, folder / "videos", files, {"train": 5, "val": 1, "test": 1})


def kinetics700(folder: Path) -> Miniature:
    """Kinetics-700: class folders in training, ``validate`` as the split's name, files .mkv and .webm of a crawler."""
    header = "label,youtube_id,time_start,time_end,split"
    write(folder / "train.csv", header, "abseiling,BBBBBBBBBB1,0,10,train", "zumba,BBBBBBBBBB2,0,10,train")
    write(folder / "validate.csv", header, "testifying,---QUuC4vJs,84,94,validate", "zumba,BBBBBBBBBB3,0,10,validate")
    files = {
        "train/abseiling/BBBBBBBBBB1_000000_000010.mp4": 3.0,
        "train/zumba/BBBBBBBBBB2_000000_000010.mkv": 3.0,
        "val/testifying/---QUuC4vJs_000084_000094.mp4": 3.0,
        "val/zumba/BBBBBBBBBB3_000000_000010.webm": 3.0,
    }
    return Miniature("kinetics700", folder, folder / "videos", files, {"train": 2, "val": 2})


def kinetics_sounds(folder: Path) -> Miniature:
    """Kinetics-Sounds: the files of Kinetics-400 with classes of the 32 and others among them, and a class list."""
    names = write(folder / "names.txt", *sorted({*KINETICS_SOUNDS, "abseiling", "zumba"}))
    train = ("abseiling", "bowling", "singing", "tap dancing", "zumba")
    rows = [f"{label},CCCCCCCCCC{i},0,10,train,0" for i, label in enumerate(train)]
    write(folder / "train.csv", KINETICS_HEADER, *rows)
    write(folder / "val.csv", KINETICS_HEADER, "singing,DDDDDDDDDD0,0,10,val,0", "abseiling,DDDDDDDDDD1,0,10,val,0")
    files = {f"train/CCCCCCCCCC{i}_000000_000010.mp4": 3.0 for i in range(len(train))}
    files |= {f"val/DDDDDDDDDD{i}_000000_000010.mp4": 3.0 for i in range(2)}
    options = {"classes": str(names)}
    return Miniature("kinetics_sounds", folder, folder / "k400", files, {"train": 3, "val": 1}, options=options)


EPIC55_HEADER = (
    "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def epic55(folder: Path) -> Miniature:
    """EPIC-Kitchens-55: labels with person P01, P25 (train), P26, P31 (val), the class lists, test S1 and S2.

    Traps: fractions of 2 and 3 digits, segments shorter than a clip and at both ends of the video, frame columns that
    contradict the time stamps, lists with commas, a pickle of the same name (poisoned: it must never be opened).
    """
    official = folder / "annotations"
    write(
        official / "EPIC_train_action_labels.csv",
        EPIC55_HEADER,
        "0,P01,P01_01,open door,00:00:00.14,00:00:03.37,8,202,open,2,door,8,['door'],[8]",
        "1,P01,P01_01,turn on light,00:00:04.370,00:00:05.205,9999,10,turn-on,6,light,113,['light'],[113]",
        '2,P25,P25_12,"take knife, fork",00:00:01.00,00:00:01.50,60,90,take,0,knife,5,"[\'knife\', \'fork\']","[5, 9]"',
        "3,P26,P26_01,wash cup,00:00:00.00,00:00:00.30,1,18,wash,3,cup,13,['cup'],[13]",
        "4,P31,P31_14,close door,00:00:04.10,00:00:06.00,246,360,close,4,door,8,['door'],[8]",
        "5,P30,P30_07,take pan,00:01:00.10,01:02:03.045,1,2,take,0,pan,1,['pan'],[1]",
    )
    write(
        official / "EPIC_verb_classes.csv",
        "verb_id,class_key,verbs",
        *(f"{i},verb-{i},\"['v{i}']\"" for i in range(125)),
    )
    write(
        official / "EPIC_noun_classes.csv",
        "noun_id,class_key,nouns",
        *(f"{i},noun:{i},\"['n{i}']\"" for i in range(352)),
    )
    times = "uid,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame"
    write(official / "EPIC_test_s1_timestamps.csv", times, "1924,P01,P01_11,00:00:00.00,00:00:01.89,1,113")
    write(official / "EPIC_test_s2_timestamps.csv", times, "7,P32,P32_01,00:00:00.10,00:00:02.00,6,120")
    (official / "EPIC_train_action_labels.pkl").write_bytes(POISONED_PICKLE)
    files = {
        "train/P01/P01_01.MP4": 6.0,
        "train/P25/P25_12.MP4": 4.0,
        "train/P26/P26_01.MP4": 4.0,
        "train/P31/P31_14.MP4": 6.0,
        "test/P01/P01_11.MP4": 4.0,
        "test/P32/P32_01.MP4": 4.0,
    }
    rows = {"train": 3, "val": 2, "test_s1": 1, "test_s2": 1}
    return Miniature("epic_kitchens55", official, folder / "videos", files, rows, 1)


#: Loading this as a pickle would raise SystemExit; reading it as anything else fails as well.
POISONED_PICKLE = b"cbuiltins\nexec\n(S'raise SystemExit(\"a pickle ran\")'\ntR."

EPIC100_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def epic100(folder: Path) -> Miniature:
    """EPIC-Kitchens-100: train, validation and test, class lists with ``id,key``.

    Traps: the example of EPIC-55 with the ids of EPIC-100 (door is noun 3 here), a narration time without a fraction,
    three-digit video numbers of the extension, P26 and later also in train (the split is the file's).
    """
    official = folder / "annotations"
    write(
        official / "EPIC_100_train.csv",
        EPIC100_HEADER,
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open door,open,3,door,3,['door'],[3]",
        "P28_101_7,P28,P28_101,00:00:02,00:00:01.50,00:00:02.257,75,112,take plate,take,0,plate,2,['plate'],[2]",
    )
    write(
        official / "EPIC_100_validation.csv",
        EPIC100_HEADER,
        "P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,2,['plate'],[2]",
    )
    write(
        official / "EPIC_100_test_timestamps.csv",
        ",".join(EPIC100_HEADER.split(",")[:8]),
        "P01_101_0,P01,P01_101,00:00:02.851,00:00:02.86,00:00:03.87,143,193",
    )
    header = "id,key,instances,category"
    write(official / "EPIC_100_verb_classes.csv", header, *(f"{i},verb-{i},\"['a', 'b']\",x" for i in range(97)))
    write(official / "EPIC_100_noun_classes.csv", header, *(f"{i},noun:{i},\"['a', 'b']\",x" for i in range(300)))
    files = {f"{name[:3]}/videos/{name}.MP4": 5.0 for name in ("P01_01", "P28_101", "P01_11", "P01_101")}
    rows = {"train": 2, "val": 1, "test": 1}
    return Miniature("epic_kitchens100", official, folder / "videos", files, rows)


def charades(folder: Path) -> Miniature:
    """Charades: train and test CSV, the class list.

    Traps: empty ``actions`` (in train and in test), an end after ``length``, quoted commas and semicolons in the
    script, one class twice in a video, overlapping actions, an empty ``relevance``, a missing video.
    """
    header = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    write(
        folder / "Charades/Charades_v1_train.csv",
        header,
        "46GP8,HR43,Hallway,6,7,Yes,A person cooks.,food;stove,A person cooks.,c092 1.90 4.20;c147 0.00 2.60,4.83",
        'N11GT,0KZ7,"Entryway (A hall, wide)",6,7,Yes,"One opens a blanket, then sneezes.",broom,"One; two, three",'
        "c098 2.60 4.20;c075 0.00 1.70;c098 0.50 1.00,4.33",
        "0IH69,6RE8,Bedroom,6,,Yes,Somebody leaves.,,Somebody leaves.,,3.25",
        "MJO7C,6RE8,Kitchen,6,6,Yes,Somebody runs.,cup,Somebody runs.,c015 0.00 4.00;c107 0.00 4.00,3.38",
        "GONE1,6RE8,Kitchen,6,6,Yes,Somebody runs.,cup,Somebody runs.,c015 0.00 3.00,3.38",
    )
    write(
        folder / "Charades/Charades_v1_test.csv",
        header,
        "YSKX3,8IHO,Kitchen,4,6,Yes,Somebody drinks.,cup,Somebody drinks.,c106 0.50 3.50;c156 2.00 3.00,4.00",
        "7UPGT,8IHO,Kitchen,4,6,Yes,Nothing.,,Nothing.,,3.00",
    )
    write(folder / "Charades/Charades_v1_classes.txt", *(f"c{i:03d} Doing thing {i}/somewhere" for i in range(157)))
    names = {"46GP8": 5.0, "N11GT": 4.5, "0IH69": 3.5, "MJO7C": 3.5, "YSKX3": 4.0, "7UPGT": 3.0}
    files = {f"{name}.mp4": seconds for name, seconds in names.items()}
    rows = {"train": 4, "val": 2}
    return Miniature("charades", folder / "Charades", folder / "Charades_v1_480", files, rows, 1)


def ava(folder: Path, version: str = "2.2") -> Miniature:
    """AVA: ground truth, excluded time stamps, detected boxes, both action lists; 15-minute parts (second 900 = 0).

    Traps: several lines of one box, two persons in one box file, columns 7 and 8 that mean other things in ground truth
    and in detections, a detection on a key frame without ground truth, scores below the threshold, a detection in train
    that overlaps the ground truth and one that does not, an excluded time stamp, a missing film, .mkv and .webm.

    Key frames lie at 2, 3 and 4 s of the files.
    """
    official = folder / "annotations"
    write(
        official / f"ava_train_v{version}.csv",
        "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1",
        "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,9,1",
        "-5KQ66BBWC4,0902,0.500,0.200,0.900,1.000,12,2",
        "-5KQ66BBWC4,0903,0.226,0.032,0.366,0.497,12,0",
        "-5KQ66BBWC4,0904,0.100,0.100,0.400,0.900,17,1",
        "GONE0000000,0902,0.100,0.100,0.400,0.900,17,1",
    )
    write(
        official / f"ava_val_v{version}.csv",
        "1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,12,0",
        "1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,80,0",
        "1j20qq1JyX4,0903,0.100,0.098,0.550,0.979,1,0",
        "0f39OWEqJ24,0903,0.100,0.098,0.550,0.979,1,0",
    )
    write(official / f"ava_train_excluded_timestamps_v{version}.csv", "-5KQ66BBWC4,0904")
    write(official / f"ava_val_excluded_timestamps_v{version}.csv", "0f39OWEqJ24,0903")
    write(
        official / "ava_train_predicted_boxes.csv",
        "-5KQ66BBWC4,0902,0.078,0.152,0.283,0.811,,0.990",
        "-5KQ66BBWC4,0902,0.600,0.600,0.700,0.700,,0.950",
    )
    write(
        official / "ava_val_predicted_boxes.csv",
        "1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,,0.995518",
        "1j20qq1JyX4,0902,0.600,0.098,0.900,0.979,,0.800000",
        "1j20qq1JyX4,0902,0.700,0.098,0.900,0.979,,0.799999",
        "1j20qq1JyX4,0905,0.036,0.098,0.550,0.979,,0.995518",
    )
    every = "\n".join(
        f'label {{\n  name: "act {i} (a thing)"\n  label_id: {i}\n  label_type: X\n}}' for i in range(1, 81)
    )
    write(official / f"ava_action_list_v{version}.pbtxt", every)
    some = "\n".join(f'item {{\n  name: "act {i} (a thing)"\n  id: {i}\n}}' for i in range(1, 81) if i % 4)
    write(official / f"ava_action_list_v{version}_for_activitynet_2019.pbtxt", some)
    files = {"-5KQ66BBWC4.mkv": 6.0, "1j20qq1JyX4.webm": 6.0, "0f39OWEqJ24.mp4": 6.0}
    return Miniature("ava", official, folder / "videos_15min", files, {"train": 2, "val": 3}, 1)


def ucf101(folder: Path) -> Miniature:
    """UCF101: class index and the lists of all three splits.

    Traps: the folder ``HandstandPushups`` whose files are ``v_HandStandPushups_*`` in the archive, with the list in the
    other spelling; test lists without numbers; blanks at line ends and CRLF; a video without sound; the same video in
    train of one split and test of another.
    """
    lists = folder / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 HandstandPushups", "", end="\r\n")
    makeup = [f"ApplyEyeMakeup/v_ApplyEyeMakeup_g0{i}_c01.avi" for i in (1, 2, 3)]
    pushups = [f"HandstandPushups/v_HandstandPushups_g0{i}_c01.avi" for i in (1, 2, 3)]
    for split in (1, 2, 3):
        train = [
            f"{path} {label}"
            for label, paths in ((1, makeup), (2, pushups))
            for path in paths
            if f"g0{split}" not in path
        ]
        write(lists / f"trainlist0{split}.txt", *(line + " " for line in train), end="\r\n")
        write(lists / f"testlist0{split}.txt", *(path for path in makeup + pushups if f"g0{split}" in path))
    files = dict.fromkeys([*makeup, *(path.replace("v_Handstand", "v_HandStand") for path in pushups)], 3.0)
    rows = {f"{part}{split}": number for split in (1, 2, 3) for part, number in (("train", 4), ("val", 2))}
    return Miniature("ucf101", lists, folder / "UCF-101", files, rows, silent=(makeup[1],))


def hmdb51(folder: Path) -> Miniature:
    """HMDB51: the split files of two classes.

    Traps: flag 0 (unused), 1 = train and 2 = test, blanks at line ends, names with ``( ) ! # &``.
    """
    lists = folder / "testTrainMulti_7030_splits"
    names = {
        "brush_hair": ["#20_(Rhythm)_clap!_u_nm_np1_fr_goo_0.avi", "b&b_brush_hair_f_cm_np1_ba_goo_1.avi", "c_0.avi"],
        "wave": ["20060723sfjffbarbielong_wave_u_cm_np1_ba_med_0.avi", "50_FIRST_DATES_wave_f_cm_0.avi", "w_0.avi"],
    }
    for label, videos in names.items():
        for split in (1, 2, 3):
            flags = [(i + split) % 3 for i in range(3)]
            lines = [f"{video} {flag} " for video, flag in zip(videos, flags, strict=True)]
            write(lists / f"{label}_test_split{split}.txt", *lines)
    files = {f"{label}/{video}": 3.0 for label, videos in names.items() for video in videos}
    rows = {f"{part}{split}": 2 for split in (1, 2, 3) for part in ("train", "val")}
    return Miniature("hmdb51", lists, folder / "hmdb51_org", files, rows)


def own_folder(folder: Path, layout: str = "classes") -> Miniature:
    """A folder of videos of one's own.

    Args:
        folder: where to write.
        layout: ``classes`` (``<class>/<file>``, one of each class drawn for validation), ``splits``
            (``{train,val}/<class>/<file>``), ``flat`` (no labels), ``csv`` (``path,label,split``).
    """
    videos = folder / "videos"
    if layout == "flat":
        files = {f"clip {i}.mp4": 3.0 for i in range(4)}
        return Miniature(
            "folder", None, videos, files, {"train": 3, "val": 1}, options={"val_fraction": "0.25", "seed": "0"}
        )
    if layout == "splits":
        files = {f"{split}/{label}/{split}{i}.mp4": 3.0 for split in ("train", "val") for label in "ab" for i in (0, 1)}
        return Miniature("folder", None, videos, files, {"train": 4, "val": 4})
    files = {
        f"{label}/{i}{suffix}": 3.0 for label in ("cats", "dogs") for i, suffix in enumerate([".mp4", ".MOV", ".avi"])
    }
    if layout == "classes":
        draw = {"val_fraction": "0.34", "seed": "1"}  # one video of each class
        return Miniature("folder", None, videos, files, {"train": 4, "val": 2}, options=draw)
    rows = [f"{path},{path.split('/')[0]},{'val' if '0.' in path else 'train'}" for path in files]
    table = write(folder / "mine.csv", "path,label,split", *rows, "dogs/gone.mp4,dogs,train")
    return Miniature("folder", table, videos, files, {"train": 4, "val": 2}, 1)


#: Name -> function of a folder; every layout that the readers know is here at least once.
MINIATURES: dict[str, Callable[[Path], Miniature]] = {
    "kinetics400": kinetics400,
    "kinetics400_crawler": lambda folder: kinetics400(folder, "crawler"),
    "kinetics400_underscores": lambda folder: kinetics400(folder, "underscores"),
    "kinetics400_untrimmed": lambda folder: kinetics400(folder, "untrimmed"),
    "kinetics400_lists": kinetics_lists,
    "kinetics600": kinetics600,
    "kinetics700": kinetics700,
    "kinetics_sounds": kinetics_sounds,
    "epic_kitchens55": epic55,
    "epic_kitchens100": epic100,
    "charades": charades,
    "ava_v2.1": lambda folder: ava(folder, "2.1"),
    "ava_v2.2": ava,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "folder_classes": own_folder,
    "folder_splits": lambda folder: own_folder(folder, "splits"),
    "folder_flat": lambda folder: own_folder(folder, "flat"),
    "folder_csv": lambda folder: own_folder(folder, "csv"),
}
