// Backward: sums of dz, dz*xhat (and of the projected residual), input gradients, and sums over a frame for the audio.
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {
namespace {

enum Gate : int { kOpen = 0, kFromX = 1, kFromMask = 2 };  // where dz = dy: everywhere, by the sign of x*scale + shift, by bits
template <int V>
__device__ __forceinline__ uint32_t load_mask(const uint8_t* mask, const Plan& p, const Place& q, int64_t row) {
  const uint8_t byte = mask[(q.unit * p.rows + row) * p.mask_row + q.channel / 8];
  return V == kWide ? byte : byte >> (q.channel % 8);
}

template <int V, int G>
__device__ __forceinline__ float gated(float dy, float x, float scale, float shift, uint32_t bits, int v) {
  if constexpr (G == kOpen) return dy;
  if constexpr (G == kFromMask) return (bits >> v) & 1 ? dy : 0.0f;
  return fmaf(x, scale, shift) <= 0.0f ? 0.0f : dy;
}

// Adds the rows of a block in a fixed order; line 0 holds the result.
template <int V>
__device__ __forceinline__ void add_lines(float (&value)[V], float (*shared)[kThreads], const Plan& p, const Place& q) {
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) shared[v][threadIdx.x] = value[v];
  for (int half = q.step >> 1; half > 0; half >>= 1) {
    __syncthreads();
    if (q.line < half) {
#pragma unroll
      for (int v = 0; v < V; ++v) shared[v][threadIdx.x] += shared[v][threadIdx.x + (half << p.lane_bits)];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) value[v] = shared[v][threadIdx.x];
}

// Partial results: [unit, chunk, 3, C] sum dz, sum dz*(x - mean), sum dz*(residual - mean').
template <typename T, int V, int G, bool Projected>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const Plan p, const __grid_constant__ BackwardArgs a, float* __restrict__ partial) {
  constexpr int kUnroll = 2;
  __shared__ float shared[V][kThreads];
  const Place q = place<V>(p);
  float s0[V] = {}, s1[V] = {}, s2[V] = {}, mean[V], scale[V], shift[V], other_mean[V];
  if (q.active) {
    load_params<V>(mean, coef_row(a.coef, 2, p, q));
    if constexpr (G == kFromX) {
      load_params<V>(scale, coef_row(a.coef, 0, p, q));
      load_params<V>(shift, coef_row(a.coef, 1, p, q));
    }
    if constexpr (Projected) load_params<V>(other_mean, coef_row(a.residual_coef, 2, p, q));
    const T* dy = reinterpret_cast<const T*>(a.dy.data) + offset<T>(a.dy, p, q);
    const T* x = reinterpret_cast<const T*>(a.x.data) + offset<T>(a.x, p, q);
    const T* r = Projected ? reinterpret_cast<const T*>(a.residual.data) + offset<T>(a.residual, p, q) : nullptr;
    for (int64_t row = q.row; row < q.end; row += kUnroll * q.step) {
      Raw<T, V> raw_dy[kUnroll], raw_x[kUnroll], raw_r[kUnroll];
      uint32_t bits[kUnroll] = {};
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (row + i * q.step < q.end) {
          raw_dy[i] = load_raw<T, V>(dy + i * q.step * a.dy.row);
          raw_x[i] = load_raw<T, V>(x + i * q.step * a.x.row);
          if constexpr (Projected) raw_r[i] = load_raw<T, V>(r + i * q.step * a.residual.row);
          if constexpr (G == kFromMask) bits[i] = load_mask<V>(a.mask, p, q, row + i * q.step);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (row + i * q.step < q.end) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float value = to_float(raw_x[i].value[v]);
            const float dz = gated<V, G>(to_float(raw_dy[i].value[v]), value, scale[v], shift[v], bits[i], v);
            s0[v] += dz;
            s1[v] = fmaf(dz, value - mean[v], s1[v]);
            if constexpr (Projected) s2[v] = fmaf(dz, to_float(raw_r[i].value[v]) - other_mean[v], s2[v]);
          }
        }
      }
      dy += kUnroll * q.step * a.dy.row, x += kUnroll * q.step * a.x.row;
      if constexpr (Projected) r += kUnroll * q.step * a.residual.row;
    }
  }
  add_lines<V>(s0, shared, p, q);
  add_lines<V>(s1, shared, p, q);
  if constexpr (Projected) add_lines<V>(s2, shared, p, q);
  if (q.active && q.line == 0) {
    float* to = partial + (static_cast<int64_t>(q.unit) * p.chunks + q.chunk) * 3 * p.channels + q.channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] = s0[v], to[p.channels + v] = s1[v];
      to[2 * p.channels + v] = Projected ? s2[v] : 0.0f;
    }
  }
}

constexpr int kCombineLines = 16;

__global__ void combine_sums_kernel(const Plan p, int parts, const float* __restrict__ partial, const Coef coef,
                                    const Coef other, float* __restrict__ sums) {
  __shared__ double shared[kCombineLines][32];
  const int64_t channel = blockIdx.x * 32ll + threadIdx.x, group = blockIdx.y;
  const int which = blockIdx.z;
  double total = 0;
  if (channel < p.channels)
    for (int i = threadIdx.y; i < parts; i += kCombineLines)
      total += partial[((group * parts + i) * 3 + which) * p.channels + channel];
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && channel < p.channels) {
    for (int i = 1; i < kCombineLines; ++i) total += shared[i][threadIdx.x];
    const Coef& c = which == 2 ? other : coef;
    if (which && c.data)  // invstd turns sum dz*(x - mean) into sum dz*xhat
      total *= c.data[3 * c.plane + (c.plane == p.channels ? 0 : group) * p.channels + channel];
    sums[(group * 3 + which) * p.channels + channel] = static_cast<float>(total);
  }
}

// dx = scale*dz + slope*(x - mean) + offset
template <int V>
struct Line {
  float scale[V], mean[V], slope[V], offset[V];
  __device__ __forceinline__ void load(const Coef& coef, const float* sums, int which, const Plan& p, const Place& q) {
    load_params<V>(scale, coef_row(coef, 0, p, q));
    load_params<V>(mean, coef_row(coef, 2, p, q));
    const float *invstd = coef_row(coef, 3, p, q), *inverse_count = coef_row(coef, 4, p, q);
    const float* sum = sums + q.group * 3 * p.channels + q.channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      slope[v] = -scale[v] * invstd[v] * sum[which * p.channels + v] * inverse_count[v];
      offset[v] = -scale[v] * sum[v] * inverse_count[v];
    }
  }
  __device__ __forceinline__ float operator()(float dz, float x, int v) const {
    return fmaf(dz, scale[v], fmaf(slope[v], x - mean[v], offset[v]));
  }
};

enum Out : int { kDx = 0, kDxAndDz = 1, kDxAndProjected = 2 };

template <typename T, int V, int G, int O>
__global__ void __launch_bounds__(kThreads, 2) input_grad_kernel(const Plan p, const __grid_constant__ BackwardArgs a) {
  constexpr int kUnroll = O == kDxAndProjected ? 1 : 2;  // two lines of coefficients leave no registers for more
  const Place q = place<V>(p);
  if (!q.active) return;
  Line<V> line, other;
  float shift[V];
  line.load(a.coef, a.sums, 1, p, q);
  if constexpr (G == kFromX) load_params<V>(shift, coef_row(a.coef, 1, p, q));
  if constexpr (O == kDxAndProjected) other.load(a.residual_coef, a.sums, 2, p, q);
  const T* dy = reinterpret_cast<const T*>(a.dy.data) + offset<T>(a.dy, p, q);
  const T* x = reinterpret_cast<const T*>(a.x.data) + offset<T>(a.x, p, q);
  const T* r = O == kDxAndProjected ? reinterpret_cast<const T*>(a.residual.data) + offset<T>(a.residual, p, q) : nullptr;
  T* dx = reinterpret_cast<T*>(a.dx.data) + offset<T>(a.dx, p, q);
  T* dr = O != kDx ? reinterpret_cast<T*>(a.dresidual.data) + offset<T>(a.dresidual, p, q) : nullptr;
  for (int64_t row = q.row; row < q.end; row += kUnroll * q.step) {
    Raw<T, V> raw_dy[kUnroll], raw_x[kUnroll], raw_r[kUnroll];
    uint32_t bits[kUnroll] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (row + i * q.step < q.end) {
        raw_dy[i] = load_raw<T, V>(dy + i * q.step * a.dy.row);
        raw_x[i] = load_raw<T, V>(x + i * q.step * a.x.row);
        if constexpr (O == kDxAndProjected) raw_r[i] = load_raw<T, V>(r + i * q.step * a.residual.row);
        if constexpr (G == kFromMask) bits[i] = load_mask<V>(a.mask, p, q, row + i * q.step);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (row + i * q.step < q.end) {
        float gx[V], gr[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float value = to_float(raw_x[i].value[v]);
          const float dz = gated<V, G>(to_float(raw_dy[i].value[v]), value, line.scale[v], shift[v], bits[i], v);
          gx[v] = line(dz, value, v);
          if constexpr (O == kDxAndDz) gr[v] = dz;
          if constexpr (O == kDxAndProjected) gr[v] = other(dz, to_float(raw_r[i].value[v]), v);
        }
        store_floats<T, V>(dx + i * q.step * a.dx.row, gx);
        if constexpr (O != kDx) store_floats<T, V>(dr + i * q.step * a.dresidual.row, gr);
      }
    }
    dy += kUnroll * q.step * a.dy.row, x += kUnroll * q.step * a.x.row, dx += kUnroll * q.step * a.dx.row;
    if constexpr (O == kDxAndProjected) r += kUnroll * q.step * a.residual.row;
    if constexpr (O != kDx) dr += kUnroll * q.step * a.dresidual.row;
  }
}

// out[n, c, t] = keep[n] * sum over the rows of one frame: one block per frame and tile, all its rows.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) frame_sum_kernel(const Plan p, const View dy, const float* __restrict__ keep,
                                                             T* __restrict__ out) {
  __shared__ float shared[V][kThreads];
  const Place q = place<V>(p);
  float total[V] = {};
  const float factor = keep ? keep[q.clip] : 1.0f;
  if (q.active && factor != 0.0f) {
    const T* from = reinterpret_cast<const T*>(dy.data) + offset<T>(dy, p, q);
    const int64_t step = q.step * dy.row;
#pragma unroll 4
    for (int64_t row = q.row; row < q.end; row += q.step, from += step) {
      const Raw<T, V> raw = load_raw<T, V>(from);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += to_float(raw.value[v]);
    }
  }
  add_lines<V>(total, shared, p, q);
  if (q.active && q.line == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      out[(q.clip * p.channels + q.channel + v) * p.units_per_clip + q.frame] = from_float<T>(total[v] * factor);
  }
}

bool wide(const Geometry& g, const BackwardArgs& a) {
  return g.channels % kWide == 0 && aligned(a.dy) && aligned(a.x) && aligned(a.residual) && aligned(a.dx) &&
         aligned(a.dresidual);
}

}  // namespace

void reduce(void* stream, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Plan p = make_plan(g, V);
    const bool projected = a.residual_coef.data;
    by_type(type, [&](auto element) {
      using T = decltype(element);
      const dim3 b = grid(p, g);
      if (!a.relu && projected) reduce_kernel<T, V, kOpen, true><<<b, kThreads, 0, s>>>(p, a, work);
      else if (!a.relu) reduce_kernel<T, V, kOpen, false><<<b, kThreads, 0, s>>>(p, a, work);
      else if (a.mask && projected) reduce_kernel<T, V, kFromMask, true><<<b, kThreads, 0, s>>>(p, a, work);
      else if (a.mask) reduce_kernel<T, V, kFromMask, false><<<b, kThreads, 0, s>>>(p, a, work);
      else reduce_kernel<T, V, kFromX, false><<<b, kThreads, 0, s>>>(p, a, work);
      check_launch("reduce");
    });
    const dim3 blocks(static_cast<unsigned>((g.channels + 31) / 32), static_cast<unsigned>(g.groups), 3);
    const int parts = static_cast<int>(g.units / g.groups * p.chunks);
    combine_sums_kernel<<<blocks, dim3(32, kCombineLines), 0, s>>>(p, parts, work, a.coef, a.residual_coef, a.sums);
    check_launch("combine_sums");
  });
}

void input_grad(void* stream, Type type, const Geometry& g, const BackwardArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Plan p = make_plan(g, V);
    const bool projected = a.residual_coef.data, both = a.dresidual.data;
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

void frame_sum(void* stream, Type type, const Geometry& g, View dy, const float* keep, char* out) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
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
