"""AVA's official rules once more, plainly: files of text, lists and loops, nothing shared with what is tested.

A detection file and a ground-truth file are read as the official evaluator reads them. Equal scores are one threshold.
"""

import csv
import heapq
import io
import math
from collections import defaultdict
from collections.abc import Collection

import torch
from torchvision.ops import box_iou

Corners = tuple[float, ...]


def read(text: str, classes: Collection[int], limit: int) -> dict[str, list[tuple[float, int, Corners]]]:
    """Image -> (score, class, corners), the `limit` best ones (0 = all), from a file's text."""
    images: dict[str, list[tuple[float, int, int, Corners]]] = defaultdict(list)
    for number, row in enumerate(csv.reader(io.StringIO(text))):
        image, label = f"{row[0]},{int(row[1]):04d}", int(row[6])
        if label not in classes:
            continue
        score = float(row[7]) if limit else 1.0  # column 8 of the ground truth is a person
        entry = (score, -number, label, tuple(map(float, row[2:6])))  # of equal scores the first row stays
        if not limit or len(images[image]) < limit:
            heapq.heappush(images[image], entry)
        elif entry > images[image][0]:
            heapq.heapreplace(images[image], entry)
    return {image: [(s, k, c) for s, _, k, c in sorted(found, reverse=True)] for image, found in images.items()}


def average_precisions(
    truth_csv: str, found_csv: str, classes: Collection[int], excluded: Collection[str] = (), limit: int = 50
) -> dict[int, float]:
    """AP of every class that has ground truth."""
    truth, found = read(truth_csv, classes, 0), read(found_csv, classes, limit)
    results = {}
    for label in classes:
        positives, hits = 0, []  # hits: (score, right)
        for image in sorted(set(truth) | set(found)):
            if image in excluded:
                continue
            own = [corners for _, k, corners in truth.get(image, []) if k == label]
            positives += len(own)
            taken = set()
            for score, k, corners in found.get(image, []):
                if k != label:
                    continue
                right = False
                if own:
                    overlaps = box_iou(torch.tensor([corners]).double(), torch.tensor(own).double())[0].tolist()
                    best = overlaps.index(max(overlaps))
                    if overlaps[best] >= 0.5 and best not in taken:
                        taken.add(best)
                        right = True
                hits.append((score, right))
        if positives:
            results[label] = area(hits, positives)
    return results


def area(hits: list[tuple[float, bool]], positives: int) -> float:
    """Each right answer earns the best precision at its threshold or any lower one, over the number of positives."""
    points = []
    for threshold in sorted({score for score, _ in hits}, reverse=True):
        taken = [right for score, right in hits if score >= threshold]
        points.append((sum(taken), sum(taken) / len(taken)))
    total, before = 0.0, 0
    for number, (right, _) in enumerate(points):
        total += (right - before) * max(precision for _, precision in points[number:])
        before = right
    return total / positives


def mean(results: dict[int, float]) -> float:
    """Mean over the classes, nan without any."""
    return sum(results.values()) / len(results) if results else math.nan
