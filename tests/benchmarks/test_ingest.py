"""The comparison with ffmpeg does the same work on both sides."""

import shutil
import subprocess
from pathlib import Path

import av
import pytest

from benchmarks import ingest as benchmark
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.transcode import transcode

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_both_sides_make_the_same_media(codec: str, tmp_path: Path) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not on the path; only this comparison needs it")
    benchmark.make_source(tmp_path / "a.mp4", seconds=1.0, size=(640, 352), seed=0)
    item = transcode(tmp_path / "a.mp4", tmp_path / "a.item", TranscodeSettings(codec=codec))
    subprocess.run(benchmark.ffmpeg_command(tmp_path / "a.mp4", tmp_path / "ff", codec, 1), check=True)
    with av.open(str(tmp_path / "ff.mp4")) as container:
        stream = container.streams.video[0]
        frames = [(frame.width, frame.height) for frame in container.decode(stream)]
        assert stream.codec_context.name == codec
    assert frames == [(item.width, item.height)] * item.num_frames == [(480, 256)] * 30
    samples = (tmp_path / "ff.pcm").stat().st_size // 2
    assert abs(samples - item.num_samples) <= 2048  # ffmpeg keeps the encoder's padding behind the video's end
    assert (tmp_path / "ff.mp4").stat().st_size == pytest.approx(item.mp4_bytes, rel=0.2)
