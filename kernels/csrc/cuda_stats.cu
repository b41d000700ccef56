// Statistics: shifted sums per thread, combined by mean and squared deviation in a fixed order; coefficients; running ones.
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {
namespace {

// Rounding may leave a sum of squares below zero. Not fmax, which makes a zero of NaN: an overflow must show.
template <typename F>
__device__ __forceinline__ F not_negative(F value) {
  return value < F(0) ? F(0) : value;
}

// Partial results: [unit, chunk, 2, C] mean and sum of squared deviations of the chunk's rows. A thread sums around the
// mean of its rows so far, at first around its first value: at most kSegment rows depend on how good a centre that is.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3) stats_kernel(const Plan p, const View x, float* __restrict__ partial) {
  constexpr int kUnroll = 4, kSegment = 16;
  __shared__ float means[V][kThreads], squares[V][kThreads];
  __shared__ float counts[kThreads];
  const Place q = place<V>(p);
  float mean[V] = {}, deviation[V] = {};
  int count = 0;
  if (q.active && q.row < q.end) {
    const T* from = reinterpret_cast<const T*>(x.data) + offset<T>(x, p, q);
    const int64_t step = q.step * x.row;
    const Raw<T, V> first = load_raw<T, V>(from);
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] = to_float(first.value[v]);
    count = static_cast<int>((q.end - q.row + q.step - 1) / q.step);
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

constexpr int kCombineLines = 16;

// One block: 32 channels of one group; 16 lines add the partial results in double, in a fixed order.
__global__ void combine_stats_kernel(const Plan p, int units_per_group, const float* __restrict__ partial,
                                     float* __restrict__ stats, const Finish finish) {
  __shared__ double first[kCombineLines][32], second[kCombineLines][32];
  const int64_t channel = blockIdx.x * 32ll + threadIdx.x, group = blockIdx.y;
  const int parts = units_per_group * p.chunks;
  double a = 0, b = 0;
  if (channel < p.channels) {
    for (int i = threadIdx.y; i < parts; i += kCombineLines) {
      const float* from = partial + (group * parts + i) * 2 * p.channels + channel;
      const int64_t row = static_cast<int64_t>(i % p.chunks) * p.rows_per_chunk;
      const double n = static_cast<double>(min(static_cast<int64_t>(p.rows_per_chunk), p.rows - row));
      const double mean = from[0];
      a += n * mean;
      b += from[p.channels] + n * mean * mean;
    }
  }
  first[threadIdx.y][threadIdx.x] = a, second[threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  if (threadIdx.y == 0 && channel < p.channels) {
    for (int i = 1; i < kCombineLines; ++i) a += first[i][threadIdx.x], b += second[i][threadIdx.x];
    const double n = static_cast<double>(p.rows) * units_per_group;
    const double mean = a / n, squares = not_negative(b - a * mean);
    float* to = stats + group * 3 * p.channels + channel;
    to[0] = static_cast<float>(n), to[p.channels] = static_cast<float>(mean);
    to[2 * p.channels] = static_cast<float>(squares);
    if (finish.coef) write_coef(finish, group * p.channels + channel, channel, mean, squares / n, 1.0 / n);
  }
}

__global__ void finalize_kernel(const float* __restrict__ stats, int64_t channels, const Finish finish) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, group = blockIdx.y;
  if (channel >= channels) return;
  const float* from = stats + group * 3 * channels + channel;
  const double n = from[0];
  write_coef(finish, group * channels + channel, channel, from[channels], from[2 * channels] / n, 1.0 / n);
}

__global__ void given_kernel(const float* __restrict__ mean, const float* __restrict__ variance, int64_t channels,
                             const Finish finish) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel < channels) write_coef(finish, channel, channel, mean[channel], variance[channel], 0.0);
}

constexpr int kUpdatesPerLaunch = 80;  // what fits into the 4 KiB of arguments that every driver takes
struct Updates {
  Update item[kUpdatesPerLaunch];
};

__global__ void update_kernel(const __grid_constant__ Updates updates, double momentum) {
  const Update& u = updates.item[blockIdx.y];
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel == 0) ++*u.batches;
  if (channel >= u.channels) return;
  double total = 0, mean = 0, squares = 0;
  for (int64_t g = 0; g < u.groups; ++g) {
    const float* from = u.stats + g * 3 * u.channels + channel;
    const double n = from[0], delta = from[u.channels] - mean;
    squares += from[2 * u.channels] + delta * delta * total * n / (total + n);
    mean += delta * n / (total + n);
    total += n;
  }
  const double variance = squares / fmax(total - 1.0, 1.0);
  u.mean[channel] = static_cast<float>(u.mean[channel] + momentum * (mean - u.mean[channel]));
  u.variance[channel] = static_cast<float>(u.variance[channel] + momentum * (variance - u.variance[channel]));
}

}  // namespace

int64_t scratch(const Geometry& g) {
  const int64_t wide = g.channels % kWide ? 0 : make_plan(g, kWide).chunks;
  return g.units * std::max<int64_t>(wide, make_plan(g, 1).chunks) * 3 * g.channels;
}

void stats(void* stream, Type type, const Geometry& g, View x, float* work, float* out, const Finish* finish) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(g.channels % kWide == 0 && aligned(x), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Plan p = make_plan(g, V);
    by_type(type, [&](auto element) {
      stats_kernel<decltype(element), V><<<grid(p, g), kThreads, 0, s>>>(p, x, work);
      check_launch("stats");
    });
    const dim3 blocks(static_cast<unsigned>((g.channels + 31) / 32), static_cast<unsigned>(g.groups));
    combine_stats_kernel<<<blocks, dim3(32, kCombineLines), 0, s>>>(p, static_cast<int>(g.units / g.groups), work, out,
                                                                    finish ? *finish : Finish{});
    check_launch("combine_stats");
  });
}

void finalize(void* stream, const float* stats, int64_t groups, int64_t channels, const Finish& finish) {
  const dim3 blocks(static_cast<unsigned>((channels + kThreads - 1) / kThreads), static_cast<unsigned>(groups));
  finalize_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(stats, channels, finish);
  check_launch("finalize");
}

void given(void* stream, const float* mean, const float* variance, const float* weight, const float* bias, double eps,
           int64_t channels, float* coef) {
  const Finish finish = {weight, bias, eps, coef, channels};
  const unsigned blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  given_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(mean, variance, channels, finish);
  check_launch("given");
}

void update(void* stream, const Update* updates, int64_t count, double momentum) {
  for (int64_t start = 0; start < count; start += kUpdatesPerLaunch) {
    const int64_t n = std::min<int64_t>(kUpdatesPerLaunch, count - start);
    Updates batch = {};
    int64_t widest = 1;
    for (int64_t i = 0; i < n; ++i) {
      batch.item[i] = updates[start + i];
      widest = std::max(widest, batch.item[i].channels);
    }
    const dim3 blocks(static_cast<unsigned>((widest + kThreads - 1) / kThreads), static_cast<unsigned>(n));
    update_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, momentum);
    check_launch("update");
  }
}

}  // namespace cuda

const Primitives& cuda_primitives() {
  static const Primitives table = {cuda::scratch, cuda::stats,      cuda::finalize,  cuda::given,
                                   cuda::apply,   cuda::reduce,     cuda::input_grad, cuda::frame_sum,
                                   cuda::update,  cuda::pool,       cuda::pool_grad};
  return table;
}

}  // namespace avsf
