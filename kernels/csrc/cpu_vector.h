// Vectors of floats as GCC's generic vectors, and their loads and stores in three element types.
// Included once per instruction set, inside an anonymous namespace: no symbol may be shared between them.
#if defined(AVSF_AVX512) || defined(AVSF_AVX2)
#include <immintrin.h>
#endif
#include <cstring>

namespace {

#if defined(AVSF_AVX512)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));
#define AVSF_INLINE inline __attribute__((always_inline))

struct Float32 {
  using Raw = float;
  static AVSF_INLINE vf load(const Raw* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static AVSF_INLINE void store(Raw* p, vf v) { std::memcpy(p, &v, sizeof v); }
};

struct BFloat16 {
  using Raw = uint16_t;
  static AVSF_INLINE vf load(const Raw* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
  static AVSF_INLINE void store(Raw* p, vf v) {  // round to nearest even; NaN stays NaN
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (vu)(v != v);
    const vh h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
    std::memcpy(p, &h, sizeof h);
  }
};

struct Float16 {
  using Raw = uint16_t;
  static AVSF_INLINE vf load(const Raw* p) {
#if defined(AVSF_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(AVSF_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf v;
    for (int i = 0; i < kLanes; ++i) {
      _Float16 h;
      std::memcpy(&h, p + i, sizeof h);
      v[i] = static_cast<float>(h);
    }
    return v;
#endif
  }
  static AVSF_INLINE void store(Raw* p, vf v) {
#if defined(AVSF_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(AVSF_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) {
      const _Float16 h = static_cast<_Float16>(v[i]);
      std::memcpy(p + i, &h, sizeof h);
    }
#endif
  }
};

// Whole vectors, or the last n < kLanes channels through a zero-filled buffer.
template <bool Whole, class E>
AVSF_INLINE vf load(const typename E::Raw* p, int n) {
  if constexpr (Whole) return E::load(p);
  typename E::Raw buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof *p);
  return E::load(buffer);
}

template <bool Whole, class E>
AVSF_INLINE void store(typename E::Raw* p, vf v, int n) {
  if constexpr (Whole) {
    E::store(p, v);
  } else {
    typename E::Raw buffer[kLanes];
    E::store(buffer, v);
    std::memcpy(p, buffer, n * sizeof *p);
  }
}

AVSF_INLINE vf splat(float value) { return value - vf{}; }
AVSF_INLINE vf select(vi keep, vf v) { return (vf)((vi)v & keep); }
// Where the rectifier passes: everything but z <= 0, so that NaN stays NaN.
AVSF_INLINE vi passes(vf z) { return ~(vi)(z <= 0.0f); }

AVSF_INLINE uint32_t to_bits(vi keep) {
#if defined(AVSF_AVX512)
  return _mm512_movepi32_mask((__m512i)keep);
#elif defined(AVSF_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)keep));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(keep[i] & 1) << i;
  return bits;
#endif
}

AVSF_INLINE vi from_bits(uint32_t bits) {
  vi place;
  for (int i = 0; i < kLanes; ++i) place[i] = 1 << i;
  return (vi)((place & static_cast<int32_t>(bits)) != 0);
}

template <bool Whole>
AVSF_INLINE void store_bits(uint8_t* p, vi keep, int n) {
  const uint32_t bits = to_bits(keep);
  std::memcpy(p, &bits, Whole ? kLanes / 8 : (n + 7) / 8);
}

template <bool Whole>
AVSF_INLINE vi load_bits(const uint8_t* p, int n) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, Whole ? kLanes / 8 : (n + 7) / 8);
  return from_bits(bits);
}

// 8-bit integers, one per lane.
template <bool Whole>
AVSF_INLINE vi load_bytes(const uint8_t* p, int n) {
  vb bytes = {};
  std::memcpy(&bytes, p, Whole ? kLanes : n);
  return __builtin_convertvector(bytes, vi);
}

template <bool Whole>
AVSF_INLINE void store_bytes(uint8_t* p, vi v, int n) {
  const vb bytes = __builtin_convertvector(v, vb);
  std::memcpy(p, &bytes, Whole ? kLanes : n);
}

// Takes z where it is larger than the best so far, or NaN: the rule of PyTorch's max pooling.
AVSF_INLINE void keep_larger(vf z, vf x, int tap, vf& best, vf& value, vi& taps) {
#if defined(AVSF_AVX512)
  const __mmask16 better =
      _mm512_cmp_ps_mask((__m512)z, (__m512)best, _CMP_GT_OQ) | _mm512_cmp_ps_mask((__m512)z, (__m512)z, _CMP_UNORD_Q);
  best = (vf)_mm512_mask_mov_ps((__m512)best, better, (__m512)z);
  value = (vf)_mm512_mask_mov_ps((__m512)value, better, (__m512)x);
  taps = (vi)_mm512_mask_set1_epi32((__m512i)taps, better, tap);
#else
  const vi better = (vi)(z > best) | (vi)(z != z);
  best = (vf)(((vi)z & better) | ((vi)best & ~better));
  value = (vf)(((vi)x & better) | ((vi)value & ~better));
  taps = (better & tap) | (taps & ~better);
#endif
}

}  // namespace
