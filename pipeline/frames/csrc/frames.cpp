// Frames of a clip in one pass: decoded planes (8-bit luma, half-size interleaved chroma) to normalised RGB crops.
//
// The arithmetic is that of DALI's CPU operators in their order (resize, colour, normalise), rounded to 8 bit in the
// same places: single precision, no fused multiply-add (-ffp-contract=off), halves to even. So results depend neither
// on the instruction set nor on the number of threads. A C interface without Python or torch; nothing is kept between
// calls, and several threads may call at once.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#ifdef __SSE2__
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "two and four bytes are read as one number");

namespace {

// The memory of one call, taken at once and given back at its end; 64-byte lines.
class Arena {
 public:
  explicit Arena(size_t bytes) : memory_(static_cast<char*>(std::malloc(bytes))), left_(memory_ ? bytes : 0) {}
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool whole() const { return memory_ != nullptr; }
  static size_t taken(int64_t count) { return (static_cast<size_t>(count) * 4 + 63) / 64 * 64; }
  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) == 4, "four bytes each");
    const size_t bytes = taken(count);
    if (bytes > left_) std::abort();  // the sizes asked for and taken are a few lines apart: a mistake here
    T* place = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes, left_ -= bytes;
    return place;
  }

 private:
  char* memory_;
  size_t left_, used_ = 0;
};

// Two neighbouring samples and their weights for every output row or column; positions are clamped to the picture.
struct Taps {
  int32_t size = 0;
  int32_t *first = nullptr, *second = nullptr;
  float *first_weight = nullptr, *second_weight = nullptr;
  int32_t regular_begin = 0, regular_end = 0;  // where second == first + 1
  int32_t low = 0, high = 0;                   // samples read: low <= i < high
  Taps() = default;
  Taps(Arena& arena, int32_t count)
      : size(count), first(arena.take<int32_t>(count)), second(arena.take<int32_t>(count)),
        first_weight(arena.take<float>(count)), second_weight(arena.take<float>(count)) {}
};

struct Range {
  int32_t low, high;
};

// The part of a side that DALI's resize takes into account.
Range touched(float start, float end, int32_t length) {
  const auto inside = [length](float at) {
    const float down = std::floor(at);
    return down <= 0 ? 0 : down >= static_cast<float>(length) ? length : static_cast<int32_t>(down);
  };
  return {inside(start - 1.0f), inside(end + 2.0f)};
}

void fill_taps(Taps& taps, int32_t length, float start, float end, int32_t offset, bool mirror) {
  const int32_t size = taps.size;
  const float scale = (end - start) / static_cast<float>(size);
  const float origin = (start - static_cast<float>(offset)) + (0.5f * scale - 0.5f - 1.0f);
  const auto clamped = [length](int32_t at) { return at < 0 ? 0 : at > length - 1 ? length - 1 : at; };
  taps.low = length, taps.high = 0;
  for (int32_t i = 0; i < size; ++i) {
    const float at = static_cast<float>(i) * scale + origin;
    const float up = std::ceil(at);
    const float a = up - at, b = 1.0f - ((a + 1.0f) - 1.0f), sum = a + b;
    const int32_t place = static_cast<int32_t>(up) + offset, to = mirror ? size - 1 - i : i;
    taps.first[to] = clamped(place), taps.second[to] = clamped(place + 1);
    taps.first_weight[to] = a / sum, taps.second_weight[to] = b / sum;
    if (taps.first[to] < taps.low) taps.low = taps.first[to];
    if (taps.second[to] >= taps.high) taps.high = taps.second[to] + 1;
  }
  taps.regular_begin = 0;
  const auto regular = [&taps](int32_t i) { return taps.second[i] == taps.first[i] + 1; };
  while (taps.regular_begin < size && !regular(taps.regular_begin)) ++taps.regular_begin;
  taps.regular_end = taps.regular_begin;
  while (taps.regular_end < size && regular(taps.regular_end)) ++taps.regular_end;
}

// How one plane is resized for one crop.
struct Resize {
  bool rows_first = false;  // blend two rows, then pick columns; else columns first, each source row once
  Taps rows, columns;
  Resize(Arena& arena, int32_t out_h, int32_t out_w) : rows(arena, out_h), columns(arena, out_w) {}

  // window: top, left, bottom, right in luma pixels; part: 1 for luma, 0.5 for chroma.
  void set(int32_t height, int32_t width, const float* window, float part, bool mirror) {
    const float top = window[0] * part, left = window[1] * part, bottom = window[2] * part, right = window[3] * part;
    const Range y = touched(top, bottom, height), x = touched(left, right, width);
    // DALI's estimate of the cheaper order: only where a sum lies between two levels does the order show.
    const int64_t area = int64_t{rows.size} * columns.size;
    const int64_t blended = int64_t{x.high - x.low} * rows.size, picked = int64_t{columns.size} * (y.high - y.low);
    rows_first = 5 * blended + area < 6 * picked;
    fill_taps(rows, height, top, bottom, rows_first ? 0 : y.low, false);
    fill_taps(columns, width, left, right, rows_first ? x.low : 0, mirror);
  }
};

struct Picture {
  const uint8_t* luma;
  const uint8_t* chroma;
  int64_t luma_row, chroma_row;  // bytes between rows
};

struct Normal {
  float mean, scale;
  const uint16_t* halves;  // float16 bits of every level, or null for float32
  int32_t channels;
  bool beyond_caches;  // write past the caches: more is written than they hold
};

// Rows of one output width that a frame is made in, two cached ones of each plane, and one row of a plane.
struct Rows {
  float *luma[2], *blue[2], *red[2], *y, *cb, *cr, *blended;
  uint32_t* words;
  float* made;  // a finished row
  uint16_t* made_halves;
  Rows(Arena& arena, int32_t out_w, int32_t width) {
    for (float** row : {&luma[0], &luma[1], &blue[0], &blue[1], &red[0], &red[1], &y, &cb, &cr})
      *row = arena.take<float>(out_w);
    words = arena.take<uint32_t>(out_w);
    blended = arena.take<float>(width + 1);
    made = arena.take<float>(4 * int64_t{out_w} + 8);  // converted in groups of eight
    made_halves = reinterpret_cast<uint16_t*>(arena.take<uint32_t>(2 * int64_t{out_w} + 4));
  }
};

size_t working_bytes(int32_t width, int32_t out_h, int32_t out_w) {
  return 8 * Arena::taken(out_h) + 18 * Arena::taken(out_w) + Arena::taken(width + 1) +
         Arena::taken(4 * int64_t{out_w} + 8) + Arena::taken(2 * int64_t{out_w} + 4);
}

// Copy a finished row to memory that is not read again soon: past the caches, which would first read what it replaces.
inline void stream(uint8_t* to, const void* made, int64_t bytes) {
  const uint8_t* from = static_cast<const uint8_t*>(made);
#ifdef __SSE2__
  const int64_t head = (16 - (reinterpret_cast<uintptr_t>(to) & 15)) & 15;
  if (bytes >= 256) {
    std::memcpy(to, from, head);
    int64_t at = head;
    for (; at + 16 <= bytes; at += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
    std::memcpy(to + at, from + at, bytes - at);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace

#define AVSF_LEVEL base
#include "frames_leaf.inc"
#undef AVSF_LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AVSF_DISPATCH 1
#define AVSF_F16C 1
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#define AVSF_LEVEL avx2
#include "frames_leaf.inc"
#undef AVSF_LEVEL
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define AVSF_LEVEL avx512
#include "frames_leaf.inc"
#undef AVSF_LEVEL
#pragma GCC pop_options
#undef AVSF_F16C
#endif

namespace {

int32_t best_level() {
#ifdef AVSF_DISPATCH
  if (!__builtin_cpu_supports("f16c")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
#endif
  return 0;
}

bool inside(float low, float high, int32_t length) {
  constexpr float slack = 0.01f;  // px: windows are sums of rounded numbers
  return low >= -slack && high > low && high <= static_cast<float>(length) + slack;
}

}  // namespace

#define AVSF_SHOWN extern "C" __attribute__((visibility("default")))

// Instruction sets that this processor has of those compiled in: 0 base, 1 AVX2, 2 AVX-512.
AVSF_SHOWN int32_t avsf_frames_level() { return best_level(); }

struct avsf_frames_job {
  const uint8_t* luma;    // (frames, height, width)
  const uint8_t* chroma;  // (frames, ceil(height / 2), ceil(width / 2), 2)
  int64_t luma_frame, luma_row, chroma_frame, chroma_row;  // bytes from one to the next
  int32_t frames, height, width;
  int32_t crops, out_height, out_width;
  const float* windows;  // (crops, 4): top, left, bottom, right in luma pixels
  int32_t mirror, channels, level;  // level: as avsf_frames_level, -1 for the best
  float mean, scale;                // value = (level of 0..255 - mean) * scale
  const uint16_t* halves;           // 256 float16 bit patterns: 16-bit output; null: float32
  void* out;                        // (crops, frames, out_height, out_width, channels), dense
};

// Returns 0; 1: sizes, 2: a window leaves the picture, 3: no such instruction set here, 4: no memory.
AVSF_SHOWN int32_t avsf_frames(const avsf_frames_job* job) {
  constexpr int32_t most = 1 << 15;
  const int32_t half_h = (job->height + 1) / 2, half_w = (job->width + 1) / 2;
  const bool sizes = job->frames >= 0 && job->crops >= 1 && job->height >= 1 && job->height <= most &&
                     job->width >= 1 && job->width <= most && job->out_height >= 1 && job->out_height <= most &&
                     job->out_width >= 1 && job->out_width <= most && (job->channels == 3 || job->channels == 4) &&
                     job->luma_row >= job->width && job->chroma_row >= 2 * int64_t{half_w};
  if (!sizes) return 1;
  const int32_t level = job->level < 0 ? best_level() : job->level;
  if (level > best_level()) return 3;
  for (int32_t crop = 0; crop < job->crops; ++crop) {
    const float* w = job->windows + 4 * crop;
    if (!inside(w[0], w[2], job->height) || !inside(w[1], w[3], job->width)) return 2;
  }
  Arena arena(working_bytes(job->width, job->out_height, job->out_width));
  if (!arena.whole()) return 4;
  Resize luma(arena, job->out_height, job->out_width), chroma(arena, job->out_height, job->out_width);
  Rows rows(arena, job->out_width, job->width);
  const int64_t frame_bytes =
      int64_t{job->out_height} * job->out_width * job->channels * (job->halves != nullptr ? 2 : 4);
  const bool beyond_caches = job->crops * frame_bytes * job->frames >= 1 << 20;
  const Normal normal{job->mean, job->scale, job->halves, job->channels, beyond_caches};
  uint8_t* out = static_cast<uint8_t*>(job->out);
  for (int32_t crop = 0; crop < job->crops; ++crop) {
    const float* window = job->windows + 4 * crop;
    luma.set(job->height, job->width, window, 1.0f, job->mirror != 0);
    chroma.set(half_h, half_w, window, 0.5f, job->mirror != 0);
    for (int32_t frame = 0; frame < job->frames; ++frame, out += frame_bytes) {
      const Picture picture{job->luma + frame * job->luma_frame, job->chroma + frame * job->chroma_frame,
                            job->luma_row, job->chroma_row};
#ifdef AVSF_DISPATCH
      if (level == 2) avx512::frame(picture, luma, chroma, normal, rows, out);
      else if (level == 1) avx2::frame(picture, luma, chroma, normal, rows, out);
      else
#endif
        base::frame(picture, luma, chroma, normal, rows, out);
    }
  }
#ifdef __SSE2__
  _mm_sfence();
#endif
  return 0;
}
