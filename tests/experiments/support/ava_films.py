"""A small AVA with known answers: official files, films of two persons each, and labels that need eye and ear.

On every second second of a film two persons stand side by side, one in upright stripes, one in level ones, and a hum or
a hiss is heard. A person in upright stripes does SEEN; a person does SAME or OTHER, as the stripes and the sound have
it together; where there is a hiss, both do HEARD; both always do UNSCORED, which the evaluation leaves out.

In the validation films every picture comes with both sounds, and every sound with both orders of the two persons: a
model without sound has equal scores (to rounding) for a right and a wrong person of SAME, OTHER and HEARD, and their
average precision is 1/2, or a little more where rounding orders the equal ones; one without sight the same of SEEN,
SAME and OTHER.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.pipeline.support.plain_videos import write_video

SEEN, SAME, OTHER, HEARD, UNSCORED = 11, 12, 13, 14, 80
EVALUATED = (SEEN, SAME, OTHER, HEARD)
CEILINGS = {"both": 1.0, "sight": (1 + 3 / 2) / 4, "sound": (3 / 2 + 1) / 4}
WIDTH, HEIGHT, FPS, RATE_HZ, STEP_S = 96, 48, 15, 16_000, 2
FIRST = 902  # the parts begin at second 900 of the film
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """Two seconds around a key frame.

    Args:
        places: corners of the two persons, pixels.
        upright: of the first person; the second has the other stripes.
        look: seed of the stripes and the background.
    """

    places: tuple[Corners, Corners]
    upright: bool
    look: int


def scenes_of(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes with persons that stand left and right, half of them the other way round."""
    found = []
    for number in range(count):
        places = []
        for left in (2, WIDTH // 2 + 2):
            x, y = left + int(rng.integers(0, 9)), int(rng.integers(2, 8))
            places.append((x, y, x + int(rng.integers(28, 35)), y + int(rng.integers(32, 39))))
        found.append(Scene((places[0], places[1]), bool((number + int(rng.integers(2))) % 2), int(rng.integers(2**31))))
    return found


def turned(scenes: list[Scene]) -> list[Scene]:
    """The same scenes with the two persons' stripes exchanged."""
    return [Scene(scene.places, not scene.upright, scene.look) for scene in scenes]


def pictures(scene: Scene) -> list[NDArray[np.uint8]]:
    """The frames of a scene, (H, W, 3) each."""
    rng = np.random.default_rng(scene.look)
    background = rng.integers(60, 120, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    period, speed, phase = (rng.uniform(low, high, 2) for low, high in ((5, 9), (-0.4, 0.4), (0, 9)))
    colours = rng.integers(150, 256, (2, 3))
    frames = []
    for number in range(STEP_S * FPS):
        picture = background.copy()
        for person, (x1, y1, x2, y2) in enumerate(scene.places):
            upright = scene.upright == (person == 0)
            along = np.arange(x1, x2) if upright else np.arange(y1, y2)
            wave = (np.sin(2 * np.pi * (along + phase[person] + speed[person] * number) / period[person]) + 1) / 2
            shade = np.broadcast_to(wave[None] if upright else wave[:, None], (int(y2 - y1), int(x2 - x1)))
            picture[int(y1) : int(y2), int(x1) : int(x2)] = (shade[..., None] * colours[person]).astype(np.uint8)
        frames.append(picture)
    return frames


def sounds(hisses: list[bool], seed: int) -> NDArray[np.int16]:
    """A hum or a hiss for each scene."""
    rng = np.random.default_rng(seed)
    parts = []
    for hiss in hisses:
        time_s = np.arange(STEP_S * RATE_HZ) / RATE_HZ
        noise = rng.normal(0, 0.25, len(time_s))
        hum = np.sin(2 * np.pi * rng.uniform(180, 420) * time_s + rng.uniform(0, 6)) * 0.5
        parts.append((noise if hiss else hum) * rng.uniform(0.5, 1.0))
    return np.asarray(np.concatenate(parts).clip(-1, 1) * 30_000, np.int16)


class AvaFilms:
    """Writes films and official files.

    Args:
        folder: receives `annotations/` and `videos_15min/`.
        scenes: of a film.
        grey: films show nothing.
        version: of AVA.
    """

    def __init__(self, folder: Path, scenes: int = 12, grey: bool = False, version: str = "2.2") -> None:
        self.annotations, self.videos = folder / "annotations", folder / "videos_15min"
        self.annotations.mkdir(parents=True)
        self.videos.mkdir()
        self.scenes, self.grey, self.version = scenes, grey, version
        self.lines: dict[str, list[str]] = {}
        self._lists()

    def write(self, train_looks: int, val_looks: int) -> None:
        """Write `2 * train_looks` and `4 * val_looks` films: each look with both sounds, for `val` in both orders."""
        for split, looks in (("train", train_looks), ("val", val_looks)):
            for look in range(looks):
                rng = np.random.default_rng([look, split == "val"])
                scenes, hisses = scenes_of(rng, self.scenes), [bool(h) for h in rng.integers(0, 2, self.scenes)]
                orders = [scenes, turned(scenes)] if split == "val" else [scenes]
                for order, own in enumerate(orders):
                    for other in (False, True):
                        name = f"{split:-<5}{look:03d}{order}{int(other)}-"
                        self._film(split, name, own, [h != other for h in hisses], seed=1000 * look + other)
            for kind in ("", "predicted"):
                name = f"ava_{split}_predicted_boxes.csv" if kind else f"ava_{split}_v{self.version}.csv"
                (self.annotations / name).write_text("\n".join(self.lines[split + kind]) + "\n")
            excluded = f"ava_{split}_excluded_timestamps_v{self.version}.csv"
            (self.annotations / excluded).write_text(f"{split:-<5}00000-,{FIRST:04d}\n" if split == "train" else "")

    def _film(self, split: str, name: str, scenes: list[Scene], hisses: list[bool], seed: int) -> None:
        frames = [picture for scene in scenes for picture in pictures(scene)]
        frames = [np.full((HEIGHT, WIDTH, 3), 100, np.uint8)] * len(frames) if self.grey else frames
        lead = [np.full((HEIGHT, WIDTH, 3), 90, np.uint8)] * (STEP_S * FPS // 2)  # so that scene 0 has second 2 inside
        quiet = np.zeros(STEP_S * RATE_HZ // 2, np.int16)
        sound = np.concatenate([quiet, sounds(hisses, seed)])
        write_video(self.videos / f"{name}.mp4", frames=lead + frames, fps=FPS, audio=sound, rate_hz=RATE_HZ)
        rng = np.random.default_rng(len(self.lines.get(split, ())))
        for number, (scene, hiss) in enumerate(zip(scenes, hisses, strict=True)):
            for person, (x1, y1, x2, y2) in enumerate(scene.places):
                upright = scene.upright == (person == 0)
                labels = [UNSCORED, SAME if upright == hiss else OTHER, *[SEEN] * upright, *[HEARD] * hiss]
                key, place = f"{name},{FIRST + STEP_S * number:04d}", (x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT)
                shown = ",".join(f"{value:.3f}" for value in place)
                self.lines.setdefault(split, []).extend(f"{key},{shown},{label},{person}" for label in labels)
                near = ",".join(f"{value:.3f}" for value in place + rng.uniform(-0.008, 0.008, 4))
                self.lines.setdefault(f"{split}predicted", []).append(f"{key},{near},,{rng.uniform(0.9, 1):.6f}")
            weak = f"{name},{FIRST + STEP_S * number:04d},0.300,0.300,0.600,0.600,,0.790000"
            self.lines[f"{split}predicted"].append(weak)

    def _lists(self) -> None:
        every = "".join(f'item {{\n  name: "act {i}"\n  id: {i}\n}}\n' for i in range(1, 81))
        some = "".join(f'item {{\n  name: "act {i}"\n  id: {i}\n}}\n' for i in EVALUATED)
        (self.annotations / f"ava_action_list_v{self.version}.pbtxt").write_text(every)
        (self.annotations / f"ava_action_list_v{self.version}_for_activitynet_2019.pbtxt").write_text(some)
