// Where an operation runs: its primitives, the current stream, and on CUDA a guard for the tensor's device.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "common.h"

// A call of torch's C interface; the headers' own macro has another name in every other release.
#define AVSF_TORCH(call) \
  if ((call) != TORCH_SUCCESS) throw std::runtime_error("avsf: " #call " failed")

#ifdef AVSF_WITH_CUDA
// Present in CUDA builds of torch only: weak, so that the library loads under CPU builds too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace avsf {

struct CpuDevice {
  explicit CpuDevice(const torch::stable::Tensor&) {}
  const Primitives& p = cpu_primitives();
  void* stream = nullptr;
};

#ifdef AVSF_WITH_CUDA
struct CudaDevice {
  explicit CudaDevice(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    AVSF_TORCH(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  const Primitives& p = cuda_primitives();
  void* stream = nullptr;
};
#endif

}  // namespace avsf
