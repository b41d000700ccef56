"""NVDEC through PyNvVideoCodec: one decoder that lives on, a clip in one call, planes of its own in device memory.

The library is NVIDIA's, an optional package (`pip install 'avslowfast-dali[nvdec]'`), imported where a GPU is: it needs
the driver's libnvcuvid and libnvidia-encode. Names and types here are those of its compiled module, version 2.2.4.
"""

import ctypes
import functools
import logging
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.media.annexb import AnnexB
from pipeline.nvdec.decoder import ClipPlanes, DecodeError, StreamKind, check_count
from pipeline.nvdec.pool import DecoderPool

PACKAGE = "PyNvVideoCodec"
CODECS = ("h264",)  # what a clip can be handed over in one call: a VP9 stream has no start codes to part pictures by
NUM_THREADS = 8  # sessions at once: the best number on an H200, whose 7 engines they share
MIN_PX = 128  # in both dimensions; NVDEC refuses smaller pictures


@functools.cache
def why_not(device_id: int) -> str:
    """Return why NVDEC cannot be used here, in words; empty where it can.

    Args:
        device_id: CUDA device.
    """
    if not torch.cuda.is_available():  # asked first: the library ends the process where the driver refuses it
        return "there is no CUDA device"
    try:
        library = _library()
        caps = library.GetDecoderCaps(gpuid=device_id, codec=library.cudaVideoCodec.H264)
    except ImportError as error:
        return f"package {PACKAGE} (missing: {error}) must be installed; pip install PyNvVideoCodec"
    except Exception as error:
        # No libnvcuvid, an old driver, or no engine: the library raises errors of several kinds.
        return f"{PACKAGE}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    return "" if caps.get("num_decoder_engines", 1) else "this GPU has no decoder engine"


@functools.cache
def _library() -> Any:
    logging.disable(logging.INFO)  # it reports its versions to the root logger
    try:
        import PyNvVideoCodec  # type: ignore[import-not-found,unused-ignore]
    finally:
        logging.disable(logging.NOTSET)

    return PyNvVideoCodec


class HardwareDecoder:
    """One NVDEC session on a stream of its own; belongs to one thread.

    Pictures lie in memory of the session until the next call, so the wanted ones are copied on the session's stream,
    behind which `ClipPlanes.ready` is recorded: nothing waits on the host.

    Args:
        kind: Streams that it takes.
        device_id: CUDA device.

    Raises:
        DecodeError: NVDEC refuses such streams.
    """

    def __init__(self, kind: StreamKind, device_id: int = 0) -> None:
        if kind.codec not in CODECS or min(kind.width, kind.height) < MIN_PX:
            raise DecodeError(f"stream ({kind}) must be of {CODECS} and at least {MIN_PX}x{MIN_PX} px")
        self._kind, self._device = kind, torch.device("cuda", device_id)
        library = self._library = _library()
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)
            try:
                self._decoder = library.CreateDecoder(
                    gpuid=device_id,
                    codec=library.cudaVideoCodec.H264,
                    cudacontext=_current_context(),
                    cudastream=self._stream.cuda_stream,
                    usedevicememory=True,
                    maxwidth=kind.width,
                    maxheight=kind.height,
                    latency=library.DisplayDecodeLatencyType.NATIVE,  # LOW and ZERO are for streams without B-frames
                )
            except Exception as error:
                raise DecodeError(f"NVDEC session for {kind}: {error}") from error

    def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        """See StreamDecoder."""
        width, height = self._kind.width, self._kind.height
        numbers = wanted.tolist()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pictures = torch.empty((len(numbers), height * 3 // 2, width), dtype=torch.uint8, device=self._device)
            decoded = 0
            try:
                decoded = self._take(stream.data.ctypes.data, len(stream.data), pictures, numbers, decoded)
                if decoded < stream.num_frames:  # the parser kept the last ones back
                    decoded = self._take(0, 0, pictures, numbers, decoded)
            except DecodeError:
                raise
            except Exception as error:
                raise DecodeError(f"{type(error).__name__}: {error}") from error
            check_count(decoded, stream, numbers)
            shape = (len(numbers), height // 2, width // 2, 2)
            luma = pictures[:, :height].contiguous().view(len(numbers), height, width, 1)
            chroma = pictures[:, height:].contiguous().view(shape)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return ClipPlanes(luma, chroma, ready)

    def _take(self, address: int, size: int, pictures: Tensor, numbers: list[int], decoded: int) -> int:
        """Hand bytes over, to the end of the stream, and copy the wanted pictures that come out.

        Args:
            address: Of the first byte; 0 with size 0 asks for the rest.
            size: Bytes.
            pictures: (T, H * 3 / 2, W) uint8, NV12: filled where a wanted picture came out.
            numbers: T wanted numbers.
            decoded: Pictures that came out before.

        Returns:
            Pictures that have come out so far.
        """
        packet = self._library.PacketData()
        packet.bsl_data, packet.bsl, packet.pts = address, size, 0
        packet.decode_flag = int(self._library.VideoPacketFlag.ENDOFSTREAM)
        frames = self._decoder.Decode(packet)
        end = decoded + len(frames)
        slots = [slot for slot, number in enumerate(numbers) if decoded <= number < end]
        if slots:  # numbers do not fall, so their slots are neighbours
            chosen = {number: self._surface(frames[number - decoded]) for number in {numbers[s] for s in slots}}
            torch.stack([chosen[numbers[slot]] for slot in slots], out=pictures[slots[0] : slots[-1] + 1])
        return end

    def _surface(self, frame: Any) -> Tensor:
        """Return a picture as a view (H * 3 / 2, W) of the session's memory, which this stream may read."""
        capsule = frame.__dlpack__(stream=self._stream.cuda_stream)  # its own arguments: newer ones it does not know
        surface: Tensor = torch.from_dlpack(capsule)
        shape = (self._kind.height * 3 // 2, self._kind.width)
        if tuple(surface.shape) not in (shape, (*shape, 1)):
            raise DecodeError(f"picture {tuple(surface.shape)} must be NV12 of {self._kind}, {shape}")
        return surface.view(shape)

    def close(self) -> None:
        """See StreamDecoder."""
        self._stream.synchronize()
        del self._decoder


def open_pool(device_id: int, num_threads: int, deadline_s: float) -> DecoderPool:
    """Start threads whose decoders are NVDEC's.

    Args:
        device_id: CUDA device.
        num_threads: Sessions at once; see NUM_THREADS.
        deadline_s: Longest wait for one clip.
    """
    return DecoderPool(lambda kind: HardwareDecoder(kind, device_id), num_threads, deadline_s=deadline_s)


def _current_context() -> int:
    """Handle of the CUDA context that torch uses on the current device."""
    torch.cuda.current_stream().synchronize()  # makes the context current in this thread
    handle = ctypes.c_void_p()
    code = ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(handle))
    if code or not handle.value:
        raise DecodeError(f"CUDA context (error {code}) must be current in this thread")
    return handle.value
