// The backward of a normalisation in one launch: sums and input gradients, see cuda_order.cuh for the order of its blocks.
#include "cuda_backward.cuh"
#include "cuda_order.cuh"

namespace avsf {
namespace cuda {
namespace {

__device__ unsigned grad_counters[kSlots][kCounters];

struct GradLaunch {
  Plan plan;
  Order order;
  BackwardArgs args;
  double* units;   // [unit, 2 or 3, C]
  float* partial;  // [unit, chunk, 2 or 3, C]
};

// What the last block of a unit, of a group, and of all groups make of the partial results.
template <int V, bool Projected>
__device__ __forceinline__ void finish_sums(const GradLaunch& n, const Counters& counters, const Place& q) {
  constexpr int kRows = Projected ? 3 : 2;
  __shared__ double shared[V][kThreads], kept[kRows][V][32];
  const Plan& p = n.plan;
  const Order& o = n.order;
  const int members = o.units / o.groups, first = q.group * members;
  const auto add = [&](const auto* from, int64_t from_part, int count) {
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
      double total[V] = {};
      if (q.active) {
#pragma unroll 2
        for (int i = q.line; i < count; i += q.step) {
          std::remove_const_t<std::remove_pointer_t<decltype(from)>> part[V];
          load_params<V>(part, from + ((from_part + i) * kRows + row) * p.channels + q.channel);
#pragma unroll
          for (int v = 0; v < V; ++v) total[v] += part[v];
        }
      }
      add_doubles<V>(total, shared, kept[row], p, q);
    }
    __syncthreads();
  };
  if (o.parts) {
    if (!last_of(&counters.units[q.unit * o.lines + q.tile], p.chunks)) return;
    add(n.partial, static_cast<int64_t>(q.unit) * p.chunks, p.chunks);
#pragma unroll 1
    for (int v = q.line; q.active && v < V; v += q.step)
      for (int row = 0; row < kRows; ++row)
        n.units[(static_cast<int64_t>(q.unit) * kRows + row) * p.channels + q.channel + v] = kept[row][v][q.lane];
  }
  if (!last_of(&counters.groups[q.group * o.lines + q.tile], members * (o.parts ? 1 : p.chunks))) return;
  if (o.parts) add(n.units, first, members);
  else add(n.partial, static_cast<int64_t>(first) * p.chunks, members * p.chunks);
  const auto inverse = [&](const Coef& c, int64_t channel) {  // turns sum dz*(x - mean) into sum dz*xhat
    return c.data[3 * c.plane + (c.plane == p.channels ? 0 : q.group) * p.channels + channel];
  };
#pragma unroll 1
  for (int v = q.line; q.active && v < V; v += q.step) {
    const int64_t channel = q.channel + v;
    float* to = n.args.sums + q.group * 3 * p.channels + channel;
    to[0] = static_cast<float>(kept[0][v][q.lane]);
    to[p.channels] = static_cast<float>(kept[1][v][q.lane] * inverse(n.args.coef, channel));
    to[2 * p.channels] = Projected ? static_cast<float>(kept[kRows - 1][v][q.lane] * inverse(n.args.residual_coef, channel)) : 0.0f;
  }
  if (n.args.totals && last_of(&counters.all[q.tile], o.groups)) {
#pragma unroll 1
    for (int v = q.line; q.active && v < V; v += q.step) {
      const int64_t channel = q.channel + v;
      write_totals(n.args.sums, o.groups, p.channels, channel, n.args.totals);
    }
  }
  announce(&counters.ready[q.group * o.lines + q.tile]);
}

template <typename T, int V, int G, bool Projected, bool Two, bool Write>
__global__ void __launch_bounds__(kThreads, 2) norm_grad_kernel(const __grid_constant__ GradLaunch n) {
  const Plan& p = n.plan;
  const Order& o = n.order;
  const auto counters = [&] { return Counters(o, o.slot >= 0 ? grad_counters[o.slot] : o.counters); };
  const Turn t = turn(o, blockIdx.x);
  const int members = o.units / o.groups, pieces = p.chunks * p.tiles;
  // The second pass goes the other way round: what was read last is the likeliest to be in the cache.
  const int index = t.second ? members * pieces - 1 - t.index : t.index;
  const Place q = place<V>(p, t.group * members + index / pieces, index % pieces);
  if (!t.second) {
    reduce_block<T, V, G, Projected, Two, Write>(p, q, n.args, n.partial);
    if (!o.apart) finish_sums<V, Projected>(n, counters(), q);
  } else {
    wait_for(&counters().ready[q.group * o.lines + q.tile]);
    const bool last = depart(counters(), o.second * o.groups);
    if constexpr (Write) grad_block<T, V, kOpen, Projected ? kDxAndProjected : kDx>(p, q, n.args, n.args.dz);
    else grad_block<T, V, G, Projected ? kDxAndProjected : kDx>(p, q, n.args, n.args.dy);
    clear(o, counters(), last);
  }
}

template <typename T, int V>
void launch_form(cudaStream_t s, unsigned blocks, const GradLaunch& n) {
  const BackwardArgs& a = n.args;
  const bool projected = a.residual_coef.data;
  const auto run = [&](auto kernel) { kernel<<<blocks, kThreads, 0, s>>>(n); };
  if (a.dy2.data && !a.relu && projected) run(norm_grad_kernel<T, V, kOpen, true, true, true>);
  else if (a.dy2.data && !a.relu) run(norm_grad_kernel<T, V, kOpen, false, true, true>);
  else if (a.dy2.data && a.mask && projected) run(norm_grad_kernel<T, V, kFromMask, true, true, true>);
  else if (a.dy2.data && a.mask) run(norm_grad_kernel<T, V, kFromMask, false, true, true>);
  else if (a.dy2.data) run(norm_grad_kernel<T, V, kFromX, false, true, true>);
  else if (!a.relu && projected) run(norm_grad_kernel<T, V, kOpen, true, false, false>);
  else if (!a.relu) run(norm_grad_kernel<T, V, kOpen, false, false, false>);
  else if (a.mask && projected) run(norm_grad_kernel<T, V, kFromMask, true, false, false>);
  else if (a.mask && a.dz.data) run(norm_grad_kernel<T, V, kFromMask, false, false, true>);
  else if (a.mask) run(norm_grad_kernel<T, V, kFromMask, false, false, false>);
  else run(norm_grad_kernel<T, V, kFromX, false, false, false>);
  check_launch("norm_grad");
}

// One block: one of the sums for 32 channels of one group.
__global__ void combine_sums_kernel(const Plan p, int parts, int kinds, const float* __restrict__ partial, const Coef coef,
                                    const Coef other, float* __restrict__ sums) {
  __shared__ double shared[kCombineLines][32];
  const int64_t channel = blockIdx.x * 32ll + threadIdx.x, group = blockIdx.y;
  const int which = blockIdx.z;
  double total = 0;
  if (channel < p.channels && which < kinds)
    for (int i = threadIdx.y; i < parts; i += kCombineLines)
      total += partial[((group * parts + i) * kinds + which) * p.channels + channel];
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

__global__ void totals_kernel(const float* __restrict__ sums, int groups, int64_t channels, float* __restrict__ totals) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel < channels) write_totals(sums, groups, channels, channel, totals);
}

template <int V>
GradLaunch prepare(void* stream, Type type, const Geometry& g, const BackwardArgs& a, bool second, float* work) {
  GradLaunch n = {make_plan(g, V), {}, a, nullptr, nullptr};
  const int64_t rows = a.residual_coef.data ? 3 : 2;
  const int64_t group_bytes = g.rows * g.channels * type_bytes(type) * (g.units / g.groups);
  n.order = make_order(n.plan, g, 1, second, group_bytes * rows);
  n.units = reinterpret_cast<double*>(work);
  n.partial = work + g.units * rows * 2 * g.channels;
  place_counters(n.order, stream, reinterpret_cast<unsigned*>(n.partial + g.units * n.plan.chunks * rows * g.channels));
  return n;
}

// Both passes in one launch.
void grad_at_once(void* stream, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const GradLaunch n = prepare<V>(stream, type, g, a, true, work);
    const unsigned blocks = static_cast<unsigned>((n.order.first + n.order.second) * n.order.groups);
    by_type(type, [&](auto element) {
      launch_form<decltype(element), V>(static_cast<cudaStream_t>(stream), blocks, n);
    });
  });
}

// The sums of each group.
void sum_up(void* stream, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const GradLaunch n = prepare<V>(stream, type, g, a, false, work);
    const unsigned blocks = static_cast<unsigned>(n.order.first * n.order.groups);
    by_type(type, [&](auto element) { launch_form<decltype(element), V>(s, blocks, n); });
    const dim3 grid(static_cast<unsigned>((g.channels + 31) / 32), static_cast<unsigned>(g.groups), 3);
    const int parts = static_cast<int>(g.units / g.groups * n.plan.chunks);
    combine_sums_kernel<<<grid, dim3(32, kCombineLines), 0, s>>>(n.plan, parts, a.residual_coef.data ? 3 : 2, n.partial,
                                                                 a.coef, a.residual_coef, a.sums);
    check_launch("combine_sums");
  });
}

}  // namespace

void reduce(void* stream, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  sum_up(stream, type, g, a, work);
  if (!a.totals) return;
  const unsigned blocks = static_cast<unsigned>((g.channels + kThreads - 1) / kThreads);
  totals_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a.sums, static_cast<int>(g.groups), g.channels,
                                                                            a.totals);
  check_launch("totals");
}

void norm_grad(void* stream, Type type, const Geometry& g, const BackwardArgs& a, bool blocked, float* work) {
  // A residual's gradient that is a copy of dy comes from neither of the passes of one launch.
  const bool copies = a.dresidual.data && !a.dz.data && !a.residual_coef.data;
  if (blocked && !copies) {
    grad_at_once(stream, type, g, a, work);
    return;
  }
  sum_up(stream, type, g, a, work);
  BackwardArgs step = a;
  if (a.dz.data) {
    step.dy = a.dz, step.mask = nullptr, step.relu = 0;
    if (!a.residual_coef.data) step.dresidual = View();
  }
  input_grad(stream, type, g, step);
}

}  // namespace cuda
}  // namespace avsf
