"""How busy the video decoder of a GPU is while something runs, from NVML."""

import contextlib
import threading
from types import TracebackType
from typing import Any, Self

INTERVAL_S = 0.1


class DecoderLoad:
    """Context that samples the utilisation of NVDEC, in percent of its time.

    Args:
        device: "cuda", "cuda:N" or "cpu" (which has none).

    Attributes:
        percent: Samples so far.
    """

    def __init__(self, device: str) -> None:
        self.percent: list[float] = []
        self._number = -1 if device == "cpu" else int(device.partition(":")[2] or 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def row(self) -> dict[str, Any]:
        """Mean and largest sample, for a result row; empty where there is none."""
        if not self.percent:
            return {}
        mean = sum(self.percent) / len(self.percent)
        return {"nvdec_percent_mean": round(mean, 1), "nvdec_percent_max": round(max(self.percent), 1)}

    def _sample(self) -> None:
        if self._number < 0:
            return
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(self._number)
                while not self._stop.wait(INTERVAL_S):
                    self.percent.append(float(pynvml.nvmlDeviceGetDecoderUtilization(handle)[0]))
