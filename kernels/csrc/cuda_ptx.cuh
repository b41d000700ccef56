// The instructions of sm_80 and newer that C++ has no words for: asynchronous copies to shared memory, 8x8 matrix loads,
// 16x8x16 products. Tests run kernels on the CPU with twins of these functions (tests/kernels/support/cuda_emulation.h).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef AVSF_EMULATED_CUDA
namespace avsf {
namespace cuda {

// An address in shared memory, as the instructions want it.
using Shared = uint32_t;

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char avsf_dynamic_shared[];
  return avsf_dynamic_shared;
}

__device__ __forceinline__ Shared shared_address(const void* pointer) {
  return static_cast<Shared>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of Bytes (8 or 16; both sides aligned to them) from global memory; zeros instead unless `there`, and then
// `from` is not read.
template <int Bytes>
__device__ __forceinline__ void copy_async(Shared to, const void* from, bool there) {
  static_assert(Bytes == 8 || Bytes == 16);
  const int bytes = there ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for this thread's copies; a barrier makes them visible to the others.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes); register i of lane
// l receives elements 2*(l % 4) and 2*(l % 4) + 1 of row l / 4 of matrix i; with Transposed, of column l / 4.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], Shared row) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}

// Two matrices: lanes 0 to 15 give the addresses.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[2], Shared row) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(row)
                 : "memory");
}

// sum(16 x 8) += a(16 x 16) * b(16 x 8) in float. With g = lane / 4, q = 2 * (lane % 4), two neighbours a register:
// a[0] row g, columns q; a[1] row g + 8; a[2] row g, columns q + 8; a[3] row g + 8, columns q + 8; b0 rows q of column g,
// b1 rows q + 8; sum[0], sum[1] row g, columns q, q + 1; sum[2], sum[3] row g + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuda
}  // namespace avsf
#endif
