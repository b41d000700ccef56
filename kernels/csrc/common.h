// What the CPU and the CUDA implementation share: plain structs and one table of primitives.
// Legend: N clips, C channels, P positions of a clip (T*H*W), G statistics groups.
// No torch and no standard containers here: this header is compiled once per instruction set.
#pragma once
#include <cstdint>

namespace avsf {

enum class Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t type_bytes(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// A channels-last tensor: channel stride 1, positions of a clip `row` elements apart, clips `clip` elements apart.
struct View {
  char* data = nullptr;
  int64_t clip = 0;
  int64_t row = 0;
};

// A unit is what one block of work never crosses: a clip, or one frame of it where audio differs from frame to frame.
struct Geometry {
  int64_t units = 0;
  int64_t units_per_clip = 1;
  int64_t clips_per_group = 1;
  int64_t rows = 0;  // positions of a unit
  int64_t channels = 0;
  int64_t groups = 1;
};

// Per group and channel: scale, shift, mean, invstd, 1 / count (0: running statistics, no gradient through them).
constexpr int64_t kCoefRows = 5;
struct Coef {
  const float* data = nullptr;  // [kCoefRows, G, C]
  int64_t plane = 0;            // G * C
};

// out = act(x*scale + shift [+ residual | + residual*scale' + shift']) [+ audio where kept]; without coef: out = x [+ audio].
struct ApplyArgs {
  View x, residual, out;
  Coef coef, residual_coef;
  uint8_t* mask = nullptr;  // [N*P, ceil(C/8)], bit set: gradient passes
  const char* audio = nullptr;
  int64_t audio_clip = 0, audio_channel = 0, audio_frame = 0;  // strides in elements
  const bool* keep = nullptr;                                  // [N]
  int32_t relu = 0;
};

constexpr int64_t kTotals = 4;  // gradients of bias, weight, the residual's weight, the residual's bias

// dz = (dy [+ dy2]) * 1[z > 0]; the rectifier's sign comes from mask, or from x where mask is null.
struct BackwardArgs {
  View dy, x, residual, dx, dresidual;
  View dy2;  // gradient of the output's second reader, or none; with it there is a dz
  View dz;   // written, rounded, by the first pass and read by the second one instead of dy, dy2 and mask; or none
  Coef coef, residual_coef;
  const uint8_t* mask = nullptr;
  float* sums = nullptr;    // [G, 3, C]: sum dz, sum dz*xhat, sum dz*rhat
  float* totals = nullptr;  // [kTotals, C]: the sums over the groups by parameter, or null
  int32_t relu = 0;
};

// Max pooling 1x3x3, stride 1,2,2, padding 0,1,1: an image is one frame of one clip.
struct PoolGeometry {
  int64_t images, images_per_clip, clips_per_group, groups;
  int64_t height, width, out_height, out_width, channels;
};

constexpr int kClosed = 9;  // tap of a window whose maximum the rectifier blocks: no gradient

// y = max of act(x*scale + shift) over the window; value = x there; tap = 3*row + column of the first maximum.
// Backward: dx from dy of the pooled positions, by tap.
struct PoolArgs {
  View x, y, value, dy, dx;  // y, value and dy dense
  uint8_t* tap = nullptr;    // [images * out_height * out_width, C]; with value: null where no gradient will be asked
  Coef coef;
  const float* sums = nullptr;  // [G, 3, C]
};

struct Update {
  float* mean;
  float* variance;
  int64_t* batches;
  const float* stats;  // [G, 3, C]
  int64_t groups, channels;
};

// Statistics to coefficients; `plane` is the distance of two rows of coef.
struct Finish {
  const float *weight, *bias;  // [C] or null
  double eps;
  float* coef;
  int64_t plane;
};

// Statistics of one input, and the coefficients made of them.
struct Measure {
  View x;
  float* stats = nullptr;  // [G, 3, C]
  Finish finish = {};
};

// Both passes of a normalisation: measure up to two inputs (x, and a projected residual), then apply.
struct NormArgs {
  Measure measure[2];
  int32_t inputs = 0;  // how many of `measure`
  ApplyArgs apply;
  bool blocked = false;  // group by group, so that the second pass finds its group in the cache
};

// One implementation: every pointer lives on its device; `stream` is null on the CPU.
struct Primitives {
  // Whether the first pass of a backward shall write a rectified residual's gradient (dz) for the second one to read.
  bool dz_first;
  // Floats of scratch memory that norm, stats, reduce and norm_grad need for this geometry.
  int64_t (*scratch)(const Geometry&);
  void (*norm)(void* stream, Type, const Geometry&, const NormArgs&, float* scratch);
  void (*norm_grad)(void* stream, Type, const Geometry&, const BackwardArgs&, bool blocked, float* scratch);
  // `finish` (may be null): also the coefficients, in the same pass over the partial results.
  void (*stats)(void* stream, Type, const Geometry&, View x, float* scratch, float* stats, const Finish* finish);
  void (*finalize)(void* stream, const float* stats, int64_t groups, int64_t channels, const Finish&);
  void (*given)(void* stream, const float* mean, const float* variance, const float* weight, const float* bias,
                double eps, int64_t channels, float* coef);
  void (*apply)(void* stream, Type, const Geometry* geometry, const ApplyArgs* args, int count);
  void (*reduce)(void* stream, Type, const Geometry&, const BackwardArgs&, float* scratch);
  void (*input_grad)(void* stream, Type, const Geometry&, const BackwardArgs&);
  void (*frame_sum)(void* stream, Type, const Geometry&, View dy, const bool* keep, char* out);
  void (*update)(void* stream, const Update* updates, int64_t count, double momentum);
  void (*pool)(void* stream, Type, const PoolGeometry&, const PoolArgs&);
  void (*pool_grad)(void* stream, Type, const PoolGeometry&, const PoolArgs&);
};

const Primitives& cpu_primitives();
#ifdef AVSF_WITH_CUDA
const Primitives& cuda_primitives();
#endif

}  // namespace avsf
