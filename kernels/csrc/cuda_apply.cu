// Application: out = act(x*scale + shift [+ residual]) [+ keep*audio], and where the rectifier passed.
#include "cuda_common.cuh"

namespace avsf {
namespace cuda {
namespace {

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
  const float keep = a.keep ? a.keep[q.clip] : 1.0f;
  const T* from = reinterpret_cast<const T*>(a.audio) + q.clip * a.audio_clip + q.frame * a.audio_frame;
#pragma unroll
  for (int v = 0; v < V; ++v)  // keep == 0 selects zero, whatever the audio holds
    sound[v] = keep == 0.0f ? 0.0f : keep * to_float(from[(q.channel + v) * a.audio_channel]);
}

template <typename T, int V, bool Norm, int Residual, bool Audio>
__global__ void __launch_bounds__(kThreads, Residual == kNone ? 3 : 2) apply_kernel(const Plan p, const __grid_constant__ ApplyArgs a) {
  constexpr int kUnroll = Residual == kNone ? 4 : 2;
  const Place q = place<V>(p);
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
  for (int64_t row = q.row; row - q.line < q.end; row += kUnroll * q.step) {
    Raw<T, V> raw[kUnroll], other[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (q.active && row + i * q.step < q.end) {
        raw[i] = load_raw<T, V>(x + i * q.step * a.x.row);
        if constexpr (Residual) other[i] = load_raw<T, V>(residual + i * q.step * a.residual.row);
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
        store_floats<T, V>(out + i * q.step * a.out.row, z);
      }
      if (Residual && a.mask && row - q.line + i * q.step < q.end) {
        if (V == kWide ? inside : row + i * q.step < q.end) store_mask<V>(a.mask, p, q, row + i * q.step, bits);
      }
    }
    x += kUnroll * q.step * a.x.row, out += kUnroll * q.step * a.out.row;
    if constexpr (Residual) residual += kUnroll * q.step * a.residual.row;
  }
}

template <typename T, int V, bool Norm, int Residual>
void launch(cudaStream_t s, const Plan& p, const Geometry& g, const ApplyArgs& a) {
  if (a.audio) apply_kernel<T, V, Norm, Residual, true><<<grid(p, g), kThreads, 0, s>>>(p, a);
  else apply_kernel<T, V, Norm, Residual, false><<<grid(p, g), kThreads, 0, s>>>(p, a);
  check_launch("apply");
}

}  // namespace

void apply(void* stream, Type type, const Geometry* geometry, const ApplyArgs* args, int count) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  for (int i = 0; i < count; ++i) {
    const ApplyArgs& a = args[i];
    const Geometry& g = geometry[i];
    by_width(g.channels % kWide == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.out), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const Plan p = make_plan(g, V);
      by_type(type, [&](auto element) {
        using T = decltype(element);
        if (!a.coef.data) launch<T, V, false, kNone>(s, p, g, a);
        else if (!a.residual.data) launch<T, V, true, kNone>(s, p, g, a);
        else if (!a.residual_coef.data) launch<T, V, true, kPlain>(s, p, g, a);
        else launch<T, V, true, kProjected>(s, p, g, a);
      });
    });
  }
}

}  // namespace cuda
}  // namespace avsf
