"""What the machine does while a run goes: CPU, memory of all processes, GPU load, memory, power, decoder and clocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psutil

_GIB = 2**30


class SystemSampler:
    """Reports metrics of the machine from a daemon thread until stopped.

    Args:
        report: called with name -> value, from that thread.
        interval_s: seconds between two calls; 0 = never.
    """

    def __init__(self, report: Callable[[Mapping[str, float]], None], interval_s: float) -> None:
        self._report, self._interval_s = report, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._gpus = _open_gpus() if interval_s > 0 else []
        self.peak_rss_gib = 0.0

    def start(self) -> SystemSampler:
        """Start the thread unless the interval is 0; return self."""
        if self._interval_s > 0:
            psutil.cpu_percent()
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._report(self.sample())

    def sample(self) -> dict[str, float]:
        """Return one reading; what the machine cannot tell is left out."""
        rss = tree_rss_gib()
        self.peak_rss_gib = max(self.peak_rss_gib, rss)
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
            "system/processes_rss_gib": rss,
        }
        for index, gpu in enumerate(self._gpus):
            values.update({f"system/gpu_{index}_{k}": v for k, v in _read_gpu(gpu).items()})
        return values


def tree_rss_gib() -> float:
    """Return the resident memory of this process and its children in GiB."""
    total = 0
    process = psutil.Process()
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += member.memory_info().rss
    return total / _GIB


def _open_gpus() -> list[Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no driver, no NVML, no package: the machine has no GPU to report on
        return []


def _read_gpu(gpu: Any) -> dict[str, float]:
    import pynvml as nv

    readings: dict[str, Callable[[], float]] = {
        "utilization_percentage": lambda: nv.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_usage_gib": lambda: nv.nvmlDeviceGetMemoryInfo(gpu).used / _GIB,
        "power_usage_watts": lambda: nv.nvmlDeviceGetPowerUsage(gpu) / 1000.0,
        "decoder_percentage": lambda: nv.nvmlDeviceGetDecoderUtilization(gpu)[0],
        "sm_clock_mhz": lambda: nv.nvmlDeviceGetClockInfo(gpu, nv.NVML_CLOCK_SM),
        "pcie_rx_mib_s": lambda: nv.nvmlDeviceGetPcieThroughput(gpu, nv.NVML_PCIE_UTIL_RX_BYTES) / 1024.0,
    }
    values = {}
    for name, read in readings.items():
        with contextlib.suppress(nv.NVMLError):
            values[name] = float(read())
    return values
