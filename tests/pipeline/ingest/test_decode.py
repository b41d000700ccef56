"""What ingest wrote, through the decoder that trains: DALI shows the frames that PyAV shows, cut by cut."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.transcode import transcode
from pipeline.media.fragments import parse_fragments
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support.stores import cut_of

pytestmark = pytest.mark.integration


def dali_frames(data: bytes, count: int) -> np.ndarray:
    """(count, H, W, 3) uint8 from DALI's CPU decoder."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():  # type: ignore[no-untyped-def]
        source = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)], batch=True, dtype=None)
        return fn.decoders.video(source, device="cpu", start_frame=0, sequence_length=count, pad_mode="none")

    pipe = graph()
    pipe.build()
    return np.asarray(pipe.run()[0].as_cpu().at(0))


@pytest.mark.parametrize("kind", ["encoded", "copied"])
def test_cuts_decode_to_their_frames(kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / "a.webm", tmp_path / "a.item"
    fit = {"g": "12", "keyint_min": "12", "lag-in-frames": "0", "auto-alt-ref": "0"}
    zoo.make(path, video="libvpx-vp9", audio=None, size=(192, 96), video_options=fit)
    item = transcode(path, out, TranscodeSettings(codec="vp9", copy_fit_streams=kind == "copied"))
    assert item.copied == (kind == "copied")
    video = parse_fragments(out.read_bytes()[: item.mp4_bytes], fps=Fraction(25), width=192, height=96)
    for first, last in ((0, 20), (13, 16), (30, 74)):
        data, begin = cut_of(video, first, last)
        with av.open(io.BytesIO(data)) as container:
            luma = np.stack([frame.to_ndarray()[:96] for frame in container.decode(video=0)]).astype(float)
        shown = dali_frames(data, last - begin + 1)
        assert shown.shape == (last - begin + 1, 96, 192, 3)
        grey = (shown @ np.array([0.257, 0.504, 0.098])) + 16  # BT.601, limited range
        assert np.abs(grey - luma[: len(grey)]).mean() < 1.0
        flashes = [n / 25 for n in range(begin, begin + len(shown)) if shown[n - begin].mean() > 200]
        assert flashes == [t for t in zoo.FLASHES_S if begin <= t * 25 <= last]
