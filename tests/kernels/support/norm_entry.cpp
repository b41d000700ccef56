// The CUDA primitives of normalisation behind a C interface, for the emulated kernels: dense maps of (clips, rows, channels).
#include <cstdint>
#include <cstdio>
#include <exception>
#include <vector>

#include "cuda_common.cuh"

using namespace avsf;

namespace {

struct Map {
  int64_t clips, rows, channels, groups;
  Geometry geometry() const { return {clips, 1, clips / groups, rows, channels, groups}; }
  View view(void* data) const {
    View v;
    if (data) v = {static_cast<char*>(data), rows * channels, channels};
    return v;
  }
};

template <typename F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// pointers: x, residual, out, mask; floats: weight, bias, stats, coef, then those of the residual (projected if its coef is given).
__attribute__((visibility("default"))) int emulate_norm(int type, const Map* map, int relu, int blocked, void** pointers,
                                                        float** floats) {
  return guarded([&] {
    const Geometry g = map->geometry();
    const int64_t plane = g.groups * g.channels;
    NormArgs n;
    n.blocked = blocked, n.apply.relu = relu;
    n.apply.x = map->view(pointers[0]), n.apply.residual = map->view(pointers[1]), n.apply.out = map->view(pointers[2]);
    n.apply.mask = static_cast<uint8_t*>(pointers[3]);
    n.apply.coef = {floats[3], plane};
    n.measure[n.inputs++] = {n.apply.x, floats[2], {floats[0], floats[1], 1e-5, floats[3], plane}};
    if (floats[7]) {
      n.apply.residual_coef = {floats[7], plane};
      n.measure[n.inputs++] = {n.apply.residual, floats[6], {floats[4], floats[5], 1e-5, floats[7], plane}};
    }
    std::vector<float> work(cuda::scratch(g) + 4, 1e30f);
    cuda::norm(nullptr, static_cast<Type>(type), g, n, work.data());
  });
}

// pointers: dy, dy2, x, residual, dx, dresidual, dz, mask; floats: coef, residual_coef, sums, totals.
__attribute__((visibility("default"))) int emulate_norm_grad(int type, const Map* map, int relu, int blocked,
                                                             void** pointers, float** floats) {
  return guarded([&] {
    const Geometry g = map->geometry();
    const int64_t plane = g.groups * g.channels;
    BackwardArgs a;
    View* views[7] = {&a.dy, &a.dy2, &a.x, &a.residual, &a.dx, &a.dresidual, &a.dz};
    for (int i = 0; i < 7; ++i) *views[i] = map->view(pointers[i]);
    a.mask = static_cast<const uint8_t*>(pointers[7]);
    a.coef = {floats[0], plane};
    if (floats[1]) a.residual_coef = {floats[1], plane};
    a.sums = floats[2], a.totals = floats[3], a.relu = relu;
    std::vector<float> work(cuda::scratch(g) + 4, 1e30f);
    cuda::norm_grad(nullptr, static_cast<Type>(type), g, a, blocked, work.data());
  });
}
}
