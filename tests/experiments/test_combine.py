"""Score files and the command that combines them, on files made by hand."""

import csv
import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli.command_line import run_command
from experiments.combine import main
from experiments.records.epic_submission import ACTIONS
from experiments.records.score_files import (
    ScoreFile,
    ScoreFileError,
    check_score_path,
    read_scores,
    write_scores,
)


def made(classes: int, count: int = 40, seed: int = 0, **facts: str) -> ScoreFile:
    """Random scores about samples s0, s1, ..."""
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(classes, 0.3), count)
    labels = np.random.default_rng(99).integers(classes, size=count)
    names = tuple(f"class {k}" for k in range(classes))
    given = {"task": "classification", "label_set": "action", "split": "val", "data_fingerprint": "f" * 16,
             "reduction": "mean", **facts}  # fmt: skip
    views = np.full(count, 3)
    return ScoreFile("", tuple(f"s{i}" for i in range(count)), labels, scores, views, views * 0, names, given)


def combine(capsys: Any, *arguments: object, code: int = 0) -> str:
    """Run the command; its output, or its error."""
    capsys.readouterr()
    assert run_command(main, [str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out  # type: ignore[no-any-return]


def test_a_file_reads_back_equal_and_its_bytes_depend_on_its_content_alone(tmp_path: Path) -> None:
    content = made(5)
    for name in ("a.npz", "b.npz"):
        write_scores(tmp_path / name, content)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_scores(tmp_path / "a.npz")
    assert (found.ids, found.class_names, found.facts) == (content.ids, content.class_names, content.facts)
    for name in ("labels", "scores", "views", "silent"):
        assert np.array_equal(getattr(found, name), getattr(content, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"scores": np.zeros((3, 5))}, r"scores \(3, 5\) float64 must be \(40, 5\) float64"),
        ({"scores": np.full((40, 5), np.nan)}, "scores must be finite"),
        ({"labels": np.full(40, 5)}, r"labels \(40,\) int64 must be \(40,\) int64 below 5"),
        ({"ids": ("s",) * 40}, r"ids \(40\) must be unique"),
        ({"views": np.zeros(3, np.int64)}, r"views \(3,\) must be"),
        ({"facts": {"task": "x"}}, "facts .* must hold task, label_set"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], rule: str, tmp_path: Path) -> None:
    write_scores(tmp_path / "a.npz", dataclasses.replace(made(5), **change))
    with pytest.raises(ScoreFileError, match=rule):
        read_scores(tmp_path / "a.npz")


def test_other_files_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ScoreFileError, match="must exist"):
        read_scores(path)
    for content in (b"", b"text", b"PK\x03\x04torn"):
        path.write_bytes(content)
        with pytest.raises(ScoreFileError, match="must be one that evaluate --scores wrote"):
            read_scores(path)
        with pytest.raises(ScoreFileError, match="must be absent or an earlier score file"):
            check_score_path(path)
    np.savez(path, header=np.array([object()]))
    with pytest.raises(ScoreFileError, match="must be one that"):  # a pickle is never loaded
        read_scores(path)
    write_scores(path, made(3))
    check_score_path(path, "f" * 16)
    with pytest.raises(ScoreFileError, match="other data"):
        check_score_path(path, "0" * 16)
    with pytest.raises(ScoreFileError, match=r"must end in \.npz"):
        check_score_path(tmp_path / "a.csv")


def test_ensemble_is_the_mean_whatever_the_order_of_the_samples(tmp_path: Path, capsys: Any) -> None:
    one, other = made(5, seed=1), made(5, seed=2)
    order = np.random.default_rng(3).permutation(40)
    write_scores(tmp_path / "a.npz", one)
    write_scores(tmp_path / "b.npz", other.rows(order))
    out = tmp_path / "ab.npz"
    text = combine(capsys, "ensemble", tmp_path / "a.npz", tmp_path / "b.npz", "--weights", 1, 3, "--out", out)
    joined = read_scores(out)
    assert joined.scores == pytest.approx((one.scores + 3 * other.scores) / 4)
    top1 = 100 * (joined.scores.argmax(1) == one.labels).mean()
    assert f"ensemble: top1 {top1:.2f} %" in text
    assert joined.facts["ensemble"]["weights"] == [1.0, 3.0]
    before = (tmp_path / "a.npz").read_bytes()
    onto = ("ensemble", tmp_path / "a.npz", out, "--out", tmp_path / "a.npz")
    assert "must not be one of the files that are combined" in combine(capsys, *onto, code=2)
    assert (tmp_path / "a.npz").read_bytes() == before
    write_scores(tmp_path / "b.npz", other.rows(order[:30]))
    refused = combine(capsys, "ensemble", tmp_path / "a.npz", tmp_path / "b.npz", code=2)
    assert "must be about the same samples" in refused
    assert "lacks 10" in refused
    text = combine(capsys, "ensemble", tmp_path / "a.npz", tmp_path / "b.npz", "--common")
    assert "note: 10 of 40 samples are left out" in text
    write_scores(tmp_path / "b.npz", dataclasses.replace(other, labels=(other.labels + 1) % 5))
    assert "same labels" in combine(capsys, "ensemble", tmp_path / "a.npz", tmp_path / "b.npz", code=2)
    write_scores(tmp_path / "b.npz", made(6))
    assert "same classes" in combine(capsys, "ensemble", tmp_path / "a.npz", tmp_path / "b.npz", code=2)


def test_actions_of_epic(tmp_path: Path, capsys: Any) -> None:
    verb, noun = made(7, seed=1, label_set="verb"), made(9, seed=2, label_set="noun")
    paths = tmp_path / "verb.npz", tmp_path / "noun.npz"
    write_scores(paths[0], verb)
    write_scores(paths[1], noun)
    text = combine(capsys, "actions", *paths)
    right = (verb.scores.argmax(1) == verb.labels) & (noun.scores.argmax(1) == noun.labels)
    assert f"action: top1 {100 * right.mean():.2f} %" in text
    assert "x prior" in combine(capsys, "actions", *paths, "--prior", *paths)
    assert "must be of data.label_set=verb" in combine(capsys, "actions", *reversed(paths), code=2)


def test_gain_by_class_as_table_and_picture(tmp_path: Path, capsys: Any) -> None:
    base, ours = made(5, seed=1), made(5, seed=2)
    write_scores(tmp_path / "slowfast.npz", base)
    write_scores(tmp_path / "avslowfast.npz", ours)
    combine(capsys, "gain", tmp_path / "slowfast.npz", tmp_path / "avslowfast.npz", "--out", tmp_path / "gain")
    rows = list(csv.DictReader((tmp_path / "gain" / "gain.csv").read_text().splitlines()))
    gains = [float(row["gain"]) for row in rows]
    assert gains == sorted(gains, reverse=True)
    for row in rows:
        own = base.labels == base.class_names.index(row["class"])
        values = [(f.scores[own].argmax(1) == f.labels[own]).mean() for f in (base, ours)]
        assert [float(row["base"]), float(row["ours"])] == pytest.approx(values, abs=1e-4)
        assert int(row["samples"]) == own.sum()
    assert (tmp_path / "gain" / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_gain_reads_the_tables_of_reports(tmp_path: Path, capsys: Any) -> None:
    header = "class,ground_truth_boxes,detections,average_precision\n"
    (tmp_path / "a.csv").write_text(header + "swim,10,20,0.2000\ndance,5,9,0.5000\nread,0,0,nan\n")
    (tmp_path / "b.csv").write_text(header + "swim,10,21,0.6000\ndance,5,9,0.4000\nread,0,0,nan\n")
    text = combine(capsys, "gain", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "out")
    assert "mean gain over 2 classes: +15.00 points" in text
    assert "  swim: +40.0 points" in text
    assert "  swim: x 3.0" in text
    assert "  dance: -10.0 points" in text
    (tmp_path / "b.csv").write_text("class,x\nswim,1\n")
    assert "must be a per_class.csv" in combine(
        capsys, "gain", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "out", code=2
    )


def test_subset_says_both_ways_and_splits_are_averaged(tmp_path: Path, capsys: Any) -> None:
    file = made(6)
    write_scores(tmp_path / "a.npz", file)
    (tmp_path / "list.txt").write_text("class 1\nclass 4\n")
    lines = combine(capsys, "subset", tmp_path / "a.npz", tmp_path / "list.txt").splitlines()
    own = np.isin(file.labels, (1, 4))
    masked = np.where(np.isin(np.arange(6), (1, 4)), file.scores, -1)
    for text, scores in zip(lines[1:], (file.scores, masked), strict=True):
        assert f"top1 {100 * (scores[own].argmax(1) == file.labels[own]).mean():.2f} %" in text
    (tmp_path / "list.txt").write_text("class 1\nswim\n")
    assert "the first is 'swim'" in combine(capsys, "subset", tmp_path / "a.npz", tmp_path / "list.txt", code=2)
    missing = combine(capsys, "subset", tmp_path / "a.npz", tmp_path / "lists.txt", code=2)
    assert f"(No such file or directory); did you mean {tmp_path / 'list.txt'}?" in missing
    write_scores(tmp_path / "b.npz", made(6, seed=5, split="val2"))
    text = combine(capsys, "splits", tmp_path / "a.npz", tmp_path / "b.npz")
    shares = [100 * (f.scores.argmax(1) == f.labels).mean() for f in (file, made(6, seed=5))]
    assert f"mean of 2 splits: top1 {np.mean(shares):.2f} %" in text
    assert "is there twice" in combine(capsys, "splits", tmp_path / "a.npz", tmp_path / "a.npz", code=2)


@pytest.mark.parametrize(("edition", "verbs", "nouns"), [("55", 125, 352), ("100", 97, 300)])
def test_submission_is_what_the_challenge_takes(
    edition: str, verbs: int, nouns: int, tmp_path: Path, capsys: Any
) -> None:
    verb = dataclasses.replace(made(verbs, 3, label_set="verb"), labels=np.full(3, -1))
    noun = dataclasses.replace(made(nouns, 3, label_set="noun"), labels=np.full(3, -1))
    write_scores(tmp_path / "v.npz", verb)
    write_scores(tmp_path / "n.npz", noun)
    pairs = [tmp_path / "v.npz", tmp_path / "n.npz"] * (2 if edition == "55" else 1)
    more = ["--edition", edition, *([] if edition == "55" else ["--supervision", 1, 4, 3])]
    for name in ("a.zip", "b.zip"):
        combine(capsys, "submission", *pairs, *more, "--out", tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == (["seen.json", "unseen.json"] if edition == "55" else ["test.json"])
        content = json.loads(archive.read(archive.namelist()[0]))
    assert content.pop("challenge") == "action_recognition"
    results = content.pop("results")
    assert content == (
        {"version": "0.1"} if edition == "55" else {"version": "0.2", "sls_pt": 1, "sls_tl": 4, "sls_td": 3}
    )
    assert list(results) == ["s0", "s1", "s2"]
    for row, found in enumerate(results.values()):
        logits = np.array([found["verb"][str(k)] for k in range(verbs)])
        assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(verb.scores[row], abs=1e-9)
        assert len(found["noun"]) == nouns
        products = np.sort(np.outer(verb.scores[row], noun.scores[row]).ravel())[::-1][:ACTIONS]
        assert list(found["action"].values()) == pytest.approx(products.tolist())
        best = max(found["action"], key=found["action"].get)
        assert best == f"{verb.scores[row].argmax()},{noun.scores[row].argmax()}"
    assert "must hold the 125" in combine(
        capsys, "submission", *[tmp_path / "n.npz"] * 4, "--out", tmp_path / "c.zip", code=2
    )
