"""HD video comes tagged BT.709; a store holds BT.601, the matrix that DALI decodes with."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace, VideoReformatter

from pipeline.annotations import read
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.media.picture import PictureConverter, Size, Turn
from pipeline.media.probe import RefusedError
from pipeline.store.reader import Store

COLOURS = np.array([[40, 180, 60], [200, 60, 40], [60, 60, 200], [128, 128, 128]], np.uint8)


def write_tagged(path: Path, matrix: Colorspace, tag: int) -> None:
    """Four broad bars of COLOURS, converted with `matrix` and tagged as `tag` (ISO 23091-2), 128x64."""
    picture = np.repeat(COLOURS, 32, axis=0)[None].repeat(64, 0)
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        options = {"crf": "8", "g": "12", "bf": "0"}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.colorspace = tag
        for _ in range(75):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(rgb, format="yuv420p", dst_colorspace=matrix)
            frame.colorspace = tag
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("matrix", "tag"), [(Colorspace.ITU709, 1), (Colorspace.ITU601, 6)])
@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_stored_colours_are_bt601(tmp_path: Path, codec: str, matrix: Colorspace, tag: int) -> None:
    videos = tmp_path / "videos" / "bars"
    videos.mkdir(parents=True)
    write_tagged(videos / "a.mp4", matrix, tag)
    annotations = read("folder", None, videos.parent, {"val_fraction": "0"})
    settings = TranscodeSettings(codec=codec, quality=2 if codec == "mjpeg" else 10)
    ingest(annotations, videos.parent, tmp_path / "store", settings, options=IngestOptions(workers=1))
    split = Store.open(tmp_path / "store").split("train")
    luma, chroma = split.read_frames(0, np.array([30]))
    for bar, colour in enumerate(COLOURS.astype(float)):
        y = luma[0, 8:56, bar * 32 + 8 : bar * 32 + 24].mean() - 16
        cb, cr = chroma[0, 4:28, bar * 16 + 4 : bar * 16 + 12].mean((0, 1)) - 128
        rgb = np.array(
            [
                1.164383 * y + 1.596027 * cr,
                1.164383 * y - 0.391762 * cb - 0.812968 * cr,
                1.164383 * y + 2.017232 * cb,
            ]
        )
        assert np.abs(rgb - colour).max() <= 4.0, f"bar {bar}: {rgb.round(1)} is not {colour}"


@pytest.mark.parametrize("tag", [3, 8, 14])  # reserved, YCgCo, ICtCp
def test_colours_that_nothing_converts_are_refused_by_name(tag: int) -> None:
    frame = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), format="yuv420p")
    frame.colorspace = tag
    with pytest.raises(RefusedError, match=rf"pictures \(yuv420p, matrix {tag}, transfer 2\) cannot be converted"):
        PictureConverter(Size(64, 64, 64, 64), Turn()).convert(frame)
