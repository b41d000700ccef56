// The operations on CPU tensors by the emulated CUDA kernels: the table that the CPU device asks for is CUDA's.
#include "common.h"

namespace avsf {
const Primitives& cpu_primitives() { return cuda_primitives(); }
}  // namespace avsf
