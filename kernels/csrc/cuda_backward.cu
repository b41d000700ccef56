// Input gradients alone, from sums that are known, and sums over a frame for the audio.
#include "cuda_backward.cuh"

namespace avsf {
namespace cuda {
namespace {

template <typename T, int V, int G, int O>
__global__ void __launch_bounds__(kThreads, 2) input_grad_kernel(const Plan p, const __grid_constant__ BackwardArgs a) {
  const Place q = place<V>(p);
  if (a.totals && q.unit == 0 && q.chunk == 0) {  // one block of each tile also adds the groups
    const int groups = gridDim.x / p.units_per_clip / p.clips_per_group;
    for (int v = q.line; q.active && v < V; v += q.step)
      write_totals(a.sums, groups, p.channels, q.channel + v, a.totals);
  }
  grad_block<T, V, G, O>(p, q, a, a.dy);
}

// out[n, c, t] = sum over the rows of one frame of a kept clip: one block per frame and tile, all its rows.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) frame_sum_kernel(const Plan p, const View dy, const bool* __restrict__ keep,
                                                             T* __restrict__ out) {
  __shared__ float shared[V][kThreads];
  const Place q = place<V>(p);
  float total[V] = {};
  const bool kept = keep == nullptr || keep[q.clip];  // a dropped clip's gradient is zero, whatever dy holds
  if (q.active && kept) {
    const T* from = reinterpret_cast<const T*>(dy.data) + offset<T>(dy, p, q);
    const int step = stride(dy, q);
#pragma unroll 4
    for (int row = q.row; row < q.end; row += q.step, from += step) {
      const Raw<T, V> raw = load_raw<T, V>(from);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += to_float(raw.value[v]);
    }
  }
  add_lines<V>(total, shared, p, q);
  if (q.active && q.line == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      out[(q.clip * p.channels + q.channel + v) * p.units_per_clip + q.frame] = from_float<T>(total[v]);
  }
}

}  // namespace

bool wide(const Geometry& g, const BackwardArgs& a) {
  check_rows({&a.dy, &a.dy2, &a.dz, &a.x, &a.residual, &a.dx, &a.dresidual});
  return g.channels % kWide == 0 && aligned(a.dy) && aligned(a.x) && aligned(a.residual) && aligned(a.dx) &&
         aligned(a.dresidual) && aligned(a.dy2) && aligned(a.dz) && aligned(a.coef.data) &&
         aligned(a.residual_coef.data) && aligned(a.sums);
}

void input_grad(void* stream, Type type, const Geometry& g, const BackwardArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Plan p = make_plan(g, V);
    const bool both = a.dresidual.data, projected = both && a.residual_coef.data;
    by_type(type, [&](auto element) {
      using T = decltype(element);
      const dim3 b = grid(p, g);
      if (!a.relu && projected) input_grad_kernel<T, V, kOpen, kDxAndProjected><<<b, kThreads, 0, s>>>(p, a);
      else if (!a.relu && both) input_grad_kernel<T, V, kOpen, kDxAndDz><<<b, kThreads, 0, s>>>(p, a);
      else if (!a.relu) input_grad_kernel<T, V, kOpen, kDx><<<b, kThreads, 0, s>>>(p, a);
      else if (a.mask && projected) input_grad_kernel<T, V, kFromMask, kDxAndProjected><<<b, kThreads, 0, s>>>(p, a);
      else if (a.mask && both) input_grad_kernel<T, V, kFromMask, kDxAndDz><<<b, kThreads, 0, s>>>(p, a);
      else if (a.mask) input_grad_kernel<T, V, kFromMask, kDx><<<b, kThreads, 0, s>>>(p, a);
      else input_grad_kernel<T, V, kFromX, kDx><<<b, kThreads, 0, s>>>(p, a);
      check_launch("input_grad");
    });
  });
}

void frame_sum(void* stream, Type type, const Geometry& g, View dy, const bool* keep, char* out) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  check_rows({&dy});
  by_width(g.channels % kWide == 0 && aligned(dy), [&](auto width) {
    constexpr int V = decltype(width)::value;
    Plan p = make_plan(g, V);
    const int high = kThreads >> p.lane_bits;
    p.chunks = 1, p.rows_per_chunk = static_cast<int>((p.rows + high - 1) / high * high);
    by_type(type, [&](auto element) {
      using T = decltype(element);
      frame_sum_kernel<T, V><<<grid(p, g), kThreads, 0, s>>>(p, dy, keep, reinterpret_cast<T*>(out));
      check_launch("frame_sum");
    });
  });
}

}  // namespace cuda
}  // namespace avsf
