// The CPU leaf loops. Compiled once per instruction set: AVSF_LEAF names the table, AVSF_AVX512 / AVSF_AVX2 the set.
// Sums run over rows in a fixed order for each channel, so that no result depends on the number of threads.
#include "cpu_leaf.h"

#include "cpu_vector.h"

namespace avsf {
namespace {

constexpr int64_t kChunk = 1024;    // channels whose accumulators stay in the first cache
constexpr int64_t kWideEnough = 128;
constexpr int64_t kAhead = 4096;  // bytes

// Few channels in dense rows: k rows side by side make one wide row of k*C channels.
int64_t rows_per_wide_row(int64_t channels, bool dense, bool bits) {
  if (!dense || channels >= kWideEnough || (bits && channels % 8)) return 1;
  int64_t k = 1;
  while (channels * k % 16) k *= 2;
  while (channels * k < kWideEnough) k *= 2;
  return channels * k <= 512 ? k : 1;
}

struct Wide {
  float buffer[kChunk];
  const float* spread(const float* values, int64_t channels, int64_t k) {
    if (values == nullptr || k == 1) return values;
    for (int64_t i = 0; i < k; ++i) std::memcpy(buffer + i * channels, values, channels * sizeof(float));
    return buffer;
  }
};

// Asks for what loops that only read will need kAhead bytes on: they are else bound by latency. Of Count rows at once, at
// column c of `width`: in the order of the addresses where rows are dense.
template <int Count, class E>
AVSF_INLINE void fetch(const typename E::Raw* rows, int64_t row, int64_t width, int64_t c) {
  constexpr int64_t kElement = sizeof(typename E::Raw), kBytes = Count * kLanes * kElement;
  if (row == width) {
    const char* p = reinterpret_cast<const char*>(rows) + c * Count * kElement + kAhead;
    for (int64_t b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b);
  } else {
    const int64_t far = (kAhead / kElement + row - 1) / row * row;
    for (int i = 0; i < Count; ++i) __builtin_prefetch(rows + far + i * row + c);
  }
}

// Calls f(first channel, lanes) for whole vectors, then for the rest.
template <class F>
AVSF_INLINE void for_vectors(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f.template operator()<true>(c, kLanes);
  if (c < width) f.template operator()<false>(c, static_cast<int>(width - c));
}

void fold(float* values, int64_t channels, int64_t k) {
  for (int64_t i = 1; i < k; ++i)
    for (int64_t c = 0; c < channels; ++c) values[c] += values[i * channels + c];
}

// Mean of up to eight rows that are spread over the block: neighbours resemble each other.
template <class E>
void sample_mean(const typename E::Raw* x, int64_t row, int64_t rows, int64_t width, float* out) {
  const int64_t count = rows < 8 ? rows : 8, step = rows / count, first = step / 2;
  for_vectors(width, [&]<bool Whole>(int64_t c, int n) {
    vf sum = {};
    for (int64_t r = 0; r < count; ++r) sum += load<Whole, E>(x + (first + r * step) * row + c, n);
    store<Whole, Float32>(out + c, sum / static_cast<float>(count), n);
  });
}

// Sums of x - shift and its square over the rows, four at a time.
template <class E>
void shifted_sums(const typename E::Raw* x, int64_t row, int64_t rows, int64_t width, const float* shift, float* sum,
                  float* square) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const typename E::Raw* p = x + r * row;
    for_vectors(width, [&]<bool Whole>(int64_t c, int n) {
      fetch<4, E>(p, row, width, c);
      const vf k = load<Whole, Float32>(shift + c, n);
      const vf a = load<Whole, E>(p + c, n) - k, b = load<Whole, E>(p + row + c, n) - k;
      const vf d = load<Whole, E>(p + 2 * row + c, n) - k, e = load<Whole, E>(p + 3 * row + c, n) - k;
      store<Whole, Float32>(sum + c, load<Whole, Float32>(sum + c, n) + ((a + b) + (d + e)), n);
      store<Whole, Float32>(square + c, load<Whole, Float32>(square + c, n) + ((a * a + b * b) + (d * d + e * e)), n);
    });
  }
  for (; r < rows; ++r) {
    for_vectors(width, [&]<bool Whole>(int64_t c, int n) {
      const vf a = load<Whole, E>(x + r * row + c, n) - load<Whole, Float32>(shift + c, n);
      store<Whole, Float32>(sum + c, load<Whole, Float32>(sum + c, n) + a, n);
      store<Whole, Float32>(square + c, load<Whole, Float32>(square + c, n) + a * a, n);
    });
  }
}

constexpr int64_t kSegment = 1024;     // rows that are summed in float before they go to double
constexpr int64_t kPiece = 128;        // channels that are summed again together
constexpr double kCancellation = 4.0;  // how much larger than the squared deviations (mean - shift)^2 * rows may be

// Mean and squared deviations of `width` channels by sums around `shift`; k rows side by side where k > 1. Returns
// a bit for each piece in which a channel lost too much to cancellation: its shift is two standard deviations away.
template <class E>
uint32_t stats_around(const typename E::Raw* x, int64_t row, int64_t rows, int64_t width, int64_t k, const float* shift,
                  float* mean, float* squares) {
  double sums[kChunk] = {}, all_squares[kChunk] = {};
  Wide wide;
  const float* wide_shift = wide.spread(shift, width, k);
  const int64_t whole = k == 1 ? 0 : rows / k;
  const auto add = [&](const typename E::Raw* from, int64_t from_row, int64_t count, int64_t lanes, const float* around) {
    for (int64_t r = 0; r < count; r += kSegment) {
      float sum[kChunk], square[kChunk];
      std::memset(sum, 0, lanes * sizeof(float)), std::memset(square, 0, lanes * sizeof(float));
      const int64_t some = count - r < kSegment ? count - r : kSegment;
      shifted_sums<E>(from + r * from_row, from_row, some, lanes, around, sum, square);
      fold(sum, width, lanes / width), fold(square, width, lanes / width);
      for (int64_t i = 0; i < width; ++i) sums[i] += sum[i], all_squares[i] += square[i];
    }
  };
  if (whole) add(x, k * row, whole, k * width, wide_shift);
  add(x + whole * k * row, row, rows - whole * k, width, shift);
  const double inverse = 1.0 / static_cast<double>(rows);
  uint32_t lost = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double moved = sums[i] * sums[i] * inverse, m2 = all_squares[i] - moved;
    lost |= static_cast<uint32_t>(moved > kCancellation * m2) << (i / kPiece);
    mean[i] = static_cast<float>(shift[i] + sums[i] * inverse);
    squares[i] = static_cast<float>(m2 < 0 ? 0 : m2);
  }
  return lost;
}

// Where the sample was no good centre, e.g. met a black border, the piece is summed again around its means.
template <class E>
void stats_rows(const typename E::Raw* x, int64_t row, int64_t rows, int64_t channels, float* mean, float* squares) {
  const int64_t k = rows_per_wide_row(channels, row == channels, false);
  const int64_t step = k == 1 ? kChunk : channels;
  for (int64_t c = 0; c < channels; c += step) {
    const int64_t width = channels - c < step ? channels - c : step;
    float shift[kChunk];
    sample_mean<E>(x + c, row, rows, width, shift);
    const uint32_t lost = stats_around<E>(x + c, row, rows, width, k, shift, mean + c, squares + c);
    for (int64_t first = 0; first < width; first += kPiece) {
      if (!(lost >> (first / kPiece) & 1)) continue;
      const int64_t from = c + first, some = width - first < kPiece ? width - first : kPiece;
      std::memcpy(shift, mean + from, some * sizeof(float));
      stats_around<E>(x + from, row, rows, some, k, shift, mean + from, squares + from);
    }
  }
}

template <class E>
void sum_rows(const typename E::Raw* x, int64_t row, int64_t rows, int64_t channels, float* out) {
  std::memset(out, 0, channels * sizeof(float));
  auto add = [&]<int Count>(const typename E::Raw* p) {
    for_vectors(channels, [&]<bool Whole>(int64_t c, int n) {
      vf total = load<Whole, Float32>(out + c, n);
      fetch<Count, E>(p, row, channels, c);
      for (int i = 0; i < Count; ++i) total += load<Whole, E>(p + i * row + c, n);
      store<Whole, Float32>(out + c, total, n);
    });
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add.template operator()<4>(x + r * row);
  for (; r < rows; ++r) add.template operator()<1>(x + r * row);
}

template <class E, bool Norm, bool Residual, bool ResidualNorm, bool Audio>
void apply_wide(const LeafApply& a, int64_t rows, int64_t width, const typename E::Raw* x,
                const typename E::Raw* residual, typename E::Raw* out, uint8_t* mask, int64_t wide) {
  const int64_t mask_row = (width + 7) / 8;
  for (int64_t r = 0; r < rows; ++r) {
    const typename E::Raw *px = x + r * a.x_row * wide, *pr = Residual ? residual + r * a.residual_row * wide : nullptr;
    typename E::Raw* po = out + r * a.out_row * wide;
    for_vectors(width, [&]<bool Whole>(int64_t c, int n) {
      vf z = load<Whole, E>(px + c, n);
      if constexpr (Norm) z = z * load<Whole, Float32>(a.scale + c, n) + load<Whole, Float32>(a.shift + c, n);
      if constexpr (Residual) {
        vf other = load<Whole, E>(pr + c, n);
        if constexpr (ResidualNorm)
          other = other * load<Whole, Float32>(a.residual_scale + c, n) + load<Whole, Float32>(a.residual_shift + c, n);
        z += other;
      }
      if (a.relu) {
        const vi keep = passes(z);
        z = select(keep, z);
        if (Residual && mask) store_bits<Whole>(mask + r * mask_row + c / 8, keep, n);
      }
      if constexpr (Audio) z += load<Whole, Float32>(a.audio + c, n);
      store<Whole, E>(po + c, z, n);
    });
  }
}

template <class E, bool Norm, bool Residual, bool ResidualNorm, bool Audio>
void apply_rows(const LeafApply& a) {
  using Raw = typename E::Raw;
  const Raw *x = reinterpret_cast<const Raw*>(a.x), *residual = reinterpret_cast<const Raw*>(a.residual);
  Raw* out = reinterpret_cast<Raw*>(a.out);
  const bool dense = a.x_row == a.channels && a.out_row == a.channels && (!Residual || a.residual_row == a.channels);
  const int64_t k = rows_per_wide_row(a.channels, dense, Residual);
  const int64_t whole = k == 1 ? 0 : a.rows / k;
  if (whole) {
    LeafApply wide = a;
    Wide buffers[5];
    wide.scale = buffers[0].spread(a.scale, a.channels, k);
    wide.shift = buffers[1].spread(a.shift, a.channels, k);
    wide.residual_scale = buffers[2].spread(a.residual_scale, a.channels, k);
    wide.residual_shift = buffers[3].spread(a.residual_shift, a.channels, k);
    wide.audio = buffers[4].spread(a.audio, a.channels, k);
    apply_wide<E, Norm, Residual, ResidualNorm, Audio>(wide, whole, a.channels * k, x, residual, out, a.mask, k);
  }
  const int64_t done = whole * k;
  apply_wide<E, Norm, Residual, ResidualNorm, Audio>(
      a, a.rows - done, a.channels, x + done * a.x_row, Residual ? residual + done * a.residual_row : nullptr,
      out + done * a.out_row, a.mask ? a.mask + done * ((a.channels + 7) / 8) : nullptr, 1);
}

template <class E>
void apply_type(const LeafApply& a) {
  const bool norm = a.scale, residual = a.residual, projected = a.residual_scale, audio = a.audio;
  if (!norm) return audio ? apply_rows<E, false, false, false, true>(a) : apply_rows<E, false, false, false, false>(a);
  if (!residual) return audio ? apply_rows<E, true, false, false, true>(a) : apply_rows<E, true, false, false, false>(a);
  if (!projected) return audio ? apply_rows<E, true, true, false, true>(a) : apply_rows<E, true, true, false, false>(a);
  return audio ? apply_rows<E, true, true, true, true>(a) : apply_rows<E, true, true, true, false>(a);
}

#include "cpu_backward.inc"
#include "cpu_pool.inc"

template <template <class> class F, class... A>
void by_type(Type type, A... args) {
  if (type == Type::kFloat32) return F<Float32>::run(args...);
  if (type == Type::kBFloat16) return F<BFloat16>::run(args...);
  return F<Float16>::run(args...);
}

template <class E>
struct Stats {
  static void run(const char* x, int64_t row, int64_t rows, int64_t channels, float* mean, float* squares) {
    stats_rows<E>(reinterpret_cast<const typename E::Raw*>(x), row, rows, channels, mean, squares);
  }
};
template <class E>
struct Sum {
  static void run(const char* x, int64_t row, int64_t rows, int64_t channels, float* out) {
    sum_rows<E>(reinterpret_cast<const typename E::Raw*>(x), row, rows, channels, out);
  }
};
template <class E>
struct Apply {
  static void run(const LeafApply* a) { apply_type<E>(*a); }
};
template <class E>
struct Reduce {
  static void run(const LeafBackward* a) { reduce_type<E>(*a); }
};
template <class E>
struct InputGrad {
  static void run(const LeafBackward* a) { input_grad_type<E>(*a); }
};
template <class E>
struct Pool {
  static void run(const LeafPool* a) { pool_type<E>(*a); }
};
template <class E>
struct PoolGrad {
  static void run(const LeafPoolGrad* a) { pool_grad_type<E>(*a); }
};

}  // namespace

const LeafTable& AVSF_LEAF() {
  static const LeafTable table = {
      AVSF_NAME,
      [](Type t, const char* x, int64_t row, int64_t rows, int64_t channels, float* mean, float* squares) {
        by_type<Stats>(t, x, row, rows, channels, mean, squares);
      },
      [](Type t, const LeafApply& a) { by_type<Apply>(t, &a); },
      [](Type t, const LeafBackward& a) { by_type<Reduce>(t, &a); },
      [](Type t, const LeafBackward& a) { by_type<InputGrad>(t, &a); },
      [](Type t, const char* x, int64_t row, int64_t rows, int64_t channels, float* out) {
        by_type<Sum>(t, x, row, rows, channels, out);
      },
      [](Type t, const LeafPool& a) { by_type<Pool>(t, &a); },
      [](Type t, const LeafPoolGrad& a) { by_type<PoolGrad>(t, &a); },
  };
  return table;
}

}  // namespace avsf
