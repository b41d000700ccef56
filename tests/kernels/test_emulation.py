"""The emulation of CUDA: it computes what CUDA defines, and shows the mistakes that it is there to show."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.library import fused_devices
from tests.kernels.support import emulation
from tests.kernels.support.cases import samples
from tests.kernels.support.shared import shared_folder

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not emulation.available(), reason="emulation needs a C++ compiler and CUDA's headers"),
]

KERNELS = """
#include "cuda_ptx.cuh"
using namespace avsf::cuda;

__global__ void collectives(int* out) {
  const int lane = threadIdx.x % 32;
  int* to = out + (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  to[0] = __shfl_xor_sync(0xffffffffu, lane * lane, 5);
  to[1] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  to[2] = __shfl_down_sync(0xffffffffu, lane, 4);
  to[3] = __shfl_sync(0xffffffffu, lane + 100, 7);
}

template <bool Barrier>
__global__ void neighbours(const int* in, int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  if (Barrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

template <bool Waits>
__global__ void copies(const float* in, float* out) {
  float* memory = reinterpret_cast<float*>(dynamic_shared());
  copy_async<16>(shared_address(memory + 4 * threadIdx.x), in + 4 * threadIdx.x, threadIdx.x != 1);
  if (Waits) wait_for_copies();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = memory[4 * threadIdx.x + i];
  if (!Waits) wait_for_copies();
}

__global__ void diverges() {
  if (threadIdx.x % 2) __syncthreads();
  else __syncwarp();
}

#define SHOWN extern "C" __attribute__((visibility("default"))) void
SHOWN run_collectives(int* out) { collectives<<<2, 64>>>(out); }
SHOWN run_neighbours(int barrier, const int* in, int* out) {
  if (barrier) neighbours<true><<<dim3(1), 64, 0, nullptr>>>(in, out);
  else neighbours<false><<<1, 64>>>(in, out);
}
SHOWN run_copies(int waits, int bytes, const float* in, float* out) {
  if (waits) copies<true><<<1, 4, bytes>>>(in, out);
  else copies<false><<<1, 4, bytes>>>(in, out);
}
SHOWN run_diverges() { diverges<<<1, 64>>>(); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    source = folder / "kernels.cu"
    source.write_text(KERNELS)
    return emulation.compile_sources([], folder, [source])


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_launches_are_translated() -> None:
    source = "if (a) k<T, V, decltype(e)><<<grid(p, g), 256, 0, s>>>(p, x);\nelse other<<<1, dim3(32, 16)>>>(y);"
    assert emulation.translate(source) == (
        "if (a) emulation::launch(k<T, V, decltype(e)>, grid(p, g), 256, 0, s)(p, x);\n"
        "else emulation::launch(other, 1, dim3(32, 16))(y);"
    )


def test_collectives(library: Path) -> None:
    out = torch.full((2, 2, 32, 4), -1, dtype=torch.int32)
    emulation.load(library).run_collectives(pointer(out))
    lanes = torch.arange(32)
    ballot = sum(1 << i for i in range(0, 32, 3))
    down = torch.where(lanes < 28, lanes + 4, lanes)
    expected = torch.stack([(lanes ^ 5) ** 2, torch.full_like(lanes, ballot), down, torch.full_like(lanes, 107)], 1)
    assert torch.equal(out, expected.int().expand(2, 2, 32, 4))


def test_a_missing_barrier_gives_two_results(library: Path) -> None:
    loaded, given = emulation.load(library), torch.arange(64, dtype=torch.int32)
    results = {}
    for barrier in (1, 0):
        for order in (0, 1):
            loaded.emulation_order(order)
            out = torch.zeros(64, dtype=torch.int32)
            loaded.run_neighbours(barrier, pointer(given), pointer(out))
            results[barrier, order] = out
    assert torch.equal(results[1, 0], given.flip(0))
    assert torch.equal(results[1, 1], given.flip(0))
    assert not torch.equal(results[0, 0], results[0, 1])


def test_a_copy_happens_when_it_is_waited_for(library: Path) -> None:
    loaded, given = emulation.load(library), torch.arange(16.0)
    out = torch.zeros(16)
    loaded.run_copies(1, 64, pointer(given), pointer(out))
    assert torch.equal(out, torch.cat([given[:4], torch.zeros(4), given[8:]]))  # one is told to write zeros
    loaded.run_copies(0, 64, pointer(given), pointer(out))
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("run_diverges()", "no thread can go on"),
        ("run_copies(1, 48, (ctypes.c_float * 16)(), (ctypes.c_float * 16)())", "address beyond shared memory"),
    ],
)
def test_mistakes_end_the_process_and_say_why(call: str, words: str, library: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "CUDA emulation: " in done.stderr
    assert words in done.stderr


@pytest.fixture(scope="session")  # once a process: its operations cannot be registered a second time
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulation.operations(shared_folder(tmp_path_factory, "emulated"))


@pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
@pytest.mark.parametrize("name", list(samples("cpu")) if fused_devices() else ["bn_stats"])
def test_operations_as_the_cpu_computes_them(name: str, emulated: Any) -> None:
    """Every CUDA kernel through its operation, on the samples of all operations, against the library's CPU part."""
    for arguments in samples("cpu")[name]:
        own, other = ([_copied(a) for a in arguments] for _ in range(2))
        results = _tensors(getattr(emulated, name)(*own)), _tensors(getattr(torch.ops.avsf, name)(*other))
        for a, b in zip([*results[0], *_tensors(own)], [*results[1], *_tensors(other)], strict=True):
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            if a.is_floating_point():
                step = torch.finfo(a.dtype).eps
                scale = b.double().abs().max().item() if b.numel() else 0.0
                assert torch.allclose(a.double(), b.double(), rtol=4 * step, atol=max(4 * step, 4e-6) * scale), name
            else:
                assert (a == b).double().mean().item() > 0.995 if a.numel() else True  # signs of nearly nothing


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
