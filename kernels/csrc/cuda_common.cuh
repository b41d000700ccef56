// How the CUDA kernels cut the work, load and store. Legend: C channels, V channels per thread, L lanes, R rows at once.
// A block of 256 threads is L lanes wide (V channels each) and R = 256 / L rows high, and walks down one chunk of rows of
// one unit. Chunks depend on the shape of one clip only: k groups of clips give bitwise what k separate calls give.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common.h"

namespace avsf {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWide = 8;  // channels per thread where everything is aligned: 128-bit accesses, one mask byte

struct Plan {
  int64_t rows, channels, mask_row;
  int units_per_clip, clips_per_group;
  int lane_bits;       // L = 1 << lane_bits
  int rows_per_chunk;  // a multiple of R
  int chunks, tiles;   // grid.y = chunks * tiles, grid.x = units
};

inline Plan make_plan(const Geometry& g, int v) {
  if (g.rows >= (int64_t{1} << 30)) throw std::runtime_error("avsf: more than 2^30 positions in one clip");
  Plan p = {};
  p.rows = g.rows, p.channels = g.channels, p.mask_row = (g.channels + 7) / 8;
  p.units_per_clip = static_cast<int>(g.units_per_clip), p.clips_per_group = static_cast<int>(g.clips_per_group);
  const int64_t vectors = (g.channels + v - 1) / v;
  p.lane_bits = 5;
  if (v > 1) {  // the widest tile that wastes the fewest lanes
    const auto padded = [&](int bits) { return ((vectors + (1 << bits) - 1) >> bits) << bits; };
    for (int bits = 4; bits >= 0; --bits)
      if (padded(bits) < padded(p.lane_bits) && (bits >= 3 || vectors < 8)) p.lane_bits = bits;
  }
  const int64_t lanes = 1 << p.lane_bits, high = kThreads / lanes, width = lanes * v;
  const int64_t elements = g.rows * g.channels * g.units_per_clip;
  const int64_t target = elements >= (1 << 20) ? 32768 : (elements >= (1 << 17) ? 16384 : 8192);
  int64_t chunk = (target / width + high - 1) / high * high;
  while ((g.rows + chunk - 1) / chunk * ((vectors + lanes - 1) / lanes) > 65535) chunk *= 2;
  p.rows_per_chunk = static_cast<int>(chunk);
  p.chunks = static_cast<int>((g.rows + chunk - 1) / chunk);
  p.tiles = static_cast<int>((vectors + lanes - 1) / lanes);
  return p;
}

inline dim3 grid(const Plan& p, const Geometry& g) {
  return dim3(static_cast<unsigned>(g.units), static_cast<unsigned>(p.chunks * p.tiles));
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("avsf: launch of ") + name + " failed: " + cudaGetErrorString(error));
}

// Rows of a view are so near each other that a few thousand of them are an int apart, in bytes.
inline void check_rows(std::initializer_list<const View*> views) {
  for (const View* v : views)
    if (v->row >= (1 << 17)) throw std::runtime_error("avsf: positions are 2^17 elements apart or more");
}

// Whether a view allows 128-bit accesses at every position.
inline bool aligned(const View& v) {
  return v.data == nullptr || (reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row % kWide == 0 && v.clip % kWide == 0);
}

inline bool aligned(const float* values) { return reinterpret_cast<uintptr_t>(values) % 16 == 0; }

struct Place {  // of one thread
  int64_t channel;      // first of its V
  int row, end;         // its first row and the end of its chunk, within the unit
  int step;             // R
  int lane, line;       // position in the block
  bool active;          // its channels exist
  int unit, clip, frame, group, chunk, tile;
};

// `piece` counts chunks and tiles of the unit, tiles first.
template <int V>
__device__ __forceinline__ Place place(const Plan& p, int unit, int piece) {
  Place q;
  const int lanes = 1 << p.lane_bits;
  q.lane = threadIdx.x & (lanes - 1), q.line = threadIdx.x >> p.lane_bits, q.step = kThreads >> p.lane_bits;
  q.chunk = piece / p.tiles, q.tile = piece % p.tiles;
  q.channel = (static_cast<int64_t>(q.tile) * lanes + q.lane) * V;
  q.active = q.channel < p.channels;
  const int first = q.chunk * p.rows_per_chunk;
  q.row = first + q.line, q.end = min(first + p.rows_per_chunk, static_cast<int>(p.rows));
  q.unit = unit, q.clip = q.unit / p.units_per_clip, q.frame = q.unit % p.units_per_clip;
  q.group = q.clip / p.clips_per_group;
  return q;
}

template <int V>
__device__ __forceinline__ Place place(const Plan& p) {
  return place<V>(p, blockIdx.x, blockIdx.y);
}

// From one of its rows to the next, in elements; `check_rows` has seen that a few of them fit an int.
__device__ __forceinline__ int stride(const View& v, const Place& q) { return q.step * static_cast<int>(v.row); }

template <typename T>
__device__ __forceinline__ int64_t offset(const View& v, const Plan& p, const Place& q) {
  return q.clip * v.clip + (q.frame * p.rows + q.row) * v.row + q.channel;
}

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) return value;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else return __float2bfloat16_rn(value);
}

// V neighbouring channels as loaded, and as floats.
template <typename T, int V>
struct alignas(V == 1 ? sizeof(T) : 16) Raw {
  T value[V];
};

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> load_raw(const T* from) {
  Raw<T, V> raw;
  if constexpr (V == 1) {
    raw.value[0] = *from;
  } else {
    constexpr int words = V * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(&raw)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return raw;
}

// The same for values that nobody reads again soon: they leave the cache first.
template <typename T, int V>
__device__ __forceinline__ Raw<T, V> load_last(const T* from) {
  Raw<T, V> raw;
  if constexpr (V == 1) {
    raw.value[0] = *from;
  } else {
    constexpr int words = V * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(&raw)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  return raw;
}

template <typename T, int V>
__device__ __forceinline__ void store_raw(T* to, const Raw<T, V>& raw) {
  if constexpr (V == 1) {
    *to = raw.value[0];
  } else {
    constexpr int words = V * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&raw)[i];
  }
}

template <typename T, int V>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[V]) {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.value[i] = from_float<T>(values[i]);
  store_raw<T, V>(to, raw);
}

// Through L2 only: another block of the same launch may have written them. Eight of them are 32 bytes, aligned.
template <int V>
__device__ __forceinline__ void load_params(float (&out)[V], const float* from) {
  if constexpr (V == kWide) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(from + i));
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  } else {
    out[0] = __ldcg(from);
  }
}

template <int V>
__device__ __forceinline__ void load_params(double (&out)[V], const double* from) {
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = __ldcg(from + i);
}

// Row `index` of the coefficients of this thread's group and channels.
__device__ __forceinline__ const float* coef_row(const Coef& coef, int index, const Plan& p, const Place& q) {
  const int64_t group = coef.plane == p.channels ? 0 : q.group;
  return coef.data + index * coef.plane + group * p.channels + q.channel;
}

template <typename F>
void by_type(Type type, F f) {
  if (type == Type::kFloat32) f(float{});
  else if (type == Type::kBFloat16) f(__nv_bfloat16{});
  else f(__half{});
}

// Calls f with V = 8 or V = 1 as a constant.
template <typename F>
void by_width(bool wide, F f) {
  if (wide) f(std::integral_constant<int, kWide>{});
  else f(std::integral_constant<int, 1>{});
}

bool wide(const Geometry& g, const ApplyArgs& a);
bool wide(const Geometry& g, const BackwardArgs& a);
int64_t scratch(const Geometry& g);
void norm(void* stream, Type, const Geometry&, const NormArgs&, float* work);
void norm_grad(void* stream, Type, const Geometry&, const BackwardArgs&, bool blocked, float* work);
void stats(void* stream, Type, const Geometry&, View x, float* work, float* out, const Finish* finish);
void finalize(void* stream, const float* stats, int64_t groups, int64_t channels, const Finish&);
void given(void* stream, const float* mean, const float* variance, const float* weight, const float* bias, double eps,
           int64_t channels, float* coef);
void apply(void* stream, Type, const Geometry*, const ApplyArgs*, int count);
void reduce(void* stream, Type, const Geometry&, const BackwardArgs&, float* work);
void input_grad(void* stream, Type, const Geometry&, const BackwardArgs&);
void frame_sum(void* stream, Type, const Geometry&, View dy, const bool* keep, char* out);
void update(void* stream, const Update* updates, int64_t count, double momentum);
void pool(void* stream, Type, const PoolGeometry&, const PoolArgs&);
void pool_grad(void* stream, Type, const PoolGeometry&, const PoolArgs&);

}  // namespace cuda
}  // namespace avsf
