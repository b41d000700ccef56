// Fast's first convolution on tensor cores, without im2col: kernels/csrc/cuda_stem.cuh. Legend: kernels/csrc/stem.h.
// Forward: a warp makes one output row (MT tiles of 16 outputs x 8 channels) and walks through time. A frame t of the input
// is loaded once for its five outputs t - 2 to t + 2, whose sums roll through the registers.
// Weight gradient: M = (slot, channel), N = 8 channels, K = 16 outputs. A warp owns one kh; a frame of the input meets
// the output gradients of its five frames. Blocks share all (clip, rows, frame) evenly; partial sums are added in order.
#include "cuda_stem.cuh"

namespace avsf {
namespace cuda {
namespace {

constexpr int kForwardRows = 4, kForwardThreads = 32 * kForwardRows;  // a warp per output row
constexpr int kGradRows = 4;
constexpr int kRing = kStemTime + 1;  // frames of the output's gradient in shared memory
template <int MT>
constexpr int kGradPitch = kTile * MT * kChunk;  // bytes of a line of the output's gradient

// ---- forward

// Writes one frame of a warp's row: lane / 4 is the output of a half tile, lane % 4 its pair of channels.
template <typename T, int MT>
__device__ __forceinline__ void store_row(char* y, const StemPlan& p, const Corner& at, int row, int frame,
                                          const float (&sum)[MT][4]) {
  const int lane = threadIdx.x % 32, first = at.x + lane / 4;
  T* line = reinterpret_cast<T*>(y) + at.clip * p.y_clip +
            ((int64_t{frame} * p.out_height + row) * p.out_width + first) * kStemOut + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = i * kTile + half * 8;
      if (first + column < p.out_width)
        *reinterpret_cast<uint32_t*>(line + column * kStemOut) = pack<T>(sum[i][2 * half], sum[i][2 * half + 1]);
    }
  }
}

// sum[j] += the part that one input frame has in the output j - 2 frames later. lines: a lane's place in the first line.
template <typename T, int MT>
__device__ __forceinline__ void multiply_frame(float (&sum)[kStemTime][MT][4], Shared lines, const uint4* weights) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1  // more would not fit into the registers
  for (int kh = 0; kh < kStemSpace; ++kh) {
    uint4 b[kStemTime];
#pragma unroll
    for (int kt = 0; kt < kStemTime; ++kt) b[kt] = weights[(kh * kStemTime + kt) * 32 + lane];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      uint32_t low[4], high[4];  // slots 0-3, 4-7
      load_matrices<false>(low, lines + kh * kPitch<MT> + i * kTile * kChunk);
      load_matrices<false>(high, lines + kh * kPitch<MT> + i * kTile * kChunk + 2 * kChunk);
#pragma unroll
      for (int kt = 0; kt < kStemTime; ++kt) multiply_add<T>(sum[kStemTime - 1 - kt][i], low, b[kt].x, b[kt].y);
#pragma unroll
      for (int kt = 0; kt < kStemTime; ++kt) multiply_add<T>(sum[kStemTime - 1 - kt][i], high, b[kt].z, b[kt].w);
    }
  }
}

// grid: (places of a picture, parts of the time, clips).
template <typename T, int MT>
__global__ void __launch_bounds__(kForwardThreads, 2)
    stem_kernel(const StemPlan p, const char* __restrict__ x, const uint4* __restrict__ packed, char* __restrict__ y) {
  unsigned char* const memory = dynamic_shared();
  const uint4* const weights = reinterpret_cast<const uint4*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Corner at = corner<MT>(p, int64_t{blockIdx.z} * gridDim.x + blockIdx.x);
  const int begin = blockIdx.y * p.frames_per_block, end = min(begin + p.frames_per_block, p.frames);
  const int first = max(begin - kStemTime / 2, 0), last = min(end + kStemTime / 2, p.frames);
  const Shared input = shared_address(memory) + kPackedBytes<FastStem>;
  const int buffer = p.lines * kPitch<MT>;
  // Matrices of a tile: outputs 0-7 and 8-15, then both one chunk on.
  const Shared own = input + 2 * warp * kPitch<MT> + (lane % 16 + lane / 16) * kChunk;
  for (int i = threadIdx.x; i < kFragments<FastStem>; i += kForwardThreads)
    copy_async<16>(shared_address(memory) + i * kChunk, packed + i, true);
  load_lines<MT>(input, x, p, at, first);
  const bool active = at.y + warp < p.out_height;
  float sum[kStemTime][MT][4] = {};  // of output frames t - 2 to t + 2
#pragma unroll 1
  for (int t = first; t < last; ++t) {
    const int parity = (t - first) % 2;
    wait_for_copies();
    __syncthreads();  // the frame is there, and nobody reads the other buffer any more
    if (t + 1 < last) load_lines<MT>(input + (1 - parity) * buffer, x, p, at, t + 1);
    if (!active) continue;
    multiply_frame<T, MT>(sum, own + parity * buffer, weights);
    if (t - 2 >= begin) store_row<T, MT>(y, p, at, at.y + warp, t - 2, sum[0]);
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int k = 0; k + 1 < kStemTime; ++k) sum[k][i][v] = sum[k + 1][i][v];
        sum[kStemTime - 1][i][v] = 0.0f;
      }
  }
  if (!active) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // the frames that had no successor to complete them
    const int frame = last - 2 + k;
    if (frame >= begin && frame < end) store_row<T, MT>(y, p, at, at.y + warp, frame, sum[k]);
  }
}

// ---- weight gradient

// Starts loading a block's rows of one frame of the output's gradient: 16 bytes an output, zero outside.
template <int MT>
__device__ __forceinline__ void load_gradient(Shared to, const char* dy, const StemPlan& p, const Corner& at, int frame) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const bool exists = frame >= 0 && frame < p.frames;
  const char* picture = dy + 2 * (at.clip * p.y_clip + (exists ? int64_t{frame} * p.out_height * p.out_width * p.y_row : 0));
  const Shared start = to + (frame + 2) % kRing * p.rows * kGradPitch<MT>;
  for (int line = threadIdx.x / 32; line < p.rows; line += warps) {
    const bool inside = exists && at.y + line < p.out_height;
    const char* from = picture + (inside ? 2 * int64_t{at.y + line} * p.out_width * p.y_row : 0);
#pragma unroll 1
    for (int c = lane; c < kTile * MT; c += 32) {
      const bool there = inside && at.x + c < p.out_width;
      copy_async<16>(start + line * kGradPitch<MT> + c * kChunk, from + (there ? 2 * (at.x + c) * p.y_row : 0), there);
    }
  }
}

template <typename T, int MT>
__device__ __forceinline__ void add_row(float (&sum)[kStemTime][2][4], Shared line, const Shared (&gradient)[3]) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    uint32_t low[4], high[4], b01[4], b23[4], b4[2];
    load_matrices<true>(low, line + i * kTile * kChunk);
    load_matrices<true>(high, line + i * kTile * kChunk + 2 * kChunk);
    load_matrices<true>(b01, gradient[0] + i * kTile * kChunk);
    load_matrices<true>(b23, gradient[1] + i * kTile * kChunk);
    load_matrices<true>(b4, gradient[2] + i * kTile * kChunk);
    multiply_add<T>(sum[0][0], low, b01[0], b01[1]);
    multiply_add<T>(sum[0][1], high, b01[0], b01[1]);
    multiply_add<T>(sum[1][0], low, b01[2], b01[3]);
    multiply_add<T>(sum[1][1], high, b01[2], b01[3]);
    multiply_add<T>(sum[2][0], low, b23[0], b23[1]);
    multiply_add<T>(sum[2][1], high, b23[0], b23[1]);
    multiply_add<T>(sum[3][0], low, b23[2], b23[3]);
    multiply_add<T>(sum[3][1], high, b23[2], b23[3]);
    multiply_add<T>(sum[4][0], low, b4[0], b4[1]);
    multiply_add<T>(sum[4][1], high, b4[0], b4[1]);
  }
}

// Block b takes the b-th share of all steps (item, input frame). partial: [block, kh, kt, half of K, lane, 4].
template <typename T, int MT>
__global__ void __launch_bounds__(kGradThreads, 2)
    stem_grad_kernel(const StemPlan p, const char* __restrict__ x, const char* __restrict__ dy, float* __restrict__ partial) {
  const int lane = threadIdx.x % 32, kh = threadIdx.x / 32;
  const int64_t steps = p.items * p.frames;
  const int64_t begin = steps * blockIdx.x / gridDim.x, end = steps * (blockIdx.x + 1) / gridDim.x;
  const Shared input = shared_address(dynamic_shared());
  const int buffer = p.lines * kPitch<MT>, slot = p.rows * kGradPitch<MT>;
  const Shared ring = input + 2 * buffer;
  // Matrices of a tile of the input: outputs 0-7, chunks 0 and 1, then outputs 8-15; of the gradient: outputs 0-7 and 8-15.
  const Shared own = input + kh * kPitch<MT> + (lane % 8 + lane / 16 * 8 + lane / 8 % 2) * kChunk;
  const Shared own_gradient = ring + lane % 16 * kChunk;
  float sum[kStemTime][2][4] = {};
  Corner at = {};
#pragma unroll 1
  for (int64_t step = begin; step < end; ++step) {
    const int t = static_cast<int>(step % p.frames), parity = static_cast<int>(step % 2);
    if (step == begin || t == 0) {
      at = corner<MT>(p, step / p.frames);
      __syncthreads();  // nobody reads the last item any more
      load_lines<MT>(input + parity * buffer, x, p, at, t);
      for (int k = -2; k <= 2; ++k) load_gradient<MT>(ring, dy, p, at, t + k);
    }
    wait_for_copies();
    __syncthreads();  // this step's frames are there, and nobody reads the last step's any more
    if (step + 1 < end && t + 1 < p.frames) {
      load_lines<MT>(input + (1 - parity) * buffer, x, p, at, t + 1);
      load_gradient<MT>(ring, dy, p, at, t + 3);
    }
    // Tap kt belongs to output frame t + 2 - kt, which lies in slot (t + 4 - kt) % 6; lanes 16 to 31 serve the odd taps.
    Shared gradient[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) gradient[k] = own_gradient + (t + 4 - 2 * k + kRing - lane / 16) % kRing * slot;
    Shared line = own + parity * buffer;
    const int rows = min(p.rows, p.out_height - at.y);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      add_row<T, MT>(sum, line, gradient);
      line += 2 * kPitch<MT>;
#pragma unroll
      for (int k = 0; k < 3; ++k) gradient[k] += kGradPitch<MT>;
    }
  }
  float4* to = reinterpret_cast<float4*>(partial) + (int64_t{blockIdx.x} * kStemSpace + kh) * kStemTime * 2 * 32 + lane;
#pragma unroll
  for (int kt = 0; kt < kStemTime; ++kt)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to[(kt * 2 + half) * 32] = make_float4(sum[kt][half][0], sum[kt][half][1], sum[kt][half][2], sum[kt][half][3]);
}

// ---- launches

int64_t grad_steps(const StemGeometry& g) { return g.clips * g.frames * ((g.out_height + kGradRows - 1) / kGradRows); }

int64_t stem_scratch(const StemGeometry& g, bool gradient) {
  return gradient ? int64_t{grad_blocks(grad_steps(g))} * kPartial<FastStem> * 4 : kPackedBytes<FastStem>;
}

void stem_forward(void* stream, Type type, const StemGeometry& g, const StemArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  by_half_type(type, [&](auto element) {
    using T = decltype(element);
    pack_weights<T, FastStem>(s, a);
    by_tiles(g, [&](auto tiles) {
      constexpr int MT = decltype(tiles)::value;
      StemPlan p = stem_plan(g, a, kForwardRows, MT);
      const int bytes = kPackedBytes<FastStem> + 2 * p.lines * kPitch<MT>;
      // Few clips: parts of the time, each at least as long as the frames that neighbours load twice.
      const int64_t wanted = 2 * int64_t{attribute(cudaDevAttrMultiProcessorCount)};
      while (p.items * ((p.frames + p.frames_per_block - 1) / p.frames_per_block) * 2 <= wanted && p.frames_per_block >= 8)
        p.frames_per_block = (p.frames_per_block + 1) / 2;
      const dim3 blocks(static_cast<unsigned>(p.row_blocks * p.column_blocks),
                        static_cast<unsigned>((p.frames + p.frames_per_block - 1) / p.frames_per_block),
                        static_cast<unsigned>(g.clips));
      allow_shared(stem_kernel<T, MT>, bytes);
      stem_kernel<T, MT><<<blocks, kForwardThreads, bytes, s>>>(p, a.x.data, reinterpret_cast<const uint4*>(a.work), a.y.data);
      check_launch("stem");
    });
  });
}

void stem_weight_grad(void* stream, Type type, const StemGeometry& g, const StemArgs& a) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (!aligned(a.y)) throw std::runtime_error("avsf: stem_conv needs gradients whose pixels are aligned to 16 bytes");
  const int blocks = grad_blocks(grad_steps(g));
  float* work = reinterpret_cast<float*>(a.work);
  by_half_type(type, [&](auto element) {
    using T = decltype(element);
    by_tiles(g, [&](auto tiles) {
      constexpr int MT = decltype(tiles)::value;
      const auto bytes = [](int rows) { return 2 * (2 * rows + kStemSpace - 2) * kPitch<MT> + kRing * rows * kGradPitch<MT>; };
      const int rows = fitting_rows(kGradRows, bytes);
      const StemPlan p = stem_plan(g, a, rows, MT);
      allow_shared(stem_grad_kernel<T, MT>, bytes(rows));
      stem_grad_kernel<T, MT><<<blocks, kGradThreads, bytes(rows), s>>>(p, a.x.data, a.y.data, work);
      check_launch("stem_grad");
    });
  });
  reduce_weights<FastStem>(s, a, blocks);
}

}  // namespace
}  // namespace cuda

const StemPrimitives& cuda_stem() {
  static const StemPrimitives table = {cuda::stem_scratch, cuda::stem_forward, cuda::stem_weight_grad};
  return table;
}

}  // namespace avsf
