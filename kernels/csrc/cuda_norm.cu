// Statistics, coefficients and application in one launch: see cuda_order.cuh for the order of its blocks.
#include <map>
#include <mutex>
#include <utility>

#include "cuda_apply.cuh"
#include "cuda_order.cuh"
#include "cuda_stats.cuh"

namespace avsf {
namespace cuda {

int slot_of(void* stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, int> slots;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, added] = slots.try_emplace({device, stream}, static_cast<int>(slots.size()));
  return at->second < kSlots ? at->second : -1;
}

namespace {

__device__ unsigned norm_counters[kSlots][kCounters];

struct NormLaunch {
  Plan plan;
  Order order;
  NormArgs args;
  double* units;   // [input, unit, 2, C]: sum of the values, sum of their squares
  float* partial;  // [input, unit, chunk, 2, C]: mean, squared deviations
};

// What the last block of a unit, and the last one of a group, make of the partial results.
template <int V>
__device__ __forceinline__ void finish_measure(const NormLaunch& n, const Counters& counters, const Place& q, int input) {
  __shared__ double shared[V][kThreads], kept[2][V][32];
  const Plan& p = n.plan;
  const Order& o = n.order;
  const int line = input * p.tiles + q.tile, members = o.units / o.groups, first = q.group * members;
  const float* partial = n.partial + static_cast<int64_t>(input) * o.units * p.chunks * 2 * p.channels;
  double* units = n.units + static_cast<int64_t>(input) * o.units * 2 * p.channels;
  const auto add_chunks = [&](int64_t from_chunk, int count) {
    double sums[V] = {}, squares[V] = {};
    if (q.active) {
#pragma unroll 1
      for (int i = q.line; i < count; i += q.step) {
        const float* from = partial + (from_chunk + i) * 2 * p.channels + q.channel;
        const int64_t row = static_cast<int64_t>(i % p.chunks) * p.rows_per_chunk;
        const double rows = static_cast<double>(min(static_cast<int64_t>(p.rows_per_chunk), p.rows - row));
        float mean[V], deviation[V];
        load_params<V>(mean, from);
        load_params<V>(deviation, from + p.channels);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const double sum = rows * mean[v];
          sums[v] += sum, squares[v] += deviation[v] + sum * mean[v];
        }
      }
    }
    add_doubles<V>(sums, shared, kept[0], p, q);
    add_doubles<V>(squares, shared, kept[1], p, q);
    __syncthreads();
  };
  if (o.parts) {
    if (!last_of(&counters.units[q.unit * o.lines + line], p.chunks)) return;
    add_chunks(static_cast<int64_t>(q.unit) * p.chunks, p.chunks);
#pragma unroll 1
    for (int v = q.line; q.active && v < V; v += q.step)
      for (int row = 0; row < 2; ++row)
        units[(q.unit * 2ll + row) * p.channels + q.channel + v] = kept[row][v][q.lane];
  }
  if (!last_of(&counters.groups[q.group * o.lines + line], members * (o.parts ? 1 : p.chunks))) return;
  if (!o.parts) {
    add_chunks(static_cast<int64_t>(first) * p.chunks, members * p.chunks);
  } else {
    for (int row = 0; row < 2; ++row) {
      double total[V] = {};
      if (q.active)
        for (int unit = q.line; unit < members; unit += q.step)
#pragma unroll
          for (int v = 0; v < V; ++v)
            total[v] += __ldcg(units + ((first + unit) * 2ll + row) * p.channels + q.channel + v);
      add_doubles<V>(total, shared, kept[row], p, q);
    }
    __syncthreads();
  }
  const Measure& m = n.args.measure[input];
  const double count = static_cast<double>(p.rows) * members;
#pragma unroll 1
  for (int v = q.line; q.active && v < V; v += q.step) {
    const int64_t channel = q.channel + v;
    const double mean = kept[0][v][q.lane] / count;
    const double squares = not_negative(kept[1][v][q.lane] - kept[0][v][q.lane] * mean);
    float* to = m.stats + q.group * 3 * p.channels + channel;
    to[0] = static_cast<float>(count), to[p.channels] = static_cast<float>(mean);
    to[2 * p.channels] = static_cast<float>(squares);
    if (m.finish.coef) write_coef(m.finish, q.group * p.channels + channel, channel, mean, squares / count, 1.0 / count);
  }
  announce(&counters.ready[q.group * o.lines + line]);
}

// The first pass alone, of all inputs one after the other.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3) stats_kernel(const __grid_constant__ NormLaunch n) {
  const Plan& p = n.plan;
  const int pieces = p.chunks * p.tiles, blocks = n.order.units * pieces, input = blockIdx.x / blocks;
  const int index = blockIdx.x - input * blocks;
  stats_block<T, V>(p, place<V>(p, index / pieces, index % pieces), n.args.measure[input].x,
                    n.partial + static_cast<int64_t>(input) * n.order.units * p.chunks * 2 * p.channels);
}

template <typename T, int V, int Residual>
__global__ void __launch_bounds__(kThreads, 2) norm_kernel(const __grid_constant__ NormLaunch n) {
  const Plan& p = n.plan;
  const Order& o = n.order;
  const Counters counters(o, o.slot >= 0 ? norm_counters[o.slot] : o.counters);
  const Turn t = turn(o, blockIdx.x);
  const int members = o.units / o.groups, pieces = p.chunks * p.tiles, blocks = members * pieces;
  if (!t.second) {
    const int input = t.index / blocks, index = t.index - input * blocks;
    const Place q = place<V>(p, t.group * members + index / pieces, index % pieces);
    stats_block<T, V>(p, q, n.args.measure[input].x,
                      n.partial + static_cast<int64_t>(input) * o.units * p.chunks * 2 * p.channels);
    finish_measure<V>(n, counters, q, input);
  } else {  // the other way round: what was read last is the likeliest to be in the cache
    const int index = blocks - 1 - t.index;
    const Place q = place<V>(p, t.group * members + index / pieces, index % pieces);
    for (int input = 0; input < n.args.inputs; ++input)
      wait_for(&counters.ready[q.group * o.lines + input * p.tiles + q.tile]);
    const bool last = depart(counters, o.second * o.groups);
    apply_block<T, V, true, Residual, false>(p, q, n.args.apply);
    clear(o, counters, last);
  }
}

// One block: 32 channels of one group; 16 lines add the partial results in double, in a fixed order.
__global__ void combine_stats_kernel(const Plan p, int members, const float* __restrict__ partial, float* __restrict__ stats,
                                     const Finish finish) {
  __shared__ double first[kCombineLines][32], second[kCombineLines][32];
  const int64_t channel = blockIdx.x * 32ll + threadIdx.x, group = blockIdx.y;
  const int parts = members * p.chunks;
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
    const double n = static_cast<double>(p.rows) * members;
    const double mean = a / n, squares = not_negative(b - a * mean);
    float* to = stats + group * 3 * p.channels + channel;
    to[0] = static_cast<float>(n), to[p.channels] = static_cast<float>(mean);
    to[2 * p.channels] = static_cast<float>(squares);
    if (finish.coef) write_coef(finish, group * p.channels + channel, channel, mean, squares / n, 1.0 / n);
  }
}

template <int V>
NormLaunch prepare(void* stream, Type type, const Geometry& g, const NormArgs& args, bool second, float* work) {
  NormLaunch n = {make_plan(g, V), {}, args, nullptr, nullptr};
  const int64_t group_bytes = g.rows * g.channels * type_bytes(type) * (g.units / g.groups);
  n.order = make_order(n.plan, g, args.inputs, second, group_bytes * args.inputs);
  n.units = reinterpret_cast<double*>(work);
  n.partial = work + g.units * args.inputs * 4 * g.channels;
  float* end = n.partial + g.units * args.inputs * n.plan.chunks * 2 * g.channels;
  place_counters(n.order, stream, reinterpret_cast<unsigned*>(end));
  return n;
}

bool wide_inputs(const Geometry& g, const NormArgs& args) {
  bool result = g.channels % kWide == 0;
  for (int i = 0; i < args.inputs; ++i) {
    check_rows({&args.measure[i].x});
    result = result && aligned(args.measure[i].x);
  }
  return result;
}

// Both passes in one launch.
void norm_at_once(void* stream, Type type, const Geometry& g, const NormArgs& args, float* work) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide(g, args.apply) && wide_inputs(g, args), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const NormLaunch n = prepare<V>(stream, type, g, args, true, work);
    const unsigned blocks = static_cast<unsigned>((n.order.first + n.order.second) * n.order.groups);
    by_type(type, [&](auto element) {
      using T = decltype(element);
      if (!args.apply.residual.data) norm_kernel<T, V, kNone><<<blocks, kThreads, 0, s>>>(n);
      else if (!args.apply.residual_coef.data) norm_kernel<T, V, kPlain><<<blocks, kThreads, 0, s>>>(n);
      else norm_kernel<T, V, kProjected><<<blocks, kThreads, 0, s>>>(n);
      check_launch("norm");
    });
  });
}

// Statistics and coefficients of all inputs.
void measure(void* stream, Type type, const Geometry& g, const NormArgs& args, float* work) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide_inputs(g, args), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const NormLaunch n = prepare<V>(stream, type, g, args, false, work);
    const unsigned blocks = static_cast<unsigned>(n.order.first * n.order.groups);
    by_type(type, [&](auto element) { stats_kernel<decltype(element), V><<<blocks, kThreads, 0, s>>>(n); });
    check_launch("stats");
    const dim3 grid(static_cast<unsigned>((g.channels + 31) / 32), static_cast<unsigned>(g.groups));
    for (int i = 0; i < args.inputs; ++i) {
      const float* partial = n.partial + i * g.units * n.plan.chunks * 2 * g.channels;
      combine_stats_kernel<<<grid, dim3(32, kCombineLines), 0, s>>>(n.plan, static_cast<int>(g.units / g.groups), partial,
                                                                    args.measure[i].stats, args.measure[i].finish);
      check_launch("combine_stats");
    }
  });
}

}  // namespace

// For up to four partial sums per channel (two inputs with two each, or three), their sums per unit, and counters.
int64_t scratch(const Geometry& g) {
  const auto need = [&](int v) {
    const Plan p = make_plan(g, v);
    return g.units * (p.chunks + 2) * 4 * g.channels + counters_of(g.units, g.groups, 2 * p.tiles);
  };
  return std::max(g.channels % kWide ? 0 : need(kWide), need(1));
}

void norm(void* stream, Type type, const Geometry& g, const NormArgs& args, float* work) {
  if (args.inputs && args.blocked) {
    norm_at_once(stream, type, g, args, work);
  } else {
    if (args.inputs) measure(stream, type, g, args, work);
    apply(stream, type, &g, &args.apply, 1);
  }
}

void stats(void* stream, Type type, const Geometry& g, View x, float* work, float* out, const Finish* finish) {
  NormArgs args;
  args.measure[0] = {x, out, finish ? *finish : Finish{}}, args.inputs = 1;
  measure(stream, type, g, args, work);
}

}  // namespace cuda
}  // namespace avsf
