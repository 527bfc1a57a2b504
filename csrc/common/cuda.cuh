// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// What a CUDA kernel of ours may use: CUDA's own names plus the few wrappers below (sm_80 and later). Every .cu file includes this header
// and no other CUDA header, so that with MMFAST_EMULATE the same file compiles for the host, where tests/emulator/emulator.h supplies the
// same names and runs each CUDA thread as a fiber. Three things differ from plain CUDA:
//   launch(kernel, grid, block, shared_bytes, stream, args...)   instead of  kernel<<<...>>>(...)
//   MMFAST_SHARED(float[32], sums);                              instead of  __shared__ float sums[32];
//   MMFAST_DYNAMIC_SHARED(bytes);                                instead of  extern __shared__ unsigned char bytes[];
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dtype.h"

#ifdef MMFAST_EMULATE
#include "emulator.h"  // from tests/emulator
#else
#include <cuda_runtime.h>

#define MMFAST_SHARED(type, name) __shared__ std::type_identity_t<type> name
#define MMFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace mmfast {

// Returns the cudaError_t of the launch, 0 for success. An empty grid launches nothing.
template <class... Parameters, class... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args&&... args) {
  if (size_t(grid.x) * grid.y * grid.z == 0) return 0;
  if (shared_bytes > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(args)...);
  return int(cudaGetLastError());
}

inline int fill_zero(void* data, size_t bytes, void* stream) {
  return bytes ? int(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream))) : 0;
}

inline int multiprocessor_count() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// ---- asynchronous copies from global to shared memory: Bytes is 4, 8 or 16, both ends aligned to it; what lies past `valid` is
// zero-filled.

template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = Bytes) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to), "l"(global), "n"(Bytes), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most Pending of this thread's latest groups are under way. Other threads see the data after a barrier.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// ---- warp matrix operations; every lane of the warp takes part. Fragment layouts: PTX ISA, "Warp-level matrix instructions".

// Count 8x8 matrices of 16-bit elements; lane 8 i + r passes the address of row r of matrix i (16 bytes, aligned).
template <int Count, bool Transpose = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[Count], const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (Count == 1 && !Transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n" : "=r"(fragment[0]) : "r"(from) : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n" : "=r"(fragment[0]) : "r"(from) : "memory");
  else if constexpr (Count == 2 && !Transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (!Transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(from)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], fp16 or bf16 pairs in 32-bit words, fp32 sums.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16, 8] += a [16, 8] b [8, 8] in tf32: fp32 bits of which the low 13 are ignored (round with float_to_tf32 first).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic

// Two floats rounded to nearest even in one word, `low` in its lower half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// An fp16 value, exactly.
__device__ __forceinline__ float widen_f16(uint16_t half) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(half));
  return v;
}
// 2^x, relative error below 2^-22, exactly 0 far below and for -Inf.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A kernel's (__grid_constant__) argument that is read where it is used. The compiler would otherwise load all of a large argument before
// a loop, and spill what the loop needs.
template <class T>
__device__ __forceinline__ const T& reread(const T& argument) {
  int zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return (&argument)[zero];
}

// The most shared memory that a block may ask for, in bytes.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return size_t(bytes);
}

}  // namespace mmfast
#endif  // MMFAST_EMULATE

namespace mmfast {

constexpr unsigned kFullWarp = 0xffffffffu;

// Nearest tf32, ties away from zero (as cvt.rna.tf32.f32), for finite values.
MMFAST_HD uint32_t float_to_tf32(float v) { return (float_bits(v) + 0x1000u) & 0xffffe000u; }

// The sum over the warp in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(kFullWarp, v, m);
  return v;
}
template <class T>
__device__ __forceinline__ T warp_min(T v) {
  for (int m = 16; m; m >>= 1) {
    const T other = __shfl_xor_sync(kFullWarp, v, m);
    v = other < v ? other : v;
  }
  return v;
}
template <class T>
__device__ __forceinline__ T warp_max(T v) {
  for (int m = 16; m; m >>= 1) {
    const T other = __shfl_xor_sync(kFullWarp, v, m);
    v = other > v ? other : v;
  }
  return v;
}

// The sum over a block of 32 Warps threads in every thread, in a fixed order; `shared` is scratch that no one else uses meanwhile.
template <int Warps>
__device__ __forceinline__ double block_sum(double v, double (&shared)[Warps]) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < Warps; ++w) total += shared[w];
  return total;
}

// ---- host code of the launchers

// Hands out pieces of the workspace; with base 0 it only measures.
class Carver {
 public:
  explicit Carver(void* base) : at_(reinterpret_cast<uintptr_t>(base)), begin_(at_) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at_);
    at_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return p;
  }
  size_t bytes() const { return at_ - begin_; }

 private:
  uintptr_t at_, begin_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs launches until one fails.
class Sequence {
 public:
  template <class Call>
  Sequence& then(Call call) {
    if (status_ == 0) status_ = call();
    return *this;
  }
  int status() const { return status_; }

 private:
  int status_ = 0;
};

}  // namespace mmfast
