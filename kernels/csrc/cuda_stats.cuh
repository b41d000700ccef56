// Statistics of one chunk, and what is made of statistics. Included by the kernels that measure and by the small ones.
#pragma once
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {

// Rounding may leave a sum of squares below zero. Not fmax, which makes a zero of NaN: an overflow must show.
template <typename F>
__device__ __forceinline__ F not_negative(F value) {
  return value < F(0) ? F(0) : value;
}

// Partial results: [unit, chunk, 2, C] mean and sum of squared deviations of the chunk's rows. A thread sums around the
// mean of its rows so far, at first around its first value: at most kSegment rows depend on how good a centre that is.
template <typename T, int V>
__device__ __forceinline__ void stats_block(const Plan& p, const Place& q, const View& x, float* partial) {
  constexpr int kUnroll = 4, kSegment = 16;
  __shared__ float means[V][kThreads], squares[V][kThreads];
  __shared__ float counts[kThreads];
  float mean[V] = {}, deviation[V] = {};
  int count = 0;
  if (q.active && q.row < q.end) {
    const T* from = reinterpret_cast<const T*>(x.data) + offset<T>(x, p, q);
    const int step = stride(x, q);
    const Raw<T, V> first = load_raw<T, V>(from);
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] = to_float(first.value[v]);
    count = (q.end - q.row + q.step - 1) / q.step;
    for (int start = 0; start < count; start += kSegment) {
      const int some = min(kSegment, count - start);
      float sum[V] = {}, square[V] = {};
      int done = 0;
      for (; done + kUnroll <= some; done += kUnroll) {
        Raw<T, V> raw[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) raw[i] = load_raw<T, V>(from + i * step);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float d = to_float(raw[i].value[v]) - mean[v];
            sum[v] += d;
            square[v] = fmaf(d, d, square[v]);
          }
        from += kUnroll * step;
      }
      for (; done < some; ++done, from += step) {
        const Raw<T, V> raw = load_raw<T, V>(from);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float d = to_float(raw.value[v]) - mean[v];
          sum[v] += d;
          square[v] = fmaf(d, d, square[v]);
        }
      }
      const float inverse = 1.0f / static_cast<float>(some);
      const float share = static_cast<float>(some) / static_cast<float>(start + some), before = static_cast<float>(start);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float delta = sum[v] * inverse;
        deviation[v] += not_negative(fmaf(-delta, sum[v], square[v])) + delta * delta * (before * share);
        mean[v] = fmaf(delta, share, mean[v]);
      }
    }
  }
  const float n = static_cast<float>(count);
#pragma unroll
  for (int v = 0; v < V; ++v) means[v][threadIdx.x] = mean[v], squares[v][threadIdx.x] = deviation[v];
  counts[threadIdx.x] = n;
  for (int half = q.step >> 1; half > 0; half >>= 1) {
    __syncthreads();
    const int other = threadIdx.x + (half << p.lane_bits);
    const bool merges = q.line < half && counts[min(other, kThreads - 1)] > 0.0f;
    const float a = counts[threadIdx.x], b = merges ? counts[other] : 0.0f;
    if (merges) {
      const float share = b / (a + b);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float delta = means[v][other] - means[v][threadIdx.x];
        means[v][threadIdx.x] = fmaf(delta, share, means[v][threadIdx.x]);
        squares[v][threadIdx.x] += fmaf(delta * delta, a * share, squares[v][other]);
      }
      counts[threadIdx.x] = a + b;  // read by others only after the next barrier
    }
  }
  if (q.active && q.line == 0) {
    float* to = partial + (static_cast<int64_t>(q.unit) * p.chunks + q.chunk) * 2 * p.channels + q.channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] = means[v][threadIdx.x];
      to[p.channels + v] = squares[v][threadIdx.x];
    }
  }
}

__device__ __forceinline__ void write_coef(const Finish& f, int64_t at, int64_t channel, double mean, double variance,
                                           double inverse_count) {
  const double weight = f.weight ? f.weight[channel] : 1.0, bias = f.bias ? f.bias[channel] : 0.0;
  const float invstd = static_cast<float>(1.0 / sqrt(variance + f.eps));
  const float scale = static_cast<float>(weight * invstd);
  f.coef[at] = scale;
  f.coef[f.plane + at] = static_cast<float>(bias - mean * scale);
  f.coef[2 * f.plane + at] = static_cast<float>(mean);
  f.coef[3 * f.plane + at] = invstd;
  f.coef[4 * f.plane + at] = static_cast<float>(inverse_count);
}

}  // namespace cuda
}  // namespace avsf
