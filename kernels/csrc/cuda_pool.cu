// BN + ReLU + max pooling 1x3x3, stride 1,2,2, padding 0,1,1, and the input gradient behind it.
// grid.x = images; the threads of grid.y walk over (pooled position, V channels) of one image. No atomics: each thread
// of the backward owns 2 x 2 input positions and asks the windows that meet them.
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {
namespace {

struct Items {  // of one image
  int height, width, out_height, out_width, channels, vectors, count;
};

struct Spot {  // of one item
  int row, column, channel;
};

template <int V>
Items make_items(const PoolGeometry& g) {
  const int64_t vectors = g.channels / V, count = g.out_height * g.out_width * vectors;
  if (g.height * g.width * g.channels >= (1ll << 31)) throw std::runtime_error("avsf: image too large for max pooling");
  return {static_cast<int>(g.height),    static_cast<int>(g.width),    static_cast<int>(g.out_height),
          static_cast<int>(g.out_width), static_cast<int>(g.channels), static_cast<int>(vectors),
          static_cast<int>(count)};
}

dim3 grid(const Items& items, const PoolGeometry& g) {
  return dim3(static_cast<unsigned>(g.images), static_cast<unsigned>(std::min((items.count + kThreads - 1) / kThreads, 65535)));
}

template <int V>
__device__ __forceinline__ Spot spot(const Items& items, int item) {
  const int position = item / items.vectors;
  return {position / items.out_width, position % items.out_width, (item - position * items.vectors) * V};
}

template <typename T>
__device__ __forceinline__ T* image(const View& v, int images_per_clip, int64_t positions) {
  const int clip = blockIdx.x / images_per_clip, frame = blockIdx.x % images_per_clip;
  return reinterpret_cast<T*>(v.data) + clip * v.clip + frame * positions * v.row;
}

__device__ __forceinline__ const float* group_row(const Coef& coef, int index, const Items& items, int group, int channel) {
  return coef.data + index * coef.plane + (coef.plane == items.channels ? 0 : int64_t{group} * items.channels) + channel;
}

template <int V>
struct alignas(V) Taps {
  uint8_t value[V];
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    maxpool_kernel(const Items items, const int images_per_clip, const int clips_per_group, const __grid_constant__ PoolArgs a) {
  const int group = blockIdx.x / images_per_clip / clips_per_group;
  const T* x = image<const T>(a.x, images_per_clip, int64_t{items.height} * items.width);
  const int64_t positions = int64_t{items.out_height} * items.out_width;
  T* y = image<T>(a.y, images_per_clip, positions);
  for (int item = blockIdx.y * kThreads + threadIdx.x; item < items.count; item += gridDim.y * kThreads) {
    const Spot at = spot<V>(items, item);
    float scale[V], shift[V], best[V] = {}, value[V] = {};
    int tap[V];
    load_params<V>(scale, group_row(a.coef, 0, items, group, at.channel));
    load_params<V>(shift, group_row(a.coef, 1, items, group, at.channel));
#pragma unroll
    for (int v = 0; v < V; ++v) tap[v] = -1;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int row = 2 * at.row - 1 + i;
      if (row < 0 || row >= items.height) continue;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int column = 2 * at.column - 1 + k;
        if (column < 0 || column >= items.width) continue;
        const Raw<T, V> raw = load_raw<T, V>(x + (int64_t{row} * items.width + column) * a.x.row + at.channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float in = to_float(raw.value[v]), z = fmaf(in, scale[v], shift[v]);
          const bool better = tap[v] < 0 || z > best[v] || z != z;  // PyTorch's rule: larger, or NaN
          best[v] = better ? z : best[v], value[v] = better ? in : value[v], tap[v] = better ? 3 * i + k : tap[v];
        }
      }
    }
    Taps<V> taps;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool passes = !(best[v] <= 0.0f);
      best[v] = passes ? best[v] : 0.0f;
      taps.value[v] = static_cast<uint8_t>(passes ? tap[v] : kClosed);
    }
    const int64_t position = int64_t{at.row} * items.out_width + at.column;
    store_floats<T, V>(y + position * a.y.row + at.channel, best);
    if (a.tap == nullptr) continue;
    const int64_t to = (blockIdx.x * positions + position) * items.channels + at.channel;
    store_floats<T, V>(reinterpret_cast<T*>(a.value.data) + to, value);
    *reinterpret_cast<Taps<V>*>(a.tap + to) = taps;
  }
}

// dx = scale*dz + slope*(x - mean) + offset at 2 x 2 input positions.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) maxpool_grad_kernel(const Items items, const int images_per_clip,
                                                                   const int clips_per_group,
                                                                   const __grid_constant__ PoolArgs a) {
  const int group = blockIdx.x / images_per_clip / clips_per_group;
  const int64_t inputs = int64_t{items.height} * items.width, positions = int64_t{items.out_height} * items.out_width;
  const T *x = image<const T>(a.x, images_per_clip, inputs), *dy = image<const T>(a.dy, images_per_clip, positions);
  T* dx = image<T>(a.dx, images_per_clip, inputs);
  const uint8_t* tap = a.tap + blockIdx.x * positions * items.channels;
  for (int item = blockIdx.y * kThreads + threadIdx.x; item < items.count; item += gridDim.y * kThreads) {
    const Spot at = spot<V>(items, item);
    Raw<T, V> given[4];
    Taps<V> taps[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {  // windows (i, j), (i, j+1), (i+1, j), (i+1, j+1)
      const int row = at.row + w / 2, column = at.column + w % 2;
      const bool there = row < items.out_height && column < items.out_width;
      const int64_t position = there ? int64_t{row} * items.out_width + column : 0;
      given[w] = load_raw<T, V>(dy + position * a.dy.row + at.channel);
      taps[w] = *reinterpret_cast<const Taps<V>*>(tap + position * items.channels + at.channel);
#pragma unroll
      for (int v = 0; v < V; ++v) taps[w].value[v] = there ? taps[w].value[v] : kClosed;
    }
    float scale[V], mean[V], slope[V], offset[V];
    load_params<V>(scale, group_row(a.coef, 0, items, group, at.channel));
    load_params<V>(mean, group_row(a.coef, 2, items, group, at.channel));
    load_params<V>(slope, group_row(a.coef, 3, items, group, at.channel));
    load_params<V>(offset, group_row(a.coef, 4, items, group, at.channel));
    const float* sum = a.sums + int64_t{group} * 3 * items.channels + at.channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      slope[v] = -scale[v] * slope[v] * sum[items.channels + v] * offset[v];
      offset[v] = -scale[v] * sum[v] * offset[v];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = 2 * at.row + q / 2, column = 2 * at.column + q % 2;
      if (row >= items.height || column >= items.width) continue;
      const int64_t position = int64_t{row} * items.width + column;
      const Raw<T, V> raw = load_raw<T, V>(x + position * a.x.row + at.channel);
      float out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float dz = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) {  // window w sees this position at row q/2 + 1 - 2*(w/2), and so its column
          const int i = q / 2 + 1 - 2 * (w / 2), k = q % 2 + 1 - 2 * (w % 2);
          if (i < 0 || k < 0) continue;
          dz += taps[w].value[v] == 3 * i + k ? to_float(given[w].value[v]) : 0.0f;
        }
        out[v] = fmaf(dz, scale[v], fmaf(slope[v], to_float(raw.value[v]) - mean[v], offset[v]));
      }
      store_floats<T, V>(dx + position * a.dx.row + at.channel, out);
    }
  }
}

}  // namespace

void pool(void* stream, Type type, const PoolGeometry& g, const PoolArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(g.channels % kWide == 0 && aligned(a.x) && aligned(a.y) && aligned(a.coef.data), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Items items = make_items<V>(g);
    by_type(type, [&](auto element) {
      maxpool_kernel<decltype(element), V><<<grid(items, g), kThreads, 0, s>>>(
          items, static_cast<int>(g.images_per_clip), static_cast<int>(g.clips_per_group), a);
      check_launch("maxpool");
    });
  });
}

void pool_grad(void* stream, Type type, const PoolGeometry& g, const PoolArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(g.channels % kWide == 0 && aligned(a.x) && aligned(a.dy) && aligned(a.dx) && aligned(a.coef.data), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Items items = make_items<V>(g);
    by_type(type, [&](auto element) {
      maxpool_grad_kernel<decltype(element), V><<<grid(items, g), kThreads, 0, s>>>(
          items, static_cast<int>(g.images_per_clip), static_cast<int>(g.clips_per_group), a);
      check_launch("maxpool_grad");
    });
  });
}

}  // namespace cuda
}  // namespace avsf
