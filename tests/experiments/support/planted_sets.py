"""Every data set in miniature with known answers: official files, and films that show and sound their labels.

Each function writes below a folder and returns a `Planted`. Validation scenes come with every picture beside every
sound, so that the ceilings of a model without ears or eyes follow by counting.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.annotations.kinetics_sounds import CLASSES as KINETICS_SOUNDS
from tests.experiments.support.planted_scenes import (
    CHECKED,
    LEVEL,
    PLAIN,
    UPRIGHT,
    Scene,
    best_mean_ap,
    best_top1,
    pause,
    write_film,
)
from tests.pipeline.support.miniatures import EPIC55_HEADER, EPIC100_HEADER, KINETICS_HEADER, write

VAL_SEED = 100_000  # scenes of validation share no seed with those of training
BLIND = ("both", "sight", "sound")


@dataclass(frozen=True)
class Planted:
    """A data set, and what its validation samples show, sound like and are labelled.

    Args:
        reader: name of the data set for `experiments.prepare`.
        annotations: official files. videos: folder of the films. options: of the reader.
        truth: id of a validation sample -> (scene, label ids by label set).
    """

    reader: str
    annotations: Path
    videos: Path
    truth: Mapping[str, tuple[Scene, Mapping[str, frozenset[int]]]]
    options: tuple[str, ...] = field(default=())

    def ceilings(self, label_set: str = "action") -> dict[str, float]:
        """Return the best score with eyes and ears, without ears, without eyes: top-1, or mean AP of several labels."""
        answers = [(labels[label_set], scene) for scene, labels in self.truth.values()]
        single = all(len(labels) == 1 for labels, _ in answers)
        score: Callable[..., float] = best_top1 if single else best_mean_ap
        observe: dict[str, Callable[[Scene], Hashable]] = {
            "both": lambda scene: (scene.seen, scene.heard),
            "sight": lambda scene: scene.seen,
            "sound": lambda scene: scene.heard,
        }
        return {way: score([(labels, see(scene)) for labels, scene in answers]) for way, see in observe.items()}


def quartets(seeds: int, val: bool) -> list[Scene]:
    """Return `4 * seeds` scenes: two patterns x two sounds each, colours and pulse drawn once for all four."""
    begin = VAL_SEED if val else 0
    return [
        Scene(begin + seed, pattern, warm=bool(seed % 2), hiss=hiss, pulsed=bool(seed // 2 % 2))
        for seed in range(seeds)
        for pattern in (UPRIGHT, LEVEL)
        for hiss in (False, True)
    ]


def kinetics_sounds(folder: Path, train_seeds: int = 24, val_seeds: int = 12) -> Planted:
    """Kinetics-Sounds in CVDF's folders: four of its 32 classes, and clips of two others, which are left out."""
    names = ("playing clarinet", "playing drums", "tapping pen", "ripping paper")
    lines: dict[str, list[str]] = {"train": [], "val": []}
    truth = {}
    for split, seeds in (("train", train_seeds), ("val", val_seeds)):
        for number, scene in enumerate(quartets(seeds, split == "val")):
            name = names[2 * (scene.pattern == LEVEL) + scene.hiss]
            clip = f"{split[0].upper()}{number:010d}"
            lines[split].append(f"{name},{clip},0,2,{split},0")
            write_film(folder / f"k400/{split}/{clip}_000000_000002.mp4", [scene.part(2.0)])
            if split == "val":
                truth[f"{clip}_000000_000002"] = scene, {"sounds": frozenset({KINETICS_SOUNDS.index(name)})}
        for number, other in enumerate(("abseiling", "zumba")):
            clip = f"X{split[0]}{number:09d}"
            lines[split].append(f"{other},{clip},0,2,{split},0")
            write_film(folder / f"k400/{split}/{clip}_000000_000002.mp4", [Scene(number).part(2.0)])
        write(folder / f"annotations/{split}.csv", KINETICS_HEADER, *lines[split])
    classes = write(folder / "names.txt", *sorted({*KINETICS_SOUNDS, "abseiling", "zumba"}))
    options = (f"classes={classes}",)
    return Planted("kinetics_sounds", folder / "annotations", folder / "k400", truth, options)


def epic_scenes(kitchen: int) -> list[list[Scene]]:
    """Return four films of four scenes: in all, every of four pictures beside every of four sounds."""
    pictures = [(pattern, warm) for pattern in (UPRIGHT, LEVEL) for warm in (False, True)]
    sounds = [(hiss, pulsed) for hiss in (False, True) for pulsed in (False, True)]
    return [[Scene(kitchen, *pictures[place], *sounds[(place + film) % 4]) for place in range(4)] for film in range(4)]


VERBS, NOUNS = (2, 0, 4, 3), (1, 8, 13, 5)  # ids of the classes that occur


def epic_labels(scene: Scene) -> tuple[int, int]:
    """Return (verb, noun): the verb is the pattern with hum or hiss, the noun the colour with steady or pulsed."""
    return VERBS[2 * (scene.pattern == LEVEL) + scene.hiss], NOUNS[2 * scene.warm + scene.pulsed]


def epic(folder: Path, edition: int, train_kitchens: int = 8, val_kitchens: int = 4) -> Planted:
    """EPIC-Kitchens: films of four actions with pauses between them, shorter than a clip in every fourth kitchen.

    The frame columns contradict the time stamps, as the official ones do. -55 splits by person, -100 by file.
    """
    rows: dict[str, list[str]] = {"train": [], "val": []}
    truth = {}
    for split, kitchens in (("train", train_kitchens), ("val", val_kitchens)):
        for kitchen in range(kitchens):
            person = f"P{kitchen + (26 if split == 'val' else 1):02d}"
            for film, scenes in enumerate(epic_scenes(kitchen + VAL_SEED * (split == "val"))):
                video = f"{person}_{film + 1:02d}"
                parts, now = [pause(0.6)], 0.6
                for place, scene in enumerate(scenes):
                    seconds = 0.8 if kitchen % 4 == 3 else 1.6  # not by place: it goes with the label
                    parts += [scene.part(seconds), pause(0.6)]
                    number = len(rows["train"]) + len(rows["val"])
                    verb, noun = epic_labels(scene)
                    times = f"00:00:{now:05.2f},00:00:{now + seconds:05.2f},1,2"
                    labels = f"verb-{verb},{verb},noun:{noun},{noun},['noun:{noun}'],[{noun}]"
                    name = str(number) if edition == 55 else f"{video}_{place}"
                    row = (
                        f"{name},{person},{video},act,{times},{labels}"
                        if edition == 55
                        else f"{name},{person},{video},00:00:{now:05.2f},{times},act,{labels}"
                    )
                    rows[split].append(row)
                    if split == "val":
                        ids = {"verb": verb, "noun": noun, "action": 1000 * verb + noun}
                        truth[name] = scene, {kind: frozenset({label}) for kind, label in ids.items()}
                    now += seconds + 0.6
                write_film(folder / f"videos/{person}/{video}.MP4", parts)
    official = folder / "annotations"
    if edition == 55:
        write(official / "EPIC_train_action_labels.csv", EPIC55_HEADER, *rows["train"], *rows["val"])
        for kind, count in (("verb", 125), ("noun", 352)):
            names = (f"{i},{kind}-{i},\"['{i}']\"" for i in range(count))
            write(official / f"EPIC_{kind}_classes.csv", f"{kind}_id,class_key,{kind}s", *names)
    else:
        write(official / "EPIC_100_train.csv", EPIC100_HEADER, *rows["train"])
        write(official / "EPIC_100_validation.csv", EPIC100_HEADER, *rows["val"])
        for kind, count in (("verb", 97), ("noun", 300)):
            names = (f"{i},{kind}-{i},\"['{i}']\",x" for i in range(count))
            write(official / f"EPIC_100_{kind}_classes.csv", "id,key,instances,category", *names)
    return Planted(f"epic_kitchens{edition}", official, folder / "videos", truth)


SEEN, HEARD, SEEN_AND_HEARD = (10, 11), (20, 21), (30, 31, 32, 33)


def charades_labels(scene: Scene) -> tuple[int, int, int]:
    """Return one class that the eye tells, one that the ear tells, and one that needs both."""
    level = scene.pattern == LEVEL
    return SEEN[level], HEARD[scene.hiss], SEEN_AND_HEARD[2 * level + scene.hiss]


def charades(folder: Path, train_seeds: int = 24, val_seeds: int = 12) -> Planted:
    """Charades: videos of 4 s, acts in the first or the second half, nothing in the other; a tenth without actions."""
    header = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    truth = {}
    for split, seeds in (("train", train_seeds), ("test", val_seeds)):
        rows = []
        for number, scene in enumerate(quartets(seeds, split == "test")):
            name, begin = f"{split[:2].upper()}{number:03d}", 2.0 * (scene.seed % 2)
            parts = [scene.part(2.0), pause(2.0)]
            write_film(folder / f"Charades_v1_480/{name}.mp4", parts[::-1] if begin else parts)
            labels = charades_labels(scene)
            actions = ";".join(f"c{label:03d} {begin:.2f} {begin + 2:.2f}" for label in labels)
            rows.append(f'{name},HR43,"Hall, wide",6,7,Yes,Acts.,cup,"One; two, three",{actions},4.00')
            truth[name] = scene, {"action": frozenset(labels)}
        for number in range(seeds * 4 // 10):
            name = f"{split[:2].upper()}N{number:02d}"
            write_film(folder / f"Charades_v1_480/{name}.mp4", [pause(4.0)])
            rows.append(f"{name},HR43,Hall,6,,Yes,Nothing.,,Nothing.,,4.00")
            truth[name] = Scene(-1 - number), {"action": frozenset()}
        write(folder / f"Charades/Charades_v1_{split}.csv", header, *rows)
    write(folder / "Charades/Charades_v1_classes.txt", *(f"c{i:03d} Doing thing {i}" for i in range(157)))
    truth = {name: known for name, known in truth.items() if name.startswith("TE")}
    return Planted("charades", folder / "Charades", folder / "Charades_v1_480", truth)


def partly_silent(seeds: int, val: bool, patterns: tuple[int, int]) -> list[Scene]:
    """Return quartets with sound, and for each seed two scenes without a sound track, of the patterns given."""
    begin = VAL_SEED if val else 0
    silent = [Scene(begin + s, p, warm=bool(s % 2), has_sound=False) for s in range(seeds) for p in patterns]
    return quartets(seeds, val) + silent


def class_of(scene: Scene) -> int:
    """Return 0 to 3 for two patterns x two sounds, 4 and 5 for what has no sound track."""
    if not scene.has_sound:
        return 4 + (scene.pattern in (LEVEL, PLAIN))
    return 2 * (scene.pattern == LEVEL) + scene.hiss


UCF_CLASSES = ("Archery", "Bowling", "HandstandPushups", "PlayingDhol", "TaiChi", "YoYo")


def ucf101(folder: Path, train_seeds: int = 24, val_seeds: int = 12) -> Planted:
    """UCF101, split 1: six classes, of which two have no sound track and patterns of their own: sight tells them."""
    lists, truth = folder / "ucfTrainTestlist", {}
    write(lists / "classInd.txt", *(f"{i} {name}" for i, name in enumerate(UCF_CLASSES, 1)), end="\r\n")
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, seeds in (("train", train_seeds), ("test", val_seeds)):
        for number, scene in enumerate(partly_silent(seeds, split == "test", (CHECKED, PLAIN))):
            label = class_of(scene)
            name = UCF_CLASSES[label]
            path = f"{name}/v_{name}_{'g01' if split == 'test' else 'g08'}_c{number:03d}.avi"
            lines[split].append(f"{path} {label + 1}" if split == "train" else path)
            file = path.replace("v_Handstand", "v_HandStand")  # as in the archive
            write_film(folder / "UCF-101" / file, [scene.part(2.0)], scene.has_sound)
            if split == "test":
                truth[path] = scene, {"action": frozenset({label})}
        write(lists / f"{split}list01.txt", *(line + " " for line in lines[split]), end="\r\n")
    return Planted("ucf101", lists, folder / "UCF-101", truth)


HMDB_CLASSES = ("brush_hair", "clap", "golf", "ride_bike", "talk", "wave")  # sorted: the order of the labels


def hmdb51(folder: Path, train_seeds: int = 24, val_seeds: int = 12) -> Planted:
    """HMDB51, split 1: six classes, of which two look like others and differ in that they have no sound track."""
    lists, truth = folder / "testTrainMulti_7030_splits", {}
    lines: dict[str, list[str]] = {name: [] for name in HMDB_CLASSES}
    for flag, seeds in ((1, train_seeds), (2, val_seeds)):
        for number, scene in enumerate(partly_silent(seeds, flag == 2, (UPRIGHT, LEVEL))):
            label = class_of(scene)
            name = HMDB_CLASSES[label]
            file = f"#{number}_(a)_clap!_{name}_u&{flag}.avi"
            lines[name].append(f"{file} {flag} ")
            write_film(folder / "hmdb51_org" / name / file, [scene.part(2.0)], scene.has_sound)
            if flag == 2:
                truth[f"{name}/{file}"] = scene, {"action": frozenset({label})}
    for name, own in lines.items():
        write(lists / f"{name}_test_split1.txt", *own, "unused.avi 0 ")
    return Planted("hmdb51", lists, folder / "hmdb51_org", truth)
