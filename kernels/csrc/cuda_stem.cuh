// What the kernels of both first convolutions share. Legend: kernels/csrc/stem.h.
//
// A pixel is four 16-bit channels, two neighbouring pixels a chunk of 16 bytes. Output x of a row sees the four chunks x - 2
// to x + 1, pixels 2x - 4 to 2x + 3: eight taps, of which the first has no weight (kw = slot - 1). So the patches of
// neighbouring outputs are rows 16 bytes apart of one line of shared memory, which the matrix loads read as they are:
//
//     line   | x-2 | x-1 |  x  | x+1 | x+2 | ...       chunks; a patch of one line, (slot, channel), is K = 32 = 2 x 16
//     output x       =======================
//     output x + 1         =======================
//
// Products are 16 outputs x 8 columns. Columns are in parts of eight: Fast's are its channels, one part for each temporal tap;
// Slow's are its 64 channels.
#pragma once
#include "cuda_common.cuh"
#include "cuda_ptx.cuh"
#include "stem.h"

namespace avsf {
namespace cuda {
namespace {

struct FastStem {
  static constexpr int kParts = kStemTime;
  static constexpr int kOutStep = 0, kTimeStep = 1;  // of one part to the next
};

struct SlowStem {
  static constexpr int kParts = kSlowStemOut / 8;
  static constexpr int kOutStep = 8, kTimeStep = 0;
};

constexpr int kChunk = 16;  // bytes
constexpr int kTile = 16;   // outputs
template <typename Kind>
constexpr int kFragments = kStemSpace * Kind::kParts * 32;  // one uint4 each: both halves of K of a lane
template <typename Kind>
constexpr int kPackedBytes = kFragments<Kind> * static_cast<int>(sizeof(uint4));
template <typename Kind>
constexpr int kPartial = kFragments<Kind> * 8;  // floats: a block's share of the weight gradient
constexpr int kGradThreads = 32 * kStemSpace;   // a warp per kh
constexpr int kReduceLines = 16;
template <int MT>
constexpr int kPitch = (kTile * MT + 3) * kChunk;  // bytes of a line

struct StemPlan {
  int64_t x_clip, y_clip, y_row;  // strides in elements
  int frames, height, width, out_height, out_width;
  int rows, lines;                   // of a block: output rows, input lines 2 * rows + 5
  int row_blocks, column_blocks;
  int frames_per_block;              // forward: output frames of a block
  int64_t items;                     // weight gradient: clips * row_blocks * column_blocks
  bool whole_chunks;                 // chunks of the input are aligned: W is even
};

struct Corner {
  int64_t clip;
  int y, x;  // first output of the block
};

template <int MT>
__device__ __forceinline__ Corner corner(const StemPlan& p, int64_t item) {
  const int64_t clip = item / (p.row_blocks * p.column_blocks);
  const int place = static_cast<int>(item % (p.row_blocks * p.column_blocks));
  return {clip, place % p.row_blocks * p.rows, place / p.row_blocks * kTile * MT};
}

// Starts loading a block's lines of one frame: line l is input row 2y - 3 + l, its chunk c pixels 2(x - 2 + c) and the next;
// zero outside the picture.
template <int MT>
__device__ __forceinline__ void load_lines(Shared to, const char* x, const StemPlan& p, const Corner& at, int frame) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const char* picture = x + 2 * (at.clip * p.x_clip + int64_t{frame} * p.height * p.width * kStemPixel);
  for (int line = threadIdx.x / 32; line < p.lines; line += warps) {
    const int row = 2 * at.y - 3 + line;
    const bool inside = row >= 0 && row < p.height;
    const char* from = picture + (inside ? int64_t{row} * p.width * 8 : 0);
    const Shared start = to + line * kPitch<MT>;
#pragma unroll 1
    for (int c = lane; c < kTile * MT + 3; c += 32) {
      const int pixel = 2 * (at.x - 2 + c);
      const bool left = inside && pixel >= 0 && pixel < p.width;
      if (p.whole_chunks) {
        copy_async<16>(start + c * kChunk, from + (left ? pixel * 8 : 0), left);
      } else {
        const bool right = inside && pixel >= -1 && pixel + 1 < p.width;
        copy_async<8>(start + c * kChunk, from + (left ? pixel * 8 : 0), left);
        copy_async<8>(start + c * kChunk + 8, from + (right ? pixel * 8 + 8 : 0), right);
      }
    }
  }
}

// Where a weight lies: column `column` of a part.
template <typename Kind>
__device__ __forceinline__ int64_t place(const StemWeight& w, int part, int column, int channel, int kh, int kw) {
  return (part * Kind::kOutStep + column) * w.stride[0] + channel * w.stride[1] + part * Kind::kTimeStep * w.stride[2] +
         kh * w.stride[3] + kw * w.stride[4];
}

// Weights as the products want them: element (kh, part, lane), both halves of K.
template <typename T, typename Kind>
__global__ void stem_pack_kernel(const StemWeight w, uint32_t* __restrict__ packed) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= kFragments<Kind> * 4) return;
  const int word = at % 4, lane = at / 4 % 32, part = at / 128 % Kind::kParts, kh = at / 128 / Kind::kParts;
  T pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int k = word / 2 * 16 + word % 2 * 8 + lane % 4 * 2 + i;  // of the patch: slot * 4 + channel
    const int kw = k / kStemPixel - 1, channel = k % kStemPixel;
    float value = 0.0f;
    if (kw >= 0 && channel < kStemIn) {
      const int64_t offset = place<Kind>(w, part, lane / 4, channel, kh, kw);
      if (w.type == Type::kFloat32) value = reinterpret_cast<const float*>(w.data)[offset];
      else if (w.type == Type::kFloat16) value = to_float(reinterpret_cast<const __half*>(w.data)[offset]);
      else value = to_float(reinterpret_cast<const __nv_bfloat16*>(w.data)[offset]);
    }
    pair[i] = from_float<T>(value);
  }
  reinterpret_cast<Raw<T, 1>*>(packed)[2 * at].value[0] = pair[0];
  reinterpret_cast<Raw<T, 1>*>(packed)[2 * at + 1].value[0] = pair[1];
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// One block: 32 sums; 16 lines add the partial ones, in a fixed order.
template <typename Kind>
__global__ void stem_reduce_kernel(const float* __restrict__ partial, int parts, const StemWeight w) {
  __shared__ double lines[kReduceLines][32];
  const int at = blockIdx.x * 32 + threadIdx.x;
  double total = 0;
  for (int i = threadIdx.y; i < parts; i += kReduceLines) total += partial[int64_t{i} * kPartial<Kind> + at];
  lines[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int i = 1; i < kReduceLines; ++i) total += lines[i][threadIdx.x];
  const int word = at % 4, lane = at / 4 % 32, half = at / 128 % 2, part = at / 256 % Kind::kParts, kh = at / 256 / Kind::kParts;
  const int k = half * 16 + lane / 4 + word / 2 * 8, kw = k / kStemPixel - 1, channel = k % kStemPixel;
  if (kw < 0 || channel >= kStemIn) return;
  const int64_t offset = place<Kind>(w, part, lane % 4 * 2 + word % 2, channel, kh, kw);
  const float value = static_cast<float>(total);
  if (w.type == Type::kFloat32) reinterpret_cast<float*>(w.data)[offset] = value;
  else if (w.type == Type::kFloat16) reinterpret_cast<__half*>(w.data)[offset] = from_float<__half>(value);
  else reinterpret_cast<__nv_bfloat16*>(w.data)[offset] = from_float<__nv_bfloat16>(value);
}

// ---- launches

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess)
    throw std::runtime_error("avsf: the CUDA device does not answer");
  return value;
}

// Two blocks a multiprocessor; not more than there are steps.
inline int grad_blocks(int64_t steps) {
  return static_cast<int>(std::min(2 * int64_t{attribute(cudaDevAttrMultiProcessorCount)}, steps));
}

template <typename F>
void by_tiles(const StemGeometry& g, F f) {  // the width of a block that wastes least
  const int64_t tiles = (g.out_width + kTile - 1) / kTile;
  const auto padded = [&](int64_t width) { return (tiles + width - 1) / width * width; };
  if (padded(7) <= padded(4)) f(std::integral_constant<int, 7>{});
  else f(std::integral_constant<int, 4>{});
}

inline StemPlan stem_plan(const StemGeometry& g, const StemArgs& a, int rows, int tiles) {
  if (g.height * g.width >= (1ll << 27) || g.frames >= (1 << 16) || g.clips >= (1 << 16))
    throw std::runtime_error("avsf: clips too large for stem_conv");
  StemPlan p = {};
  p.x_clip = a.x.clip, p.y_clip = a.y.clip, p.y_row = a.y.row;
  p.frames = static_cast<int>(g.frames), p.height = static_cast<int>(g.height), p.width = static_cast<int>(g.width);
  p.out_height = static_cast<int>(g.out_height), p.out_width = static_cast<int>(g.out_width);
  p.rows = rows, p.lines = 2 * rows + kStemSpace - 2;
  p.row_blocks = (p.out_height + rows - 1) / rows;
  p.column_blocks = (p.out_width + kTile * tiles - 1) / (kTile * tiles);
  p.items = g.clips * p.row_blocks * p.column_blocks;
  p.frames_per_block = p.frames;
  p.whole_chunks = p.width % 2 == 0 && p.x_clip % 8 == 0 && reinterpret_cast<uintptr_t>(a.x.data) % kChunk == 0;
  return p;
}

template <typename K>
void allow_shared(K kernel, int bytes) {
  if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    throw std::runtime_error("avsf: stem_conv needs " + std::to_string(bytes) + " bytes of shared memory");
}

template <typename F>
void by_half_type(Type type, F f) {
  if (type == Type::kBFloat16) f(__nv_bfloat16{});
  else if (type == Type::kFloat16) f(__half{});
  else throw std::runtime_error("avsf: stem_conv on CUDA takes bfloat16 and float16");
}

template <typename T, typename Kind>
void pack_weights(cudaStream_t s, const StemArgs& a) {
  constexpr int blocks = (kFragments<Kind> * 4 + kThreads - 1) / kThreads;
  stem_pack_kernel<T, Kind><<<blocks, kThreads, 0, s>>>(a.weight, reinterpret_cast<uint32_t*>(a.work));
  check_launch("stem_pack");
}

template <typename Kind>
void reduce_weights(cudaStream_t s, const StemArgs& a, int parts) {
  const float* partial = reinterpret_cast<const float*>(a.work);
  stem_reduce_kernel<Kind><<<kPartial<Kind> / 32, dim3(32, kReduceLines), 0, s>>>(partial, parts, a.weight);
  check_launch("stem_reduce");
}

// The most rows of a block, at most `rows`, with which two blocks fit into the shared memory of a multiprocessor.
template <typename F>
int fitting_rows(int rows, F bytes) {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024;
  while (rows > 1 && bytes(rows) > most) --rows;
  return rows;
}

}  // namespace
}  // namespace cuda
}  // namespace avsf
