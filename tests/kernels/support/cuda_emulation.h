// CUDA on the CPU, for tests: included before a translated .cu file (emulation.py) it lets the file compile as C++ and run.
//
// One fiber per thread of a block, one block after the other. Fibers change only where threads wait: __syncthreads, warp
// collectives, matrix instructions. The twins of cuda_ptx.cuh follow the PTX manual's fragments. Made to show mistakes:
//  - dynamic shared memory starts as NaNs and is as large as the launch says; accesses of the twins beyond it abort;
//  - an asynchronous copy happens when it is waited for, not before;
//  - warps run in ascending or descending order (order = 0, 1): a missing barrier gives two results;
//  - a barrier or collective that not all threads reach aborts, and says where.
#pragma once
#define AVSF_EMULATED_CUDA 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

namespace emulation {

constexpr int kWarp = 32, kStack = 128 << 10, kMostThreads = 1024;

[[noreturn]] inline void fail(const char* what, const char* where = "") {
  std::fprintf(stderr, "CUDA emulation: %s %s\n", what, where);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

// A place to go on from. ucontext's swap asks the kernel for signal masks each time: on x86-64 a stack switch does.
#ifdef __x86_64__
using Context = void*;
__attribute__((naked, noinline)) static void change(Context*, Context*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) / 16 * 16);
  top[-2] = reinterpret_cast<void*>(entry);
  std::memset(top - 8, 0, 6 * sizeof(void*));
  context = top - 8;
}
#else
using Context = ucontext_t;
inline void change(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = size, context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;
  bool done = true;
};

struct Meeting {  // of a warp or a block
  int alive = 0, arrived = 0;
  int64_t round = 0;
  const char* name = nullptr;
  void* slot[kWarp] = {};
};

struct Machine {
  Fiber fiber[kMostThreads];
  Meeting warp[kMostThreads / kWarp], block;
  Context scheduler;
  std::function<void()> body;
  std::vector<unsigned char> shared;
  uint3 thread{}, place{};
  dim3 block_size, grid_size;
  int current = 0, order = 0;
  int64_t meetings = 0, instructions = 0;
};

inline Machine machine;

inline void yield() {
  Fiber& f = machine.fiber[machine.current];
  change(&f.context, &machine.scheduler);
}

// Waits until every living member is here; the last one runs `together` before all go on.
template <typename F>
void meet(Meeting& m, const char* name, F together) {
  if (m.arrived == 0) m.name = name;
  else if (m.name != name && std::strcmp(m.name, name) != 0) fail("threads of a warp or block wait for different things:", name);
  const int64_t round = m.round;
  if (++m.arrived == m.alive) {
    together();
    m.arrived = 0, ++m.round, ++machine.meetings;
  } else {
    while (m.round == round) yield();
  }
}

inline int lane() { return machine.current % kWarp; }
inline Meeting& own_warp() { return machine.warp[machine.current / kWarp]; }

// Each lane gives `own`; the last lane calls all(array of the 32 pointers, null where a lane has ended).
template <typename T, typename F>
void warp_meet(const char* name, T& own, F all) {
  Meeting& m = own_warp();
  if (m.arrived == 0) std::memset(m.slot, 0, sizeof m.slot);
  m.slot[lane()] = &own;
  meet(m, name, [&] {
    T* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<T*>(m.slot[i]);
    all(lanes);
    ++machine.instructions;
  });
}

// A thread ended: __syncthreads counts living threads only, a warp collective needs all its lanes.
inline void leave() {
  if (own_warp().arrived) fail("a thread ended while its warp waits for it:", own_warp().name);
  --own_warp().alive;
  Meeting& m = machine.block;
  if (m.arrived == --m.alive && m.arrived) m.arrived = 0, ++m.round, ++machine.meetings;
}

inline void enter() {
  machine.body();
  Fiber& f = machine.fiber[machine.current];
  if (!f.copies.empty()) fail("a thread ended with copies it never waited for");
  f.done = true;
  leave();
  while (true) yield();
}

inline void start_block(int threads) {
  machine.block = Meeting{};
  machine.block.alive = threads;
  for (Meeting& m : machine.warp) m = Meeting{};
  for (int t = 0; t < threads; ++t) {
    Fiber& f = machine.fiber[t];
    if (!f.stack) f.stack = std::make_unique<char[]>(kStack);
    prepare(f.context, f.stack.get(), kStack, enter);
    f.done = false;
    ++machine.warp[t / kWarp].alive;
  }
}

inline void resume(int t) {
  const dim3& size = machine.block_size;
  machine.current = t;
  machine.thread = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
  change(&machine.scheduler, &machine.fiber[t].context);
}

inline void run_block() {
  const int threads = static_cast<int>(machine.block_size.x * machine.block_size.y * machine.block_size.z);
  if (threads < 1 || threads > kMostThreads) fail("a block has 1 to 1024 threads");
  start_block(threads);
  for (int alive = threads; alive > 0;) {
    const int64_t before = machine.meetings;
    const int had = alive;
    for (int i = 0; i < threads; ++i) {
      const int t = machine.order == 0 ? i : threads - 1 - i;
      if (machine.fiber[t].done) continue;
      resume(t);
      alive -= machine.fiber[t].done;
    }
    if (alive == had && machine.meetings == before) fail("no thread can go on: a barrier that some never reach");
  }
}

template <typename... P>
struct Launch {
  dim3 grid, block;
  size_t shared;

  template <typename... A>
  void operator()(void (*kernel)(P...), A&&... arguments) const {
    machine.grid_size = grid, machine.block_size = block;
    machine.body = [&] { kernel(P(arguments)...); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          machine.place = {x, y, z};
          machine.shared.assign(shared, 0xff);  // NaN in every type
          run_block();
        }
  }
};

// What `kernel<<<grid, block, shared, stream>>>(arguments)` is translated to: launch(kernel, grid, ...)(arguments).
template <typename... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) {
  return [=](auto&&... arguments) { Launch<P...>{grid, block, shared}(kernel, arguments...); };
}

template <typename T>
T exchange(const char* name, T value, int source) {
  struct Slot {
    T value;
    int source;
    T result;
  } own{value, source, value};
  warp_meet(name, own, [&](Slot** lanes) {
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i] && lanes[i]->source >= 0 && lanes[i]->source < kWarp && lanes[lanes[i]->source])
        lanes[i]->result = lanes[lanes[i]->source]->value;
  });
  return own.result;
}

inline unsigned ballot(const char* name, bool vote) {
  struct Slot {
    bool vote;
    unsigned result;
  } own{vote, 0};
  warp_meet(name, own, [](Slot** lanes) {
    unsigned bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= (lanes[i] && lanes[i]->vote ? 1u : 0u) << i;
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i]) lanes[i]->result = bits;
  });
  return own.result;
}

inline unsigned char* shared_at(uint32_t address, int bytes, int alignment, const char* what) {
  if (address % alignment || address + bytes > machine.shared.size()) fail("address beyond shared memory or not aligned:", what);
  return machine.shared.data() + address;
}

}  // namespace emulation

#define threadIdx (emulation::machine.thread)
#define blockIdx (emulation::machine.place)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)

inline void __syncthreads() {
  emulation::meet(emulation::machine.block, "__syncthreads", [] {});
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulation::meet(emulation::own_warp(), "__syncwarp", [] {});
}
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  return emulation::exchange("__shfl_sync", value, emulation::lane() / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulation::exchange("__shfl_xor_sync", value, emulation::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), source = lane + static_cast<int>(delta);
  return emulation::exchange("__shfl_down_sync", value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), source = lane % width - static_cast<int>(delta);
  return emulation::exchange("__shfl_up_sync", value, source < 0 ? lane : lane - static_cast<int>(delta));
}
inline unsigned __ballot_sync(unsigned, int vote) { return emulation::ballot("__ballot_sync", vote != 0); }
inline int __any_sync(unsigned, int vote) { return emulation::ballot("__any_sync", vote != 0) != 0; }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
inline void __threadfence() {}  // blocks run one after the other, and fibers see each other's writes
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}

using std::fmaf;
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// The runtime calls that host code makes: a device of two multiprocessors, so that small tests have several shares.
extern "C" {
__attribute__((weak)) cudaError_t cudaGetLastError() { return cudaSuccess; }
__attribute__((weak)) const char* cudaGetErrorString(cudaError_t) { return "no error"; }
__attribute__((weak)) cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
__attribute__((weak)) cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10 : 0;
  if (which == cudaDevAttrL2CacheSize) *value = 40 << 10;
  return *value ? cudaSuccess : cudaErrorInvalidValue;
}
__attribute__((weak)) cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
__attribute__((weak)) cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= (227 << 10) ? cudaSuccess : cudaErrorInvalidValue;
}
__attribute__((weak, visibility("default"))) void emulation_order(int order) { emulation::machine.order = order; }
__attribute__((weak, visibility("default"))) int64_t emulation_instructions() { return emulation::machine.instructions; }
}

// ---- the twins of kernels/csrc/cuda_ptx.cuh
namespace avsf {
namespace cuda {

using Shared = uint32_t;

inline unsigned char* dynamic_shared() { return emulation::machine.shared.data(); }

inline Shared shared_address(const void* pointer) {
  return static_cast<Shared>(static_cast<const unsigned char*>(pointer) - emulation::machine.shared.data());
}

template <int Bytes>
void copy_async(Shared to, const void* from, bool there) {
  static_assert(Bytes == 8 || Bytes == 16);
  void* target = emulation::shared_at(to, Bytes, Bytes, "copy_async");
  if (reinterpret_cast<uintptr_t>(from) % Bytes) emulation::fail("source not aligned:", "copy_async");
  emulation::machine.fiber[emulation::machine.current].copies.push_back({target, there ? from : nullptr, Bytes});
}

inline void wait_for_copies() {
  std::vector<emulation::Copy>& copies = emulation::machine.fiber[emulation::machine.current].copies;
  for (const emulation::Copy& c : copies) c.from ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
  copies.clear();
}

template <bool Transposed, size_t Matrices>
void load_matrices(uint32_t (&out)[Matrices], Shared row) {
  struct Slot {
    Shared row;
    uint32_t* out;
  } own{row, out};
  emulation::warp_meet("load_matrices", own, [](Slot** lanes) {
    for (size_t m = 0; m < Matrices; ++m) {
      uint16_t matrix[8][8];
      for (size_t r = 0; r < 8; ++r) std::memcpy(matrix[r], emulation::shared_at(lanes[8 * m + r]->row, 16, 16, "load_matrices"), 16);
      for (int l = 0; l < 32; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint32_t low = Transposed ? matrix[b][a] : matrix[a][b], high = Transposed ? matrix[b + 1][a] : matrix[a][b + 1];
        lanes[l]->out[m] = low | high << 16;
      }
    }
  });
}

template <typename T>
double half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<double>(static_cast<float>(value));
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } own{sum, a, {b0, b1}};
  emulation::warp_meet("multiply_add", own, [](Slot** lanes) {
    double left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = 2 * (l % 4);
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][q + r / 2 * 8 + i] = half_of<T>(lanes[l]->a[r], i);
        for (int r = 0; r < 2; ++r) right[q + r * 8 + i][g] = half_of<T>(lanes[l]->b[r], i);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        double total = lanes[l]->sum[i];
        for (int k = 0; k < 16; ++k) total += left[row][k] * right[k][column];
        lanes[l]->sum[i] = static_cast<float>(total);
      }
  });
}

}  // namespace cuda
}  // namespace avsf
