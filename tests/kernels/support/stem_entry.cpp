// The emulated stem kernels as C functions.
#include <cstdio>
#include <exception>

#include "stem.h"

namespace {

avsf::StemArgs arguments(void* x, void* y, void* weight, const int64_t* strides, int weight_type, void* work) {
  avsf::StemArgs a;
  a.x = {static_cast<char*>(x), strides[0], strides[1]};
  a.y = {static_cast<char*>(y), strides[2], strides[3]};
  a.weight.data = static_cast<char*>(weight), a.weight.type = static_cast<avsf::Type>(weight_type);
  for (int i = 0; i < 5; ++i) a.weight.stride[i] = strides[4 + i];
  a.work = static_cast<char*>(work);
  return a;
}

}  // namespace

// sizes: clips, frames, height, width. strides: clip and pixel of x, of y, then the weight's five.
extern "C" __attribute__((visibility("default"))) int64_t stem_scratch(int slow, const int64_t* sizes, int gradient) {
  const avsf::StemGeometry g = {sizes[0], sizes[1], sizes[2], sizes[3], (sizes[2] + 1) / 2, (sizes[3] + 1) / 2};
  return (slow ? avsf::cuda_slow_stem() : avsf::cuda_stem()).scratch(g, gradient != 0);
}

extern "C" __attribute__((visibility("default"))) int stem_run(int slow, int gradient, int type, const int64_t* sizes, void* x, void* y,
                                                               void* weight, const int64_t* strides, int weight_type,
                                                               void* work) {
  const avsf::StemGeometry g = {sizes[0], sizes[1], sizes[2], sizes[3], (sizes[2] + 1) / 2, (sizes[3] + 1) / 2};
  const avsf::StemArgs a = arguments(x, y, weight, strides, weight_type, work);
  try {
    const avsf::StemPrimitives& p = slow ? avsf::cuda_slow_stem() : avsf::cuda_stem();
    (gradient ? p.weight_grad : p.forward)(nullptr, static_cast<avsf::Type>(type), g, a);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
