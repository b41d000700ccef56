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
      float* to = n.args.totals + channel;
#pragma unroll 1
      for (int row = 0; row < 3; ++row) {
        double total = 0;
#pragma unroll 4
        for (int group = 0; group < o.groups; ++group) total += __ldcg(n.args.sums + (group * 3ll + row) * p.channels + channel);
        to[row * p.channels] = static_cast<float>(total);
        if (row == 0) to[3 * p.channels] = static_cast<float>(total);
      }
    }
  }
  if (o.second) announce(&counters.ready[q.group * o.lines + q.tile]);
  else leave(o, counters, o.groups * o.lines);
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
    finish_sums<V, Projected>(n, counters(), q);
  } else {
    wait_for(&counters().ready[q.group * o.lines + q.tile]);
    if constexpr (Write) grad_block<T, V, kOpen, Projected ? kDxAndProjected : kDx>(p, q, n.args, n.args.dz);
    else grad_block<T, V, G, Projected ? kDxAndProjected : kDx>(p, q, n.args, n.args.dy);
    leave(o, counters(), o.second * o.groups);
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

// Both passes, or with `second` false the first one.
void launch(void* stream, Type type, const Geometry& g, const BackwardArgs& a, bool second, bool blocked, float* work) {
  by_width(wide(g, a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    GradLaunch n = {make_plan(g, V), {}, a, nullptr, nullptr};
    const int64_t rows = a.residual_coef.data ? 3 : 2, group_bytes = g.rows * g.channels * type_bytes(type) * (g.units / g.groups);
    n.order = make_order(n.plan, g, 1, second, group_bytes * rows, blocked);
    n.units = reinterpret_cast<double*>(work);
    n.partial = work + g.units * rows * 2 * g.channels;
    place_counters(n.order, stream, reinterpret_cast<unsigned*>(n.partial + g.units * n.plan.chunks * rows * g.channels));
    const unsigned blocks = static_cast<unsigned>((n.order.first + n.order.second) * n.order.groups);
    by_type(type, [&](auto element) {
      launch_form<decltype(element), V>(static_cast<cudaStream_t>(stream), blocks, n);
    });
  });
}

}  // namespace

void reduce(void* stream, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  launch(stream, type, g, a, false, false, work);
}

void norm_grad(void* stream, Type type, const Geometry& g, const BackwardArgs& a, bool blocked, float* work) {
  if (a.dresidual.data && !a.dz.data && !a.residual_coef.data) {  // dz comes from neither pass, it is a copy of dy
    launch(stream, type, g, a, false, blocked, work);
    input_grad(stream, type, g, a);
  } else if (pass_by_pass()) {
    launch(stream, type, g, a, false, blocked, work);
    BackwardArgs second = a;
    if (a.dz.data) {  // the first pass has left dz
      second.dy = a.dz, second.dy2 = View(), second.mask = nullptr, second.relu = 0;
      if (!a.residual_coef.data) second.dresidual = View();
    }
    input_grad(stream, type, g, second);
  } else {
    launch(stream, type, g, a, true, blocked, work);
  }
}

}  // namespace cuda
}  // namespace avsf
