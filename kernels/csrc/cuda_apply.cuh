// Application: out = act(x*scale + shift [+ residual]) [+ keep*audio], and where the rectifier passed.
#pragma once
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {

enum ResidualForm : int { kNone = 0, kPlain = 1, kProjected = 2 };

// One mask byte per eight channels: whole in a wide thread, by ballot over a warp (32 channels of one row) in a narrow one.
template <int V>
__device__ __forceinline__ void store_mask(uint8_t* mask, const Plan& p, const Place& q, int64_t row, uint32_t bits) {
  uint8_t* to = mask + (q.unit * p.rows + row) * p.mask_row + q.channel / 8;
  if constexpr (V == kWide) {
    if (q.active) *to = static_cast<uint8_t>(bits);
  } else {
    const uint32_t warp = __ballot_sync(0xffffffffu, bits);
    if (q.lane % 8 == 0 && q.active) *to = static_cast<uint8_t>(warp >> q.lane);
  }
}

template <typename T, int V>
__device__ __forceinline__ void load_audio(float (&sound)[V], const ApplyArgs& a, const Place& q) {
  const bool kept = a.keep == nullptr || a.keep[q.clip];
  const T* from = reinterpret_cast<const T*>(a.audio) + q.clip * a.audio_clip + q.frame * a.audio_frame;
#pragma unroll
  for (int v = 0; v < V; ++v)  // a dropped clip's audio is zero, whatever it holds
    sound[v] = kept ? to_float(from[(q.channel + v) * a.audio_channel]) : 0.0f;
}

template <typename T, int V, bool Norm, int Residual, bool Audio>
__device__ __forceinline__ void apply_block(const Plan& p, const Place& q, const ApplyArgs& a) {
  constexpr int kUnroll = Residual == kNone ? 4 : 2;
  float scale[V], shift[V], other_scale[V], other_shift[V], sound[V];
  if (q.active) {
    if constexpr (Norm) {
      load_params<V>(scale, coef_row(a.coef, 0, p, q));
      load_params<V>(shift, coef_row(a.coef, 1, p, q));
    }
    if constexpr (Residual == kProjected) {
      load_params<V>(other_scale, coef_row(a.residual_coef, 0, p, q));
      load_params<V>(other_shift, coef_row(a.residual_coef, 1, p, q));
    }
    if constexpr (Audio) load_audio<T, V>(sound, a, q);
  }
  const T* x = reinterpret_cast<const T*>(a.x.data) + offset<T>(a.x, p, q);
  const T* residual = Residual ? reinterpret_cast<const T*>(a.residual.data) + offset<T>(a.residual, p, q) : nullptr;
  T* out = reinterpret_cast<T*>(a.out.data) + offset<T>(a.out, p, q);
  // Whole blocks walk together, so that a narrow warp votes on the mask with all its threads.
  const int step_x = stride(a.x, q), step_r = stride(a.residual, q), step_out = stride(a.out, q);
  for (int row = q.row; row - q.line < q.end; row += kUnroll * q.step) {
    Raw<T, V> raw[kUnroll], other[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (q.active && row + i * q.step < q.end) {
        raw[i] = load_last<T, V>(x + i * step_x);
        if constexpr (Residual) other[i] = load_last<T, V>(residual + i * step_r);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const bool inside = q.active && row + i * q.step < q.end;
      float z[V];
      uint32_t bits = 0;
      if (inside) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          z[v] = to_float(raw[i].value[v]);
          if constexpr (Norm) z[v] = fmaf(z[v], scale[v], shift[v]);
          if constexpr (Residual == kPlain) z[v] += to_float(other[i].value[v]);
          if constexpr (Residual == kProjected)
            z[v] += fmaf(to_float(other[i].value[v]), other_scale[v], other_shift[v]);
          if (a.relu) {
            const bool passes = !(z[v] <= 0.0f);  // NaN passes
            bits |= static_cast<uint32_t>(passes) << v;
            z[v] = passes ? z[v] : 0.0f;
          }
          if constexpr (Audio) z[v] += sound[v];
        }
        store_floats<T, V>(out + i * step_out, z);
      }
      if (Residual && a.mask && row - q.line + i * q.step < q.end) {
        if (V == kWide ? inside : row + i * q.step < q.end) store_mask<V>(a.mask, p, q, row + i * q.step, bits);
      }
    }
    x += kUnroll * step_x, out += kUnroll * step_out;
    if constexpr (Residual) residual += kUnroll * step_r;
  }
}

}  // namespace cuda
}  // namespace avsf
