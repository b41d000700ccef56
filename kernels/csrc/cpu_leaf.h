// Leaf loops of the CPU implementation over consecutive rows, one table per instruction set.
#pragma once
#include "common.h"

namespace avsf {

struct LeafApply {
  const char *x, *residual;
  char* out;
  int64_t x_row, residual_row, out_row, rows, channels;
  const float *scale, *shift, *residual_scale, *residual_shift, *audio;  // [C] each or null
  uint8_t* mask;
  int32_t relu;
};

struct LeafBackward {
  const char *dy, *x, *residual;
  char *dx, *dresidual;
  int64_t dy_row, x_row, residual_row, dx_row, dresidual_row, rows, channels;
  // scale, shift, mean: forward. slope, offset: dx = scale*dz + slope*(x - mean) + offset. [C] each.
  const float *scale, *shift, *mean, *slope, *offset;
  const float *residual_scale, *residual_mean, *residual_slope, *residual_offset;
  const uint8_t* mask;
  float* sums;  // [3, C]: sum dz, sum dz*(x - mean), sum dz*(residual - mean')
  int32_t relu;
};

// One row of pooled positions of one image; its window's input rows, null outside the image.
struct LeafPool {
  const char* x[3];
  char *y, *value;
  uint8_t* tap;
  int64_t x_row, y_row, width, out_width, channels;
  const float *scale, *shift;
};

// Two input rows (dx[1] null at an odd end) and the two pooled rows whose windows meet them (tap[1] null at the end).
struct LeafPoolGrad {
  const char *dy[2], *x[2];
  const uint8_t* tap[2];
  char* dx[2];
  int64_t dy_row, x_row, dx_row, width, out_width, channels;
  const float *scale, *mean, *slope, *offset;
};

struct LeafTable {
  const char* name;
  void (*stats)(Type, const char* x, int64_t row, int64_t rows, int64_t channels, float* mean, float* squares);
  void (*apply)(Type, const LeafApply&);
  void (*reduce)(Type, const LeafBackward&);
  void (*input_grad)(Type, const LeafBackward&);
  void (*sum)(Type, const char* x, int64_t row, int64_t rows, int64_t channels, float* out);
  void (*pool)(Type, const LeafPool&);
  void (*pool_grad)(Type, const LeafPoolGrad&);
};

const LeafTable& leaf_base();
#if defined(__x86_64__)
const LeafTable& leaf_avx2();
const LeafTable& leaf_avx512();
#endif

}  // namespace avsf
