"""Every official layout, in miniature: rows per split, missing videos, and the identity of the report."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.annotations import READERS, read
from tests.pipeline.support.miniatures import MINIATURES


@pytest.mark.parametrize("name", MINIATURES)
def test_rows_and_missing_videos_are_as_written(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name](tmp_path).touch()
    found = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    assert dict(Counter(row.split for row in found.rows)) == dict(miniature.rows)
    report = found.report
    assert report.without_video == miniature.missing
    assert report.listed == len(found.rows) + report.without_video + sum(report.dropped.values())
    assert set(found.videos) <= set(miniature.files)
    assert report.layout
    assert any(line.startswith(f"{found.dataset}: ") for line in report.lines())


@pytest.mark.parametrize("name", MINIATURES)
def test_without_any_video_everything_is_reported_and_nothing_raised(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name](tmp_path)
    miniature.videos.mkdir(parents=True, exist_ok=True)
    if miniature.annotations is None:
        with pytest.raises(ValueError, match="must hold video files"):
            read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
        return
    found = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    assert found.rows == ()
    assert found.report.listed == found.report.without_video + sum(found.report.dropped.values())
    assert len(found.report.missing) > 0


def test_each_reader_has_a_miniature() -> None:
    assert {name.split("_v2")[0] for name in READERS} <= {
        "folder" if name.startswith("folder") else name.split("_v2")[0] for name in MINIATURES
    }


@pytest.mark.parametrize("name", MINIATURES)
def test_reading_twice_gives_the_same(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name](tmp_path).touch()
    first = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    assert read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options) == first
