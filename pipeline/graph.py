"""The DALI graph: decode -> crop, resize, flip, normalise; PCM -> log-mel. No randomness, so one graph for all uses.

Only decoding differs by decoder: for `dali` the graph decodes encoded cuts (VP9 on the CPU, NVDEC on a GPU), for `cpu`
it takes frames that CPU threads decoded and converts their colour. Everything after that is the same.

Legend: T frames, H W pixels, C channels, S crops, M audio frames, F mel bins.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from pipeline.clip import PIXEL_MEAN, PIXEL_STD, STFT_HOP_SAMPLES, STFT_WINDOW_SAMPLES, ClipSpec
from pipeline.dataset import SAMPLE_RATE_HZ, Decoder
from pipeline.source import HostClip

LOG_MEL_MEAN, LOG_MEL_STD = -7.03, 4.66  # of ln(S + 1e-8) over Kinetics; the released code's
LOG_EPSILON = 1e-8


@dataclass(frozen=True)
class GraphSpec:
    """What a graph has to do.

    Args:
        clip: Shape of the clips.
        max_clips: Largest batch.
        num_crops: Spatial crops of each clip.
        device_id: CUDA device, or None for the CPU.
        decoder: Who decodes: this graph, or CPU threads before it.
        half: float16 frames instead of float32.
        pad_channels: Frames with four channels in memory, the fourth zero: what a GPU's convolutions read best.
        want_video: Whether frames are wanted.
        want_audio: Whether log-mel is wanted.
        want_negative: Whether out-of-sync log-mel is wanted.
        num_threads: DALI's threads; also the number of NVDEC sessions at once.
        prefetch: Batches inside DALI.
        planes_stream: CUDA stream (its handle) in whose order decoded planes lie in device memory; None: in the host's.
    """

    clip: ClipSpec
    max_clips: int
    num_crops: int = 1
    device_id: int | None = None
    decoder: Decoder = "dali"
    half: bool = False
    pad_channels: bool = False
    want_video: bool = True
    want_audio: bool = True
    want_negative: bool = False
    num_threads: int = 4
    prefetch: int = 2
    planes_stream: int | None = None


@dataclass(frozen=True)
class GraphInput:
    """One input: its DALI type, rank and layout, and what it is of a clip in host memory."""

    dtype: Any
    ndim: int
    value: Callable[[HostClip], Any]
    layout: str = ""


def graph_inputs(spec: GraphSpec) -> dict[str, GraphInput]:
    """Return the inputs that `spec` needs, by name, in the order in which the feeder gives them."""
    inputs: dict[str, GraphInput] = {}
    if spec.want_video:
        inputs["size"] = GraphInput(types.FLOAT, 1, lambda clip: np.array(clip.plan.size_px, np.float32))
        inputs["mirror"] = GraphInput(types.INT32, 0, lambda clip: np.array(clip.plan.flip, np.int32))
        inputs["windows"] = GraphInput(types.FLOAT, 3, _corners)
        if spec.decoder == "dali":
            inputs["encoded"] = GraphInput(types.UINT8, 1, lambda clip: clip.encoded)
            inputs["frame_numbers"] = GraphInput(types.INT32, 1, lambda clip: clip.frames)
        else:
            inputs["luma"] = GraphInput(types.UINT8, 4, lambda clip: clip.luma, "FHWC")
            inputs["chroma"] = GraphInput(types.UINT8, 4, lambda clip: clip.chroma, "FHWC")
    if spec.want_audio:
        inputs["audio"] = GraphInput(types.INT16, 1, lambda clip: clip.audio)
        inputs["has_audio"] = GraphInput(types.FLOAT, 0, lambda clip: np.array(clip.has_audio, np.float32))
    if spec.want_negative:  # where there is none its spectrogram is masked, so any sound will do
        inputs["negative"] = GraphInput(
            types.INT16, 1, lambda clip: clip.audio if clip.negative is None else clip.negative
        )
        inputs["has_negative"] = GraphInput(
            types.FLOAT, 0, lambda clip: np.array(clip.negative is not None, np.float32)
        )
    return inputs


def _corners(clip: HostClip) -> NDArray[np.float32]:
    """(S, 2, 2): [top, left] and [bottom, right] of each crop in stored pixels."""
    corners = [[[w.top, w.left], [w.top + w.height, w.left + w.width]] for w in clip.plan.crops]
    return np.array(corners, np.float32)


def host_inputs(spec: GraphSpec, clips: Sequence[HostClip]) -> tuple[list[Any], ...]:
    """Return the arrays of one batch for each of `graph_inputs`, in its order."""
    return tuple([item.value(clip) for clip in clips] for item in graph_inputs(spec).values())


def build_graph(spec: GraphSpec, feeder: Callable[[], tuple[list[Any], ...]]) -> Pipeline:
    """Build the pipeline.

    Args:
        spec: What it has to do.
        feeder: Called once a batch from the thread that runs the pipeline; returns one list of arrays for each of
            `graph_inputs`, or raises StopIteration. Outputs are those of `output_names`. The arrays are not copied:
            they must stay as they are until the batch has come out (on a GPU: until its stream has reached that point).
    """
    pipe = Pipeline(
        batch_size=spec.max_clips,
        num_threads=spec.num_threads,
        device_id=spec.device_id,
        prefetch_queue_depth=spec.prefetch,
        exec_dynamic=True,
    )
    with pipe:
        inputs = _sources(spec, feeder)
        outputs: list[Any] = []
        if spec.want_video:
            outputs.append(_video(spec, inputs))
        if spec.want_audio:
            outputs.append(_log_mel(spec, inputs["audio"], inputs["has_audio"]))
        if spec.want_negative:
            outputs.append(_log_mel(spec, inputs["negative"], inputs["has_negative"]))
        pipe.set_outputs(*outputs)
    pipe.build()
    _BUILT.add(pipe)
    return pipe


def end_graph(pipe: Pipeline) -> None:
    """Stop a pipeline and wait until nothing of it reads the arrays that it was given."""
    pipe._shutdown()  # what its destructor calls


def _leave_to_parent() -> None:
    """In a fork: forget pipelines. To end one there, as DALI does at exit, is to wait for threads that a fork lacks."""
    for pipe in list(_BUILT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipe._pipe))  # never destroyed there
        pipe._pipe = None  # as if it had been shut down
    _BUILT.clear()


_BUILT: WeakSet[Any] = WeakSet()  # pipelines of this process
os.register_at_fork(after_in_child=_leave_to_parent)


class _Parted:
    """Gives the inputs of each batch to two sources: each takes its own of every batch, in whatever order they ask."""

    def __init__(self, feeder: Callable[[], tuple[list[Any], ...]], is_second: Sequence[bool]) -> None:
        self._feeder, self._is_second = feeder, is_second
        self._waiting: tuple[deque[tuple[list[Any], ...]], ...] = (deque(), deque())

    def first(self) -> tuple[list[Any], ...]:
        """Return the inputs of the first source for its next batch; raises StopIteration as the feeder does."""
        return self._take(0)

    def second(self) -> tuple[list[Any], ...]:
        """Return the inputs of the second source for its next batch; raises StopIteration as the feeder does."""
        return self._take(1)

    def _take(self, which: int) -> tuple[list[Any], ...]:
        if not self._waiting[which]:
            inputs = self._feeder()
            for number, waiting in enumerate(self._waiting):
                own = (x for x, second in zip(inputs, self._is_second, strict=True) if second == bool(number))
                waiting.append(tuple(own))
        return self._waiting[which].popleft()


def _sources(spec: GraphSpec, feeder: Callable[[], tuple[list[Any], ...]]) -> dict[str, Any]:
    """Declare the inputs, by name: from host memory without a copy, and planes from device memory where they lie there.

    DALI copies those planes in the order of the stream that made them, so that nothing waits on the host.
    """
    declared = graph_inputs(spec)
    is_plane = [spec.planes_stream is not None and name in ("luma", "chroma") for name in declared]
    parted = _Parted(feeder, is_plane)
    kinds: tuple[dict[str, Any], ...] = (
        {"source": parted.first, "no_copy": True},
        {"source": parted.second, "device": "gpu", "cuda_stream": spec.planes_stream},
    )
    inputs: dict[str, Any] = {}
    for which, how in enumerate(kinds):
        own = {n: item for (n, item), second in zip(declared.items(), is_plane, strict=True) if second == bool(which)}
        if own:
            nodes = fn.external_source(
                num_outputs=len(own),
                dtype=[item.dtype for item in own.values()],
                ndim=[item.ndim for item in own.values()],
                layout=[item.layout for item in own.values()],
                **how,
            )
            inputs |= dict(zip(own, nodes, strict=True))
    return inputs


def graph_outputs(
    spec: GraphSpec, feeder: Callable[[], tuple[list[Any], ...]]
) -> Generator[dict[str, Any], None, None]:
    """Run the graph until the feeder ends; yields tensor lists by the names of `output_names`.

    A graph without outputs is not built: batches without any come `prefetch` calls of the feeder later, as ever. When
    the generator has ended or is closed, nothing reads the arrays that the feeder gave.
    """
    names = output_names(spec)
    if not names:
        yield from _nothing_ahead(spec.prefetch, feeder)
        return
    pipe = build_graph(spec, feeder)
    try:
        while True:
            try:
                outputs = pipe.run(*stream_argument(spec))
            except StopIteration:
                return
            yield dict(zip(names, outputs, strict=True))
    finally:
        end_graph(pipe)


def _nothing_ahead(prefetch: int, feeder: Callable[[], Any]) -> Generator[dict[str, Any], None, None]:
    waiting, ended = 0, False
    while waiting or not ended:
        while not ended and waiting <= prefetch:
            try:
                feeder()
            except StopIteration:
                ended = True
            else:
                waiting += 1
        if waiting:
            waiting -= 1
            yield {}


def stream_argument(spec: GraphSpec) -> tuple[int, ...]:
    """Return the stream that reads the outputs: buffers are handed over and freed in its order."""
    return () if spec.device_id is None else (torch.cuda.current_stream(spec.device_id).cuda_stream,)


def output_names(spec: GraphSpec) -> list[str]:
    """Return the outputs in order: frames (S, T, H, W, C = 3 or 4), log_mel (M, F), negative_log_mel (M, F)."""
    wanted = {"frames": spec.want_video, "log_mel": spec.want_audio, "negative_log_mel": spec.want_negative}
    return [name for name, want in wanted.items() if want]


def _video(spec: GraphSpec, inputs: dict[str, Any]) -> Any:
    """(S, T, H, W, C) normalised frames; C is 4 with `pad_channels`, else 3."""
    planes = _decoded(spec, inputs) if spec.decoder == "dali" else _uploaded_yuv(spec, inputs)
    crops = []
    for crop in range(spec.num_crops):
        rgb = _crop_and_resize(planes, inputs["windows"][crop], inputs["size"])
        crops.append(_normalise(rgb, inputs["mirror"], spec))
    return fn.stack(*crops, axis=0) if spec.num_crops > 1 else crops[0]


def _decoded(spec: GraphSpec, inputs: dict[str, Any]) -> list[Any]:
    """One RGB tensor, THWC."""
    device = "cpu" if spec.device_id is None else "mixed"
    # pad_mode none: a cut that ends early is an error, not black frames.
    frames = inputs["frame_numbers"]
    return [fn.decoders.video(inputs["encoded"], frames=frames, device=device, pad_mode="none", build_index=False)]


def _uploaded_yuv(spec: GraphSpec, inputs: dict[str, Any]) -> list[Any]:
    """Luma (T, H, W, 1) and chroma (T, H/2, W/2, 2)."""
    planes = [inputs["luma"], inputs["chroma"]]
    on_device = spec.device_id is None or spec.planes_stream is not None
    return planes if on_device else [plane.gpu() for plane in planes]


def _crop_and_resize(planes: list[Any], window: Any, size: Any) -> Any:
    """Resize the crop window of the source picture to the input size: resize-then-crop at a third of its cost."""
    scales = [1.0, 0.5]  # chroma planes are half as large, centre-sited
    resized = [
        fn.resize(
            plane,
            size=size,
            roi_start=window[0] * scale,
            roi_end=window[1] * scale,
            antialias=False,
            interp_type=types.INTERP_LINEAR,
        )
        for plane, scale in zip(planes, scales, strict=False)
    ]
    if len(resized) == 1:
        return resized[0]
    ycbcr = fn.cat(*resized, axis=3)
    return fn.color_space_conversion(ycbcr, image_type=types.YCbCr, output_type=types.RGB)  # BT.601, limited range


def _normalise(rgb: Any, mirror: Any, spec: GraphSpec) -> Any:
    """Mirror and normalise; frames are folded into the height, because 4-D inputs take a slow path on the GPU."""
    shape = rgb.shape(device="cpu")
    folded = fn.reshape(rgb, shape=fn.stack(shape[0] * shape[1], shape[2], shape[3]), layout="HWC")
    normalised = fn.crop_mirror_normalize(
        folded,
        mean=[PIXEL_MEAN * 255] * 3,
        std=[PIXEL_STD * 255] * 3,
        dtype=types.FLOAT16 if spec.half else types.FLOAT,
        output_layout="HWC",
        mirror=mirror,
        pad_output=spec.pad_channels,
    )
    channels = types.Constant(4 if spec.pad_channels else 3, dtype=types.INT64, device="cpu")
    return fn.reshape(normalised, shape=fn.stack(shape[0], shape[1], shape[2], channels), layout="FHWC")


def _log_mel(spec: GraphSpec, pcm: Any, mask: Any) -> Any:
    """(M, F) of 16 kHz PCM: Hann 512, hop 256, uncentred, HTK mel scale with Slaney area norm, ln, normalised."""
    if spec.device_id is not None:
        pcm = pcm.gpu()
    wave = fn.cast(pcm, dtype=types.FLOAT) / 32768.0
    power = fn.spectrogram(
        wave,
        nfft=STFT_WINDOW_SAMPLES,
        window_length=STFT_WINDOW_SAMPLES,
        window_step=STFT_HOP_SAMPLES,
        window_fn=torch.hann_window(STFT_WINDOW_SAMPLES).tolist(),  # DALI's own is shifted by half a sample
        center_windows=False,
        power=2,
    )
    mel = fn.mel_filter_bank(
        power,
        sample_rate=SAMPLE_RATE_HZ,
        nfilter=spec.clip.num_mel_bins,
        freq_low=0.0,
        freq_high=SAMPLE_RATE_HZ / 2,
        mel_formula="htk",
        normalize=True,
    )
    log_mel = (dali_math.log(mel + LOG_EPSILON) - LOG_MEL_MEAN) / LOG_MEL_STD
    return fn.transpose(log_mel * mask, perm=[1, 0])
