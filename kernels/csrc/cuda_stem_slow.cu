// Slow's first convolution on tensor cores, without im2col: kernels/csrc/cuda_stem.cuh. Legend: kernels/csrc/stem.h.
// Forward: a block makes four output rows of one frame; a warp one tile of 16 outputs in each of them, in two passes of 32
// channels. Weight gradient: M = (slot, channel), N = 64 channels, K = 16 outputs; a warp owns one kh. Blocks share all
// (clip, rows, frame) evenly; partial sums are added in order.
#include "cuda_stem.cuh"

namespace avsf {
namespace cuda {
namespace {

constexpr int kForwardRows = 4, kPass = 4;  // parts of eight channels in one pass
constexpr int kGradRows = 2;
constexpr int kPixelBytes = 2 * kSlowStemOut;
template <int MT>
constexpr int kGradPitch = kTile * MT * kPixelBytes;  // bytes of a line of the output's gradient

// ---- forward

// Four lanes hold two channels of each of four parts: afterwards lane q holds the eight of part q.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[kPass]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, q & 1 ? v[i] : v[i + 1], 1);
    v[i] = q & 1 ? other : v[i], v[i + 1] = q & 1 ? v[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, q & 2 ? v[i] : v[i + 2], 2);
    v[i] = q & 2 ? other : v[i], v[i + 2] = q & 2 ? v[i + 2] : other;
  }
}

// grid: (places of a picture, frames, clips).
template <typename T, int MT>
__global__ void __launch_bounds__(32 * MT, MT == 7 ? 2 : 4)
    slow_stem_kernel(const StemPlan p, const char* __restrict__ x, const uint4* __restrict__ packed, char* __restrict__ y) {
  unsigned char* const memory = dynamic_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, frame = blockIdx.y;
  const Corner at = corner<MT>(p, int64_t{blockIdx.z} * gridDim.x + blockIdx.x);
  const Shared input = shared_address(memory) + kPackedBytes<SlowStem>;
  for (int i = threadIdx.x; i < kFragments<SlowStem>; i += 32 * MT)
    copy_async<16>(shared_address(memory) + i * kChunk, packed + i, true);
  load_lines<MT>(input, x, p, at, frame);
  wait_for_copies();
  __syncthreads();
  const int first = at.x + warp * kTile + lane / 4;
  if (at.x + warp * kTile >= p.out_width) return;
  const Shared own = input + (warp * kTile + lane % 16 + lane / 16) * kChunk;
#pragma unroll 1
  for (int pass = 0; pass < SlowStem::kParts / kPass; ++pass) {
    const uint4* const weights = reinterpret_cast<const uint4*>(memory) + pass * kPass * 32 + lane;
    float sum[kForwardRows][kPass][4] = {};
#pragma unroll 1
    for (int kh = 0; kh < kStemSpace; ++kh) {
      uint4 b[kPass];
#pragma unroll
      for (int n = 0; n < kPass; ++n) b[n] = weights[(kh * SlowStem::kParts + n) * 32];
#pragma unroll
      for (int row = 0; row < kForwardRows; ++row) {
        uint32_t low[4], high[4];  // slots 0-3, 4-7
        load_matrices<false>(low, own + (2 * row + kh) * kPitch<MT>);
        load_matrices<false>(high, own + (2 * row + kh) * kPitch<MT> + 2 * kChunk);
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_add<T>(sum[row][n], low, b[n].x, b[n].y);
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_add<T>(sum[row][n], high, b[n].z, b[n].w);
      }
    }
    uint4* out = reinterpret_cast<uint4*>(y) + at.clip * (p.y_clip / 8) +
                 int64_t{frame} * p.out_height * p.out_width * SlowStem::kParts + pass * kPass + lane % 4;
#pragma unroll
    for (int row = 0; row < kForwardRows; ++row)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v[kPass];
#pragma unroll
        for (int n = 0; n < kPass; ++n) v[n] = pack<T>(sum[row][n][2 * half], sum[row][n][2 * half + 1]);
        transpose_quad(v);
        const int column = first + half * 8;
        if (at.y + row < p.out_height && column < p.out_width)
          out[(int64_t{at.y + row} * p.out_width + column) * SlowStem::kParts] = make_uint4(v[0], v[1], v[2], v[3]);
      }
  }
}

// ---- weight gradient

// Starts loading a block's rows of one frame of the output's gradient. Part n of output c lies at chunk n ^ c % 8 of its 128
// bytes, so that the matrix loads of eight outputs meet eight different chunks; zero outside.
template <int MT>
__device__ __forceinline__ void load_slow_gradient(Shared to, const char* dy, const StemPlan& p, const Corner& at, int frame) {
  const int lane = threadIdx.x % 32, part = lane % 8;
  const char* picture = dy + 2 * (at.clip * p.y_clip + int64_t{frame} * p.out_height * p.out_width * p.y_row);
  for (int line = 0; line < p.rows; ++line) {
    const bool inside = at.y + line < p.out_height;
    const char* from = picture + (inside ? 2 * int64_t{at.y + line} * p.out_width * p.y_row : 0) + part * kChunk;
#pragma unroll 1
    for (int c = threadIdx.x / 8; c < kTile * MT; c += kGradThreads / 8) {
      const bool there = inside && at.x + c < p.out_width;
      copy_async<16>(to + line * kGradPitch<MT> + c * kPixelBytes + (part ^ c % 8) * kChunk,
                     from + (there ? 2 * (at.x + c) * p.y_row : 0), there);
    }
  }
}

// Block b takes the b-th share of all steps (item, frame). partial: [block, kh, part, half of K, lane, 4].
template <typename T, int MT>
__global__ void __launch_bounds__(kGradThreads, 2)
    slow_stem_grad_kernel(const StemPlan p, const char* __restrict__ x, const char* __restrict__ dy, float* __restrict__ partial) {
  const int lane = threadIdx.x % 32, kh = threadIdx.x / 32;
  const int64_t steps = p.items * p.frames;
  const int64_t begin = steps * blockIdx.x / gridDim.x, end = steps * (blockIdx.x + 1) / gridDim.x;
  const Shared input = shared_address(dynamic_shared());
  const int lines_bytes = p.lines * kPitch<MT>, buffer = lines_bytes + p.rows * kGradPitch<MT>;
  const Shared own = input + kh * kPitch<MT> + (lane % 8 + lane / 16 * 8 + lane / 8 % 2) * kChunk;
  Shared own_gradient[SlowStem::kParts / 2];  // of two parts: outputs 0-7 and 8-15, then the second part's
#pragma unroll
  for (int k = 0; k < SlowStem::kParts / 2; ++k)
    own_gradient[k] = input + lines_bytes + lane % 16 * kPixelBytes + ((2 * k + lane / 16) ^ lane % 8) * kChunk;
  float sum[SlowStem::kParts][2][4] = {};
  const auto load = [&](int64_t step) {
    const Corner at = corner<MT>(p, step / p.frames);
    const int frame = static_cast<int>(step % p.frames);
    const Shared to = input + static_cast<int>(step % 2) * buffer;
    load_lines<MT>(to, x, p, at, frame);
    load_slow_gradient<MT>(to + lines_bytes, dy, p, at, frame);
  };
  if (begin < end) load(begin);
#pragma unroll 1
  for (int64_t step = begin; step < end; ++step) {
    wait_for_copies();
    __syncthreads();  // this step's frames are there, and nobody reads the last step's any more
    if (step + 1 < end) load(step + 1);
    const int start = static_cast<int>(step % 2) * buffer;
#pragma unroll 1
    for (int tile = 0; tile < p.rows * MT; ++tile) {
      const int row = tile / MT, i = tile % MT;
      uint32_t low[4], high[4];
      load_matrices<true>(low, own + start + 2 * row * kPitch<MT> + i * kTile * kChunk);
      load_matrices<true>(high, own + start + 2 * row * kPitch<MT> + i * kTile * kChunk + 2 * kChunk);
#pragma unroll
      for (int k = 0; k < SlowStem::kParts / 2; ++k) {
        uint32_t b[4];
        load_matrices<true>(b, own_gradient[k] + start + tile * kTile * kPixelBytes);
        multiply_add<T>(sum[2 * k][0], low, b[0], b[1]);
        multiply_add<T>(sum[2 * k][1], high, b[0], b[1]);
        multiply_add<T>(sum[2 * k + 1][0], low, b[2], b[3]);
        multiply_add<T>(sum[2 * k + 1][1], high, b[2], b[3]);
      }
    }
  }
  float4* to = reinterpret_cast<float4*>(partial) + (int64_t{blockIdx.x} * kStemSpace + kh) * SlowStem::kParts * 2 * 32 + lane;
#pragma unroll
  for (int n = 0; n < SlowStem::kParts; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to[(n * 2 + half) * 32] = make_float4(sum[n][half][0], sum[n][half][1], sum[n][half][2], sum[n][half][3]);
}

// ---- launches

int64_t grad_steps(const StemGeometry& g) { return g.clips * g.frames * ((g.out_height + kGradRows - 1) / kGradRows); }

int64_t slow_scratch(const StemGeometry& g, bool gradient) {
  return gradient ? int64_t{grad_blocks(grad_steps(g))} * kPartial<SlowStem> * 4 : kPackedBytes<SlowStem>;
}

void slow_forward(void* stream, Type type, const StemGeometry& g, const StemArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_half_type(type, [&](auto element) {
    using T = decltype(element);
    pack_weights<T, SlowStem>(s, a);
    by_tiles(g, [&](auto tiles) {
      constexpr int MT = decltype(tiles)::value;
      const StemPlan p = stem_plan(g, a, kForwardRows, MT);
      const int bytes = kPackedBytes<SlowStem> + p.lines * kPitch<MT>;
      const dim3 blocks(static_cast<unsigned>(p.row_blocks * p.column_blocks), static_cast<unsigned>(g.frames),
                        static_cast<unsigned>(g.clips));
      allow_shared(slow_stem_kernel<T, MT>, bytes);
      slow_stem_kernel<T, MT><<<blocks, 32 * MT, bytes, s>>>(p, a.x.data, reinterpret_cast<const uint4*>(a.work), a.y.data);
      check_launch("slow_stem");
    });
  });
}

void slow_weight_grad(void* stream, Type type, const StemGeometry& g, const StemArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (!aligned(a.y)) throw std::runtime_error("avsf: stem_conv needs gradients whose pixels are aligned to 16 bytes");
  const int blocks = grad_blocks(grad_steps(g));
  by_half_type(type, [&](auto element) {
    using T = decltype(element);
    by_tiles(g, [&](auto tiles) {
      constexpr int MT = decltype(tiles)::value;
      const auto bytes = [](int rows) { return 2 * ((2 * rows + kStemSpace - 2) * kPitch<MT> + rows * kGradPitch<MT>); };
      const int rows = fitting_rows(kGradRows, bytes);
      const StemPlan p = stem_plan(g, a, rows, MT);
      allow_shared(slow_stem_grad_kernel<T, MT>, bytes(rows));
      slow_stem_grad_kernel<T, MT><<<blocks, kGradThreads, bytes(rows), s>>>(p, a.x.data, a.y.data, reinterpret_cast<float*>(a.work));
      check_launch("slow_stem_grad");
    });
  });
  reduce_weights<SlowStem>(s, a, blocks);
}

}  // namespace
}  // namespace cuda

const StemPrimitives& cuda_slow_stem() {
  static const StemPrimitives table = {cuda::slow_scratch, cuda::slow_forward, cuda::slow_weight_grad};
  return table;
}

}  // namespace avsf
