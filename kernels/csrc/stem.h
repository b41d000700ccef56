// The first convolutions of the visual pathways, stride 1,2,2: Fast's, 3 -> 8 channels, kernel 5x7x7, padding 2,3,3, and Slow's,
// 3 -> 64 channels, kernel 1x7x7, padding 0,3,3. What their operations and their CUDA parts share.
// Legend: N clips, T frames, H W pixels of the input, H' = ceil(H / 2), W' = ceil(W / 2) of the output.
#pragma once
#include "common.h"

namespace avsf {

constexpr int kStemOut = 8, kSlowStemOut = 64;     // channels
constexpr int kStemIn = 3, kStemPixel = 4;         // channels; a pixel of the input holds a fourth one
constexpr int kStemTime = 5, kStemSpace = 7;       // taps; Slow's has one in time

struct StemGeometry {
  int64_t clips, frames, height, width, out_height, out_width;
};

// (8, 3, 5, 7, 7) or (64, 3, 1, 7, 7), any strides.
struct StemWeight {
  char* data = nullptr;
  Type type = Type::kFloat32;
  int64_t stride[5] = {};
};

struct StemArgs {
  View x;             // (N, 4, T, H, W): row == 4
  View y;             // (N, 8 or 64, T, H', W'): the output, or its gradient
  StemWeight weight;  // read by the forward, written (as gradient) by the backward
  char* work = nullptr;
};

struct StemPrimitives {
  // Bytes of scratch memory for the forward or the weight gradient.
  int64_t (*scratch)(const StemGeometry&, bool gradient);
  // `type` is the element type of x and y.
  void (*forward)(void* stream, Type type, const StemGeometry&, const StemArgs&);
  void (*weight_grad)(void* stream, Type type, const StemGeometry&, const StemArgs&);
};

const StemPrimitives& cuda_stem();
const StemPrimitives& cuda_slow_stem();  // the CPU's form is plain torch: kernels/stem.py

}  // namespace avsf
