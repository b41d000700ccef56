// CPU primitives: cuts the work into fixed blocks, runs them on PyTorch's threads, combines in fixed order.
// Block borders depend on the shape of one clip only, never on the threads or the batch: results are bitwise stable,
// and k groups of clips give what k separate calls give.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu_leaf.h"

namespace avsf {
namespace {

constexpr int64_t kBlockElements = 1 << 17;

#if defined(__x86_64__)
// The halves of AVX2 machines: asked of the processor itself, as not every compiler knows the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const LeafTable& leaf() {
  static const LeafTable& table = []() -> const LeafTable& {
#if defined(__x86_64__)
    const char* wish = std::getenv("AVSF_CPU_ISA");
    const bool base = wish && !std::strcmp(wish, "base"), avx2 = wish && !std::strcmp(wish, "avx2");
    __builtin_cpu_init();
    if (!base && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return leaf_avx512();
    if (!base && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
      return leaf_avx2();
#endif
    return leaf_base();
  }();
  return table;
}

int64_t block_rows(const Geometry& g) {
  return std::min(g.rows, std::max<int64_t>(16, kBlockElements / g.channels / 16 * 16));
}
int64_t blocks_per_unit(const Geometry& g) { return (g.rows + block_rows(g) - 1) / block_rows(g); }

char* at(View v, Type type, const Geometry& g, int64_t unit, int64_t row) {
  if (v.data == nullptr) return nullptr;
  const int64_t clip = unit / g.units_per_clip, part = unit % g.units_per_clip;
  return v.data + (clip * v.clip + (part * g.rows + row) * v.row) * type_bytes(type);
}

// Calls f(block, unit, first row, rows) for every block of every unit, on several threads.
template <class F>
void for_blocks(const Geometry& g, F f) {
  const int64_t per_unit = blocks_per_unit(g), step = block_rows(g);
  torch::stable::parallel_for(0, g.units * per_unit, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block % per_unit * step;
      f(block, block / per_unit, row, std::min(step, g.rows - row));
    }
  });
}

int64_t group_of(const Geometry& g, int64_t unit) {
  return g.groups == 1 ? 0 : unit / g.units_per_clip / g.clips_per_group;
}

int64_t scratch(const Geometry& g) { return g.units * blocks_per_unit(g) * 3 * g.channels; }

void finalize(void*, const float* stats, int64_t groups, int64_t channels, const Finish& f);

void stats(void*, Type type, const Geometry& g, View x, float* work, float* out, const Finish* finish) {
  const int64_t c = g.channels;
  for_blocks(g, [&](int64_t block, int64_t unit, int64_t row, int64_t rows) {
    float* part = work + block * 2 * c;
    leaf().stats(type, at(x, type, g, unit, row), x.row, rows, c, part, part + c);
  });
  const int64_t per_unit = blocks_per_unit(g), per_group = g.units / g.groups * per_unit, step = block_rows(g);
  for (int64_t group = 0; group < g.groups; ++group) {
    std::vector<double> mean(c, 0.0), squares(c, 0.0);
    double count = 0;
    for (int64_t i = 0; i < per_group; ++i) {
      const float* part = work + (group * per_group + i) * 2 * c;
      const double n = static_cast<double>(std::min(step, g.rows - i % per_unit * step));
      const double share = n / (count + n), weight = count * share;
      for (int64_t k = 0; k < c; ++k) {
        const double delta = part[k] - mean[k];
        mean[k] += delta * share;
        squares[k] += part[c + k] + delta * delta * weight;
      }
      count += n;
    }
    float* to = out + group * 3 * c;
    for (int64_t k = 0; k < c; ++k) {
      to[k] = static_cast<float>(count);
      to[c + k] = static_cast<float>(mean[k]);
      to[2 * c + k] = static_cast<float>(squares[k]);
    }
  }
  if (finish) finalize(nullptr, out, g.groups, c, *finish);
}

void coefficients(double mean, double variance, double weight, double bias, double eps, double inverse_count,
                  float* coef, int64_t plane) {
  const float invstd = static_cast<float>(1.0 / std::sqrt(variance + eps));
  const float scale = static_cast<float>(weight * invstd);
  coef[0] = scale;
  coef[plane] = static_cast<float>(bias - mean * scale);
  coef[2 * plane] = static_cast<float>(mean);
  coef[3 * plane] = invstd;
  coef[4 * plane] = static_cast<float>(inverse_count);
}

void finalize(void*, const float* stats, int64_t groups, int64_t channels, const Finish& f) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < channels; ++k) {
      const float* from = stats + g * 3 * channels + k;
      const double count = from[0];
      coefficients(from[channels], from[2 * channels] / count, f.weight ? f.weight[k] : 1.0, f.bias ? f.bias[k] : 0.0,
                   f.eps, 1.0 / count, f.coef + g * channels + k, f.plane);
    }
}

void given(void*, const float* mean, const float* variance, const float* weight, const float* bias, double eps,
           int64_t channels, float* coef) {
  for (int64_t k = 0; k < channels; ++k)
    coefficients(mean[k], variance[k], weight ? weight[k] : 1.0, bias ? bias[k] : 0.0, eps, 0.0, coef + k, channels);
}

// Audio of one frame as floats, zero in a clip that is not kept.
void frame_audio(Type type, const ApplyArgs& a, const Geometry& g, int64_t unit, float* out) {
  const int64_t clip = unit / g.units_per_clip, frame = unit % g.units_per_clip;
  const bool kept = a.keep == nullptr || a.keep[clip];
  const int64_t base = clip * a.audio_clip + frame * a.audio_frame;
  const int64_t bytes = type_bytes(type);
  std::vector<char> row(g.channels * bytes);  // the leaf widens whole rows: gather one
  for (int64_t c = 0; c < g.channels; ++c)
    std::memcpy(row.data() + c * bytes, a.audio + (base + c * a.audio_channel) * bytes, bytes);
  leaf().sum(type, row.data(), g.channels, 1, g.channels, out);
  if (!kept) std::fill(out, out + g.channels, 0.0f);
}

void apply(void*, Type type, const Geometry* geometry, const ApplyArgs* args, int count) {
  for (int i = 0; i < count; ++i) {
    const ApplyArgs& a = args[i];
    const Geometry& g = geometry[i];
    const int64_t mask_row = (g.channels + 7) / 8;
    for_blocks(g, [&](int64_t, int64_t unit, int64_t row, int64_t rows) {
      const int64_t group = group_of(g, unit) * g.channels;
      const auto coef = [&](const Coef& from, int64_t index) {
        return from.data ? from.data + index * from.plane + (from.plane == g.channels ? 0 : group) : nullptr;
      };
      std::vector<float> audio(a.audio ? g.channels : 0);
      if (a.audio) frame_audio(type, a, g, unit, audio.data());
      leaf().apply(type, {at(a.x, type, g, unit, row), at(a.residual, type, g, unit, row), at(a.out, type, g, unit, row),
                          a.x.row, a.residual.row, a.out.row, rows, g.channels, coef(a.coef, 0), coef(a.coef, 1),
                          coef(a.residual_coef, 0), coef(a.residual_coef, 1), a.audio ? audio.data() : nullptr,
                          a.mask ? a.mask + (unit * g.rows + row) * mask_row : nullptr, a.relu});
    });
  }
}

LeafBackward leaf_args(Type type, const Geometry& g, const BackwardArgs& a, int64_t unit, int64_t row, int64_t rows) {
  LeafBackward l = {};
  l.dy = at(a.dy, type, g, unit, row), l.x = at(a.x, type, g, unit, row);
  l.residual = at(a.residual, type, g, unit, row);
  l.dx = at(a.dx, type, g, unit, row), l.dresidual = at(a.dresidual, type, g, unit, row);
  l.dy_row = a.dy.row, l.x_row = a.x.row, l.residual_row = a.residual.row;
  l.dx_row = a.dx.row, l.dresidual_row = a.dresidual.row;
  l.rows = rows, l.channels = g.channels, l.relu = a.relu;
  if (a.mask) l.mask = a.mask + (unit * g.rows + row) * ((g.channels + 7) / 8);
  const int64_t group = group_of(g, unit) * g.channels;
  const float* coef = a.coef.data + (a.coef.plane == g.channels ? 0 : group);
  l.scale = coef, l.shift = coef + a.coef.plane, l.mean = coef + 2 * a.coef.plane;
  if (a.residual_coef.data) {
    const float* other = a.residual_coef.data + (a.residual_coef.plane == g.channels ? 0 : group);
    l.residual_scale = other, l.residual_mean = other + 2 * a.residual_coef.plane;
  }
  return l;
}

// [G, 3, C] sums to the parameters' gradients [kTotals, C].
void add_groups(const float* sums, int64_t groups, int64_t c, float* totals) {
  for (int64_t k = 0; k < 3 * c; ++k) {
    double total = 0;
    for (int64_t group = 0; group < groups; ++group) total += sums[group * 3 * c + k];
    totals[k] = static_cast<float>(total);
  }
  std::copy(totals, totals + c, totals + 3 * c);
}

void reduce(void*, Type type, const Geometry& g, const BackwardArgs& a, float* work) {
  const int64_t c = g.channels;
  for_blocks(g, [&](int64_t block, int64_t unit, int64_t row, int64_t rows) {
    LeafBackward l = leaf_args(type, g, a, unit, row, rows);
    l.sums = work + block * 3 * c;
    leaf().reduce(type, l);
  });
  const int64_t per_group = g.units / g.groups * blocks_per_unit(g);
  for (int64_t group = 0; group < g.groups; ++group) {
    std::vector<double> total(3 * c, 0.0);
    for (int64_t i = 0; i < per_group; ++i)
      for (int64_t k = 0; k < 3 * c; ++k) total[k] += work[(group * per_group + i) * 3 * c + k];
    float* to = a.sums + group * 3 * c;
    const Coef* coefs[3] = {nullptr, &a.coef, &a.residual_coef};
    for (int row = 0; row < 3; ++row)
      for (int64_t k = 0; k < c; ++k) {
        double factor = 1.0;  // invstd turns sum dz*(x - mean) into sum dz*xhat
        if (row && coefs[row]->data)
          factor = coefs[row]->data[3 * coefs[row]->plane + (coefs[row]->plane == c ? 0 : group * c) + k];
        to[row * c + k] = static_cast<float>(total[row * c + k] * factor);
      }
  }
  if (a.totals) add_groups(a.sums, g.groups, c, a.totals);
}

// slope and offset of dx = scale*dz + slope*(x - mean) + offset, for every group.
std::vector<float> gradient_lines(const Geometry& g, const Coef& coef, const float* sums, int which) {
  const int64_t c = g.channels;
  std::vector<float> lines(2 * g.groups * c);
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t k = 0; k < c; ++k) {
      const float* from = coef.data + (coef.plane == c ? 0 : group * c) + k;
      const double scale = from[0], invstd = from[3 * coef.plane], inverse_count = from[4 * coef.plane];
      const float* sum = sums + group * 3 * c + k;
      lines[2 * group * c + k] = static_cast<float>(-scale * invstd * sum[which * c] * inverse_count);
      lines[(2 * group + 1) * c + k] = static_cast<float>(-scale * sum[0] * inverse_count);
    }
  return lines;
}

void input_grad(void*, Type type, const Geometry& g, const BackwardArgs& a) {
  const std::vector<float> lines = gradient_lines(g, a.coef, a.sums, 1);
  const std::vector<float> others =
      a.residual_coef.data ? gradient_lines(g, a.residual_coef, a.sums, 2) : std::vector<float>();
  for_blocks(g, [&](int64_t, int64_t unit, int64_t row, int64_t rows) {
    LeafBackward l = leaf_args(type, g, a, unit, row, rows);
    const int64_t group = group_of(g, unit) * 2 * g.channels;
    l.slope = lines.data() + group, l.offset = l.slope + g.channels;
    if (!others.empty()) l.residual_slope = others.data() + group, l.residual_offset = l.residual_slope + g.channels;
    leaf().input_grad(type, l);
  });
}

#include "cpu_norm.inc"

// One row of floats in the element type, by the leaf's own rounding: 0 + value.
std::vector<char> narrow(Type type, const std::vector<float>& values) {
  const int64_t c = static_cast<int64_t>(values.size());
  std::vector<char> out(c * type_bytes(type), 0);
  LeafApply a = {};
  a.x = out.data(), a.out = out.data(), a.audio = values.data();
  a.x_row = a.out_row = a.channels = c, a.rows = 1;
  leaf().apply(type, a);
  return out;
}

// out[n, c, t] = sum over H, W of dy, zero in a clip that is not kept. Units are frames.
void frame_sum(void*, Type type, const Geometry& g, View dy, const bool* keep, char* out) {
  torch::stable::parallel_for(0, g.units, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(g.channels);
    std::vector<double> total(g.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t clip = unit / g.units_per_clip, frame = unit % g.units_per_clip, step = block_rows(g);
      const bool kept = keep == nullptr || keep[clip];
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t row = 0; kept && row < g.rows; row += step) {
        leaf().sum(type, at(dy, type, g, unit, row), dy.row, std::min(step, g.rows - row), g.channels, part.data());
        for (int64_t c = 0; c < g.channels; ++c) total[c] += part[c];
      }
      for (int64_t c = 0; c < g.channels; ++c) part[c] = static_cast<float>(total[c]);
      const std::vector<char> row = narrow(type, part);
      const int64_t bytes = type_bytes(type);
      for (int64_t c = 0; c < g.channels; ++c)
        std::memcpy(out + ((clip * g.channels + c) * g.units_per_clip + frame) * bytes, row.data() + c * bytes, bytes);
    }
  });
}

void update(void*, const Update* updates, int64_t count, double momentum) {
  for (int64_t i = 0; i < count; ++i) {
    const Update& u = updates[i];
    for (int64_t k = 0; k < u.channels; ++k) {
      double total = 0, mean = 0, squares = 0;
      for (int64_t g = 0; g < u.groups; ++g) {
        const float* from = u.stats + g * 3 * u.channels + k;
        const double n = from[0], delta = from[u.channels] - mean;
        squares += from[2 * u.channels] + delta * delta * total * n / (total + n);
        mean += delta * n / (total + n);
        total += n;
      }
      const double variance = squares / std::max(total - 1.0, 1.0);
      u.mean[k] = static_cast<float>(u.mean[k] + momentum * (mean - u.mean[k]));
      u.variance[k] = static_cast<float>(u.variance[k] + momentum * (variance - u.variance[k]));
    }
    ++*u.batches;
  }
}

// Row `row` of an image of (height, width) positions; null outside.
char* image_row(View v, Type type, const PoolGeometry& g, int64_t image, int64_t row, int64_t height, int64_t width) {
  if (row < 0 || row >= height) return nullptr;
  const int64_t clip = image / g.images_per_clip, frame = image % g.images_per_clip;
  return v.data + (clip * v.clip + ((frame * height + row) * width) * v.row) * type_bytes(type);
}

int64_t pool_group(const PoolGeometry& g, const Coef& coef, int64_t image) {
  return coef.plane == g.channels ? 0 : image / g.images_per_clip / g.clips_per_group * g.channels;
}

void pool(void*, Type type, const PoolGeometry& g, const PoolArgs& a) {
  torch::stable::parallel_for(0, g.images * g.out_height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / g.out_height, row = unit % g.out_height, first = unit * g.out_width * g.channels;
      const float* coef = a.coef.data + pool_group(g, a.coef, image);
      LeafPool l = {};
      for (int i = 0; i < 3; ++i) l.x[i] = image_row(a.x, type, g, image, 2 * row - 1 + i, g.height, g.width);
      l.y = image_row(a.y, type, g, image, row, g.out_height, g.out_width);
      if (a.tap) l.tap = a.tap + first, l.value = a.value.data + first * type_bytes(type);
      l.x_row = a.x.row, l.y_row = a.y.row, l.width = g.width, l.out_width = g.out_width, l.channels = g.channels;
      l.scale = coef, l.shift = coef + a.coef.plane;
      leaf().pool(type, l);
    }
  });
}

void pool_grad(void*, Type type, const PoolGeometry& g, const PoolArgs& a) {
  const Geometry groups = {0, 1, 1, 0, g.channels, g.groups};
  const std::vector<float> lines = gradient_lines(groups, a.coef, a.sums, 1);
  torch::stable::parallel_for(0, g.images * g.out_height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / g.out_height, row = unit % g.out_height;
      const int64_t group = image / g.images_per_clip / g.clips_per_group;
      const float* coef = a.coef.data + pool_group(g, a.coef, image);
      LeafPoolGrad l = {};
      for (int i = 0; i < 2; ++i) {
        l.dy[i] = image_row(a.dy, type, g, image, row + i, g.out_height, g.out_width);
        if (l.dy[i]) l.tap[i] = a.tap + (unit + i) * g.out_width * g.channels;
        l.x[i] = image_row(a.x, type, g, image, 2 * row + i, g.height, g.width);
        l.dx[i] = image_row(a.dx, type, g, image, 2 * row + i, g.height, g.width);
      }
      l.dy_row = a.dy.row, l.x_row = a.x.row, l.dx_row = a.dx.row;
      l.width = g.width, l.out_width = g.out_width, l.channels = g.channels;
      l.scale = coef, l.mean = coef + 2 * a.coef.plane;
      l.slope = lines.data() + group * 2 * g.channels, l.offset = l.slope + g.channels;
      leaf().pool_grad(type, l);
    }
  });
}

}  // namespace

const Primitives& cpu_primitives() {
  static const Primitives table = {false, scratch, norm,       norm_grad, stats,  finalize, given,
                                   apply, reduce,  input_grad, frame_sum, update, pool,     pool_grad};
  return table;
}

}  // namespace avsf
