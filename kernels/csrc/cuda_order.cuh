// Two passes over groups of clips in one launch: the second pass of a group needs sums of its first one.
//
// Blocks take their work in the order of their number, which is the order in which the hardware starts them: a block
// waits only for blocks of smaller numbers, all of which are running or done (what every one-pass scan relies on).
// Group g's second pass comes after the first pass of group g + lag, so that it meets its data in the L2 cache and
// nobody waits long: with lag 1 the order is first(0) first(1) second(0) first(2) second(1) ... .
//
// Sums need no atomics on values: blocks write partial results, count themselves in, and whoever comes last adds all of
// them in a fixed order. First the chunks of a unit, then the units of a group, then the groups: bitwise the same always.
#pragma once
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {

struct Order {
  int first, second;  // blocks of one group in each pass; 0: the launch has no such pass
  int groups, lag;
  int slot;           // which of the static counters, or -1: `counters`
  unsigned* counters;
  int lines;          // tiles times inputs: what is summed apart
  int units, parts;   // units of all groups; parts that the last block of a unit adds, 0: it adds none
  bool apart;         // first pass only, partial results only: another launch adds them, and counters are not used
};

struct Turn {
  bool second;
  int group, index;  // of the block within its group and pass
};

__device__ __forceinline__ Turn turn(const Order& o, int block) {
  const int head = (o.lag + 1) * o.first;
  if (block < head) return {false, block / o.first, block % o.first};
  block -= head;
  const int pair = o.first + o.second, pairs = o.groups - 1 - o.lag, k = block / pair, rest = block - k * pair;
  if (k < pairs) {
    if (rest < o.second) return {true, k, rest};
    return {false, o.lag + 1 + k, rest - o.second};
  }
  block -= pairs * pair;
  return {true, pairs + block / o.second, block % o.second};
}

// Counters of one launch, all zero before and after it.
struct Counters {
  unsigned *leaving, *units, *groups, *ready, *all;
  __device__ __forceinline__ Counters(const Order& o, unsigned* base)
      : leaving(base),
        units(base + 1),
        groups(units + o.units * o.lines),
        ready(groups + o.groups * o.lines),
        all(ready + o.groups * o.lines) {}
};

inline int64_t counters_of(int64_t units, int64_t groups, int64_t lines) { return 1 + lines * (units + 2 * groups + 1); }

// Whether this block is the last of `expected`; what all of them wrote before is then visible to it through L2.
__device__ __forceinline__ bool last_of(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) + 1 == expected;
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();
  __syncthreads();  // `last` may be written again
  return result;
}

// Tells the blocks of the second pass that this line of the group's sums is written.
__device__ __forceinline__ void announce(unsigned* ready) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(ready, 1u);
}

__device__ __forceinline__ void wait_for(const unsigned* ready) {
  if (threadIdx.x == 0) {
    while (*reinterpret_cast<const volatile unsigned*>(ready) == 0) {
#if defined(__CUDA_ARCH__)
      __nanosleep(32);
#endif
    }
    __threadfence();
  }
  __syncthreads();
}

// The last of `expected` blocks that need no counter any more puts all of them back. `depart` (of thread 0, whose answer
// comes while the block works) tells whether this is the last one; `clear` is called by the whole block, at its end.
__device__ __forceinline__ bool depart(const Counters& c, unsigned expected) {
  return threadIdx.x == 0 && atomicAdd(c.leaving, 1u) + 1 == expected;
}

__device__ __forceinline__ void clear(const Order& o, const Counters& c, bool last) {
  __shared__ bool clears;
  if (threadIdx.x == 0) clears = last;
  __syncthreads();
  if (!clears) return;
  const int count = static_cast<int>(c.all - c.leaving) + o.lines;
  for (int i = threadIdx.x; i < count; i += kThreads) c.leaving[i] = 0;
}

// Adds what the lines of a block hold, in a fixed order; line 0 has the result, and kept[v][lane] too.
template <int V>
__device__ __forceinline__ void add_doubles(double (&value)[V], double (*shared)[kThreads], double (*kept)[32],
                                            const Plan& p, const Place& q) {
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
  if (q.line == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v) kept[v][q.lane] = shared[v][threadIdx.x];
  }
}

constexpr int kDirectParts = 64;  // so few partial results of a group are added at once, without a step per unit

constexpr int kCombineLines = 16;  // of a block that adds partial results in a launch of its own, 32 channels wide

// Static counters: kSlots streams at a time, zero from the start and again after every launch.
constexpr int kSlots = 64, kCounters = 4096;
int slot_of(void* stream);  // -1: no slot is free

inline int cache_bytes() {
  static const int bytes = [] {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, device) != cudaSuccess)
      return 32 << 20;
    return value;
  }();
  return bytes;
}

// Work of both passes. `bytes`: what the second pass reads again of one group; `first` inputs are summed in the first pass.
inline Order make_order(const Plan& p, const Geometry& g, int inputs, bool second, int64_t bytes) {
  Order o = {};
  o.apart = !second;
  const int64_t units = g.units / g.groups, blocks = units * p.chunks * p.tiles;
  o.first = static_cast<int>(blocks * inputs), o.second = second ? static_cast<int>(blocks) : 0;
  o.groups = static_cast<int>(g.groups), o.units = static_cast<int>(g.units), o.lines = p.tiles * std::max(inputs, 1);
  o.parts = units * p.chunks <= kDirectParts ? 0 : p.chunks;
  // As many groups ahead as stay in 0.6 of the cache.
  const int64_t ahead = second ? cache_bytes() / 5 * 3 / std::max<int64_t>(bytes, 1) - 1 : g.groups;
  o.lag = static_cast<int>(std::clamp<int64_t>(ahead, 0, g.groups - 1));
  if ((int64_t{o.first} + o.second) * g.groups >= (int64_t{1} << 31)) throw std::runtime_error("avsf: input too large");
  return o;
}

// Where the counters are: static ones, or the end of the scratch memory, which costs a launch to clear.
inline void place_counters(Order& o, void* stream, unsigned* reserve) {
  if (o.apart) return;
  const int64_t count = counters_of(o.units, o.groups, o.lines);
  o.slot = count <= kCounters ? slot_of(stream) : -1;
  if (o.slot >= 0) return;
  o.counters = reserve;
  if (cudaMemsetAsync(reserve, 0, count * sizeof(unsigned), static_cast<cudaStream_t>(stream)) != cudaSuccess)
    throw std::runtime_error("avsf: cannot clear counters");
}

}  // namespace cuda
}  // namespace avsf
