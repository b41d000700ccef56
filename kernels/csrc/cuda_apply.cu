// Application alone: parts of a concat, and norms whose coefficients are known.
#include "cuda_apply.cuh"

namespace avsf {
namespace cuda {
namespace {

template <typename T, int V, bool Norm, int Residual, bool Audio>
__global__ void __launch_bounds__(kThreads, Residual == kNone ? 3 : 2) apply_kernel(const Plan p, const __grid_constant__ ApplyArgs a) {
  apply_block<T, V, Norm, Residual, Audio>(p, place<V>(p), a);
}

template <typename T, int V, bool Norm, int Residual>
void launch(cudaStream_t s, const Plan& p, const Geometry& g, const ApplyArgs& a) {
  if (a.audio) apply_kernel<T, V, Norm, Residual, true><<<grid(p, g), kThreads, 0, s>>>(p, a);
  else apply_kernel<T, V, Norm, Residual, false><<<grid(p, g), kThreads, 0, s>>>(p, a);
  check_launch("apply");
}

}  // namespace

bool wide(const Geometry& g, const ApplyArgs& a) {
  check_rows({&a.x, &a.residual, &a.out});
  return g.channels % kWide == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.out) && aligned(a.coef.data) &&
         aligned(a.residual_coef.data);
}

void apply(void* stream, Type type, const Geometry* geometry, const ApplyArgs* args, int count) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  for (int i = 0; i < count; ++i) {
    const ApplyArgs& a = args[i];
    const Geometry& g = geometry[i];
    by_width(wide(g, a), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const Plan p = make_plan(g, V);
      by_type(type, [&](auto element) {
        using T = decltype(element);
        if (!a.coef.data) launch<T, V, false, kNone>(s, p, g, a);
        else if (!a.residual.data) launch<T, V, true, kNone>(s, p, g, a);
        else if (!a.residual_coef.data) launch<T, V, true, kPlain>(s, p, g, a);
        else launch<T, V, true, kProjected>(s, p, g, a);
      });
    });
  }
}

}  // namespace cuda
}  // namespace avsf
