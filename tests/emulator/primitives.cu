// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Small kernels that use every primitive once, for the emulator's own tests.
#include "../../csrc/common/cuda.cuh"

using namespace mmfast;

// One block a row: shuffles inside the warp, shared memory and a barrier across warps.
__global__ void row_sum_kernel(const float* x, float* out, int columns) {
  MMFAST_SHARED(float[4], partial);
  float sum = 0;
  for (int i = int(threadIdx.x); i < columns; i += int(blockDim.x)) sum += x[size_t(blockIdx.x) * columns + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}
int row_sum(const float* x, float* out, int rows, int columns) {
  return launch(row_sum_kernel, dim3(rows), dim3(128), 0, nullptr, x, out, columns);
}

// What every warp primitive returns, 16 words a lane; the block has a ragged last warp and some threads leave early.
__global__ void warp_kernel(uint32_t* out, int active) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  uint32_t* o = out + thread * 16;
  if (thread >= active) return;
  const int live = active - thread / 32 * 32;
  const unsigned mask = live >= 32 ? kFullWarp : (1u << live) - 1;
  o[0] = __shfl_sync(mask, lane * 3, 5);
  o[1] = __shfl_xor_sync(mask, lane, 1);
  o[2] = __shfl_up_sync(mask, lane, 2);
  o[3] = __shfl_down_sync(mask, lane, 4, 8);
  o[4] = __ballot_sync(mask, lane % 3 == 0);
  o[5] = __any_sync(mask, lane == 7) != 0;
  o[6] = __all_sync(mask, lane < 32) != 0;
  o[7] = __match_any_sync(mask, lane / 5);
  o[8] = __reduce_add_sync(mask, unsigned(lane));
  o[9] = __reduce_max_sync(mask, lane - 16);
  o[10] = __syncthreads_count(lane < 2);
  o[11] = __syncthreads_or(thread == 3) != 0;
  // Half warps on their own: two collectives of disjoint masks are in flight at the same time.
  if (live >= 32) {
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    if (lane < 16) o[12] = __shfl_sync(half, lane, 9);
    else o[12] = __shfl_sync(half, lane, 20);
  } else {
    o[12] = 0;
  }
  o[13] = uint32_t(__shfl_sync(mask, double(lane) * 0.5, 3) * 4);
  o[14] = __popc(mask);
  o[15] = atomicAdd(out + blockDim.x * 16, 1u) < unsigned(active);
}
int warp_primitives(uint32_t* out, int threads, int active) { return launch(warp_kernel, dim3(1), dim3(threads), 0, nullptr, out, active); }

// c [16 m, 8 n] = a [16 m, k] b [8 n, k]^T straight from global memory, one warp a 16 x 8 tile.
enum class Kind { f16, bf16, tf32 };
template <Kind kKind>
__global__ void gemm_kernel(const void* a, const void* b, float* c, int n, int k) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4, row = int(blockIdx.x) * 16, column = int(blockIdx.y) * 8;
  float sum[4] = {};
  // In 32-bit words: a pair of 16-bit values or one 32-bit value. Both need 4 words of A a lane and step: 16 halves or 8 floats.
  const int words = kKind == Kind::tf32 ? k : k / 2;
  const uint32_t *pa = static_cast<const uint32_t*>(a) + size_t(row) * words,
                 *pb = static_cast<const uint32_t*>(b) + size_t(column) * words;
  for (int w = 0; w < words; w += 8) {
    uint32_t fa[4] = {pa[g * words + w + t], pa[(g + 8) * words + w + t], pa[g * words + w + t + 4], pa[(g + 8) * words + w + t + 4]};
    uint32_t fb[2] = {pb[g * words + w + t], pb[g * words + w + t + 4]};
    if constexpr (kKind == Kind::f16) mma_f16(sum, fa, fb);
    if constexpr (kKind == Kind::bf16) mma_bf16(sum, fa, fb);
    if constexpr (kKind == Kind::tf32) mma_tf32(sum, fa, fb);
  }
  for (int i = 0; i < 4; ++i) c[size_t(row + g + 8 * (i / 2)) * n + column + 2 * t + i % 2] = sum[i];
}
int gemm(int kind, const void* a, const void* b, float* c, int m, int n, int k) {
  const auto kernel = kind == 0 ? gemm_kernel<Kind::f16> : kind == 1 ? gemm_kernel<Kind::bf16> : gemm_kernel<Kind::tf32>;
  return launch(kernel, dim3(m / 16, n / 8), dim3(32), 0, nullptr, a, b, c, n, k);
}

// Four 8x8 matrices [32, 8] through shared memory by cp.async, out again as fragments: x4, x4 transposed, x2, x1 (32 lanes x 11 words).
__global__ void ldmatrix_kernel(const uint16_t* x, uint32_t* out) {
  MMFAST_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x);
  uint16_t* row = reinterpret_cast<uint16_t*>(shared) + lane * 8;
  cp_async<16>(row, x + lane * 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t x4[4], turned[4], x2[2], x1[1];
  ldmatrix<4>(x4, row);
  ldmatrix<4, true>(turned, row);
  ldmatrix<2>(x2, row);
  ldmatrix<1>(x1, row);
  uint32_t* o = out + lane * 11;
  for (int i = 0; i < 4; ++i) o[i] = x4[i], o[4 + i] = turned[i];
  for (int i = 0; i < 2; ++i) o[8 + i] = x2[i];
  o[10] = x1[0];
}
int ldmatrix_fragments(const uint16_t* x, uint32_t* out) { return launch(ldmatrix_kernel, dim3(1), dim3(32), 512, nullptr, x, out); }

// out = x, copied 4, 8 and 16 bytes at a time in three groups; of the last copy only `valid` bytes exist.
__global__ void copy_kernel(const float* x, float* out, int valid) {
  MMFAST_DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  if (threadIdx.x == 0) {
    cp_async<4>(s, x);
    cp_async_commit();
    cp_async<8>(s + 2, x + 2);
    cp_async_commit();
    cp_async<16>(s + 4, x + 4, valid);
    cp_async_commit();
    cp_async_wait<2>();
    out[0] = s[0];
    out[1] = s[2];  // still under way
    cp_async_wait<0>();
    for (int i = 2; i < 8; ++i) out[i] = s[i];
  }
}
int copies(const float* x, float* out, int valid) { return launch(copy_kernel, dim3(1), dim3(32), 32, nullptr, x, out, valid); }

// ---- planted faults, each beside its correct twin

template <bool kFault>
__global__ void out_of_bounds_kernel(float* out) {
  MMFAST_DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x + (kFault ? 1 : 0)] = float(threadIdx.x);  // 32 threads, 32 floats
  __syncthreads();
  out[threadIdx.x] = s[31 - threadIdx.x];
}
template <bool kFault>
__global__ void static_out_of_bounds_kernel(float* out) {
  MMFAST_SHARED(float[32], s);
  float* p = s;  // through a pointer the array's bound is unknown to the compiler
  p[threadIdx.x + (kFault ? 1 : 0)] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = s[31 - threadIdx.x];
}
template <bool kFault>
__global__ void missing_barrier_kernel(float* out) {
  MMFAST_SHARED(float[64], s);
  s[threadIdx.x] = float(threadIdx.x);
  if (!kFault) __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
template <bool kFault>
__global__ void blocks_race_kernel(float* out) {
  if (threadIdx.x == 0) out[kFault ? 0 : blockIdx.x] = float(blockIdx.x);
}
template <bool kFault>
__global__ void divergent_collective_kernel(float* out) {
  float v = float(threadIdx.x);
  if (kFault && threadIdx.x < 16) __syncthreads();
  else v = __shfl_xor_sync(kFullWarp, v, 1);
  out[threadIdx.x] = v;
}
template <bool kFault>
__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    if (!kFault) __syncthreads();
  } else if (!kFault) {
    // A warp that has left counts as arrived.
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = float(threadIdx.x);
}
template <bool kFault>
__global__ void unwaited_copy_kernel(const float* x, float* out) {
  MMFAST_SHARED(float[32], s);
  cp_async<4>(&s[threadIdx.x], x + threadIdx.x);
  cp_async_commit();
  if (!kFault) cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
// Shared memory must not carry values from one block to the next.
__global__ void leak_kernel(float* out) {
  MMFAST_SHARED(float, s);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = s;
    s = 1.0f;
  }
}

template <class Kernel, class... Args>
int run_planted(Kernel good, Kernel bad, bool fault, int blocks, int threads, size_t shared, Args... args) {
  return launch(fault ? bad : good, dim3(blocks), dim3(threads), shared, nullptr, args...);
}
int out_of_bounds(bool fault, float* out) {
  return run_planted(out_of_bounds_kernel<false>, out_of_bounds_kernel<true>, fault, 1, 32, 128, out);
}
int static_out_of_bounds(bool fault, float* out) {
  return run_planted(static_out_of_bounds_kernel<false>, static_out_of_bounds_kernel<true>, fault, 1, 32, 0, out);
}
int missing_barrier(bool fault, float* out) {
  return run_planted(missing_barrier_kernel<false>, missing_barrier_kernel<true>, fault, 1, 64, 0, out);
}
int blocks_race(bool fault, float* out) { return run_planted(blocks_race_kernel<false>, blocks_race_kernel<true>, fault, 8, 32, 0, out); }
int divergent_collective(bool fault, float* out) {
  return run_planted(divergent_collective_kernel<false>, divergent_collective_kernel<true>, fault, 1, 32, 0, out);
}
int divergent_barrier(bool fault, float* out) {
  return run_planted(divergent_barrier_kernel<false>, divergent_barrier_kernel<true>, fault, 1, 64, 0, out);
}
int unwaited_copy(bool fault, const float* x, float* out) {
  return run_planted(unwaited_copy_kernel<false>, unwaited_copy_kernel<true>, fault, 1, 32, 0, x, out);
}
int leak(float* out, int blocks) { return launch(leak_kernel, dim3(blocks), dim3(32), 0, nullptr, out); }
