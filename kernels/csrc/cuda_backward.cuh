// The backward's two passes over a chunk: sums of dz, dz*xhat (and of the projected residual), then input gradients.
#pragma once
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {

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

// Partial results: [unit, chunk, 2 or 3, C] sum dz, sum dz*(x - mean), sum dz*(residual - mean'). With Two the gradient
// is dy + dy2; with Write dz is stored, and the sums are those of the stored, rounded values.
template <typename T, int V, int G, bool Projected, bool Two, bool Write>
__device__ __forceinline__ void reduce_block(const Plan& p, const Place& q, const BackwardArgs& a, float* partial) {
  constexpr int kRows = Projected ? 3 : 2, kStreams = 2 + Projected + Two;
  constexpr int kUnroll = sizeof(T) == 4 ? (kStreams == 2 ? 2 : 1) : (kStreams == 2 ? (G == kFromMask ? 3 : 4) : kStreams == 3 ? 2 : 1);
  __shared__ float shared[V][kThreads];
  float s0[V] = {}, s1[V] = {}, s2[V] = {}, mean[V], scale[V], shift[V], other_mean[V];
  if (q.active) {
    load_params<V>(mean, coef_row(a.coef, 2, p, q));
    if constexpr (G == kFromX) {
      load_params<V>(scale, coef_row(a.coef, 0, p, q));
      load_params<V>(shift, coef_row(a.coef, 1, p, q));
    }
    if constexpr (Projected) load_params<V>(other_mean, coef_row(a.residual_coef, 2, p, q));
    const T* dy = reinterpret_cast<const T*>(a.dy.data) + offset<T>(a.dy, p, q);
    const T* dy2 = Two ? reinterpret_cast<const T*>(a.dy2.data) + offset<T>(a.dy2, p, q) : nullptr;
    const T* x = reinterpret_cast<const T*>(a.x.data) + offset<T>(a.x, p, q);
    const T* r = Projected ? reinterpret_cast<const T*>(a.residual.data) + offset<T>(a.residual, p, q) : nullptr;
    T* out = Write ? reinterpret_cast<T*>(a.dz.data) + offset<T>(a.dz, p, q) : nullptr;
    const int step_dy = stride(a.dy, q), step_dy2 = stride(a.dy2, q), step_x = stride(a.x, q);
    const int step_r = stride(a.residual, q), step_out = stride(a.dz, q);
    for (int row = q.row; row < q.end; row += kUnroll * q.step) {
      Raw<T, V> raw_dy[kUnroll], raw_dy2[kUnroll], raw_x[kUnroll], raw_r[kUnroll];
      uint32_t bits[kUnroll] = {};
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (row + i * q.step < q.end) {
          raw_dy[i] = Write ? load_last<T, V>(dy + i * step_dy) : load_raw<T, V>(dy + i * step_dy);
          if constexpr (Two) raw_dy2[i] = load_last<T, V>(dy2 + i * step_dy2);
          raw_x[i] = load_raw<T, V>(x + i * step_x);
          if constexpr (Projected) raw_r[i] = load_raw<T, V>(r + i * step_r);
          if constexpr (G == kFromMask) bits[i] = load_mask<V>(a.mask, p, q, row + i * q.step);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (row + i * q.step < q.end) {
          Raw<T, V> rounded;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float value = to_float(raw_x[i].value[v]);
            float dz = to_float(raw_dy[i].value[v]);
            if constexpr (Two) dz += to_float(raw_dy2[i].value[v]);
            dz = gated<V, G>(dz, value, scale[v], shift[v], bits[i], v);
            if constexpr (Write) {
              rounded.value[v] = from_float<T>(dz);
              dz = to_float(rounded.value[v]);
            }
            s0[v] += dz;
            s1[v] = fmaf(dz, value - mean[v], s1[v]);
            if constexpr (Projected) s2[v] = fmaf(dz, to_float(raw_r[i].value[v]) - other_mean[v], s2[v]);
          }
          if constexpr (Write) store_raw<T, V>(out + i * step_out, rounded);
        }
      }
      dy += kUnroll * step_dy, x += kUnroll * step_x;
      if constexpr (Two) dy2 += kUnroll * step_dy2;
      if constexpr (Projected) r += kUnroll * step_r;
      if constexpr (Write) out += kUnroll * step_out;
    }
  }
  add_lines<V>(s0, shared, p, q);
  add_lines<V>(s1, shared, p, q);
  if constexpr (Projected) add_lines<V>(s2, shared, p, q);
  if (q.active && q.line == 0) {
    float* to = partial + (static_cast<int64_t>(q.unit) * p.chunks + q.chunk) * kRows * p.channels + q.channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] = s0[v], to[p.channels + v] = s1[v];
      if constexpr (Projected) to[2 * p.channels + v] = s2[v];
    }
  }
}

// dx = scale*dz + slope*(x - mean) + offset
template <int V>
struct Line {
  float scale[V], mean[V], slope[V], offset[V];
  __device__ __forceinline__ void load(const Coef& coef, const float* sums, int which, const Plan& p, const Place& q) {
    load_params<V>(scale, coef_row(coef, 0, p, q));
    load_params<V>(mean, coef_row(coef, 2, p, q));
    const float* sum = sums + q.group * 3 * p.channels + q.channel;
    float slope_sum[V], inverse_count[V];
    load_params<V>(slope, coef_row(coef, 3, p, q));  // invstd
    load_params<V>(inverse_count, coef_row(coef, 4, p, q));
    load_params<V>(slope_sum, sum + which * p.channels);
    load_params<V>(offset, sum);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      slope[v] = -scale[v] * slope[v] * slope_sum[v] * inverse_count[v];
      offset[v] = -scale[v] * offset[v] * inverse_count[v];
    }
  }
  __device__ __forceinline__ float operator()(float dz, float x, int v) const {
    return fmaf(dz, scale[v], fmaf(slope[v], x - mean[v], offset[v]));
  }
};

// The parameters' gradients of one channel: its sums over the groups, in their order.
__device__ __forceinline__ void write_totals(const float* sums, int groups, int64_t channels, int64_t channel, float* totals) {
  for (int row = 0; row < 3; ++row) {
    double total = 0;
    for (int group = 0; group < groups; ++group) total += __ldcg(sums + (group * 3ll + row) * channels + channel);
    totals[row * channels + channel] = static_cast<float>(total);
    if (row == 0) totals[3 * channels + channel] = static_cast<float>(total);
  }
}

enum Out : int { kDx = 0, kDxAndDz = 1, kDxAndProjected = 2 };

template <typename T, int V, int G, int O>
__device__ __forceinline__ void grad_block(const Plan& p, const Place& q, const BackwardArgs& a, const View& gradient) {
  // Two lines of coefficients leave no registers for more than one row.
  constexpr int kUnroll = O == kDxAndProjected ? 1 : (O == kDx && sizeof(T) == 2 ? 3 : 2);
  if (!q.active) return;
  Line<V> line, other;
  float shift[V];
  line.load(a.coef, a.sums, 1, p, q);
  if constexpr (G == kFromX) load_params<V>(shift, coef_row(a.coef, 1, p, q));
  if constexpr (O == kDxAndProjected) other.load(a.residual_coef, a.sums, 2, p, q);
  const T* dy = reinterpret_cast<const T*>(gradient.data) + offset<T>(gradient, p, q);
  const T* x = reinterpret_cast<const T*>(a.x.data) + offset<T>(a.x, p, q);
  const T* r = O == kDxAndProjected ? reinterpret_cast<const T*>(a.residual.data) + offset<T>(a.residual, p, q) : nullptr;
  T* dx = reinterpret_cast<T*>(a.dx.data) + offset<T>(a.dx, p, q);
  T* dr = O != kDx ? reinterpret_cast<T*>(a.dresidual.data) + offset<T>(a.dresidual, p, q) : nullptr;
  const int step_dy = stride(gradient, q), step_x = stride(a.x, q), step_r = stride(a.residual, q);
  const int step_dx = stride(a.dx, q), step_dr = stride(a.dresidual, q);
  for (int row = q.row; row < q.end; row += kUnroll * q.step) {
    Raw<T, V> raw_dy[kUnroll], raw_x[kUnroll], raw_r[kUnroll];
    uint32_t bits[kUnroll] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (row + i * q.step < q.end) {
        raw_dy[i] = load_last<T, V>(dy + i * step_dy);
        raw_x[i] = load_last<T, V>(x + i * step_x);
        if constexpr (O == kDxAndProjected) raw_r[i] = load_last<T, V>(r + i * step_r);
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
        store_floats<T, V>(dx + i * step_dx, gx);
        if constexpr (O != kDx) store_floats<T, V>(dr + i * step_dr, gr);
      }
    }
    dy += kUnroll * step_dy, x += kUnroll * step_x, dx += kUnroll * step_dx;
    if constexpr (O == kDxAndProjected) r += kUnroll * step_r;
    if constexpr (O != kDx) dr += kUnroll * step_dr;
  }
}

}  // namespace cuda
}  // namespace avsf
