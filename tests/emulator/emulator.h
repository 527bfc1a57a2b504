// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// CUDA for the host, as far as our kernels use it: csrc/common/cuda.cuh includes this file under MMFAST_EMULATE, and the unchanged .cu
// compiles with g++. Test code, never shipped.
//
// This header holds what must be compiled together with the kernel, so that a sanitizer sees each access as the thread's own:
// loads and stores of cp.async and ldmatrix, atomics, arithmetic. Scheduling and the exchange between lanes live in emulator.cpp,
// which is compiled without instrumentation.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <source_location>
#include <type_traits>
#include <utility>

#include "../../csrc/common/dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

using Location = std::source_location;
#define MMFAST_HERE emulator::Location where = emulator::Location::current()

// The coordinates of the running thread, kept current by the scheduler.
struct Coordinates {
  dim3 thread, block, block_dim, grid_dim;
  int lane;
};
extern Coordinates now;

// Runs every block of the grid, one after another. Returns 0, or cudaErrorLaunchFailure (719) after printing why.
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void* dynamic_shared();
// The block's variable that belongs to `tag`; memory is 0xFF (NaN) until it is written.
void* static_shared(const void* tag, size_t size, size_t alignment);

// Blocks until every live thread of the block is here; returns how many came with `predicate` true.
int block_barrier(bool predicate, Location where);

enum class Op { sync, shuffle, ballot, match, reduce, ldmatrix, mma_f16, mma_bf16, mma_tf32 };
struct Request {
  Op op;
  unsigned mask;
  Location where;
  uint64_t value = 0, result = 0;
  int source = 0;                                     // shuffle: lane to read
  uint64_t (*combine)(uint64_t, uint64_t) = nullptr;  // reduce
  float* c = nullptr;                                 // mma
  const uint32_t *a = nullptr, *b = nullptr;
  uint32_t* fragment = nullptr;
  int count = 0;
  bool transpose = false;
  alignas(16) uint16_t row[8] = {};  // ldmatrix: what this lane's address holds
};
// Blocks until every live lane of the request's mask has posted the same operation from the same place.
void warp_collective(Request&);

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};
void copy_issue(const Copy&);
void copy_commit();
// Hands out, oldest first, the copies of all but the latest `pending` groups; false when none is left.
bool copy_next(int pending, Copy&);

void fence();
[[noreturn]] void fail(const char* what, Location where);

template <class To, class From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &v, sizeof(out));
  return out;
}
template <class T>
uint64_t widen(T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp exchange takes 4- and 8-byte types");
  uint64_t out = 0;
  memcpy(&out, &v, sizeof(v));
  return out;
}
template <class T>
T narrow(uint64_t v) {
  T out;
  memcpy(&out, &v, sizeof(out));
  return out;
}

template <class T>
T shuffle(unsigned mask, T v, int source, Location where) {
  Request r{.op = Op::shuffle, .mask = mask, .where = where, .value = widen(v), .source = source};
  warp_collective(r);
  return narrow<T>(r.result);
}
inline uint64_t exchange(Op op, unsigned mask, uint64_t value, Location where) {
  Request r{.op = op, .mask = mask, .where = where, .value = value};
  warp_collective(r);
  return r.result;
}
template <class T>
T reduce(unsigned mask, T v, uint64_t (*combine)(uint64_t, uint64_t), Location where) {
  Request r{.op = Op::reduce, .mask = mask, .where = where, .value = widen(v), .combine = combine};
  warp_collective(r);
  return narrow<T>(r.result);
}

}  // namespace emulator

#define threadIdx (emulator::now.thread)
#define blockIdx (emulator::now.block)
#define blockDim (emulator::now.block_dim)
#define gridDim (emulator::now.grid_dim)
constexpr int warpSize = 32;

// ---- barriers and warp collectives

inline void __syncthreads(MMFAST_HERE) { emulator::block_barrier(false, where); }
inline int __syncthreads_count(int p, MMFAST_HERE) { return emulator::block_barrier(p, where); }
inline int __syncthreads_or(int p, MMFAST_HERE) { return emulator::block_barrier(p, where) != 0; }
inline int __syncthreads_and(int p, MMFAST_HERE) { return emulator::block_barrier(!p, where) == 0; }
inline void __syncwarp(unsigned mask = ~0u, MMFAST_HERE) { emulator::exchange(emulator::Op::sync, mask, 0, where); }
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }

// A source outside the segment of `width` lanes leaves the lane's own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, MMFAST_HERE) {
  return emulator::shuffle(mask, v, (emulator::now.lane & ~(width - 1)) | (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, MMFAST_HERE) {
  const int lane = emulator::now.lane, source = lane - int(delta);
  return emulator::shuffle(mask, v, source < (lane & ~(width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, MMFAST_HERE) {
  const int lane = emulator::now.lane, source = lane + int(delta);
  return emulator::shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, MMFAST_HERE) {
  const int lane = emulator::now.lane, source = lane ^ lanes;
  return emulator::shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, where);
}
inline unsigned __ballot_sync(unsigned mask, int p, MMFAST_HERE) {
  return unsigned(emulator::exchange(emulator::Op::ballot, mask, p != 0, where));
}
inline int __any_sync(unsigned mask, int p, MMFAST_HERE) { return emulator::exchange(emulator::Op::ballot, mask, p != 0, where) != 0; }
inline int __all_sync(unsigned mask, int p, MMFAST_HERE) { return emulator::exchange(emulator::Op::ballot, mask, p == 0, where) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v, MMFAST_HERE) {
  return unsigned(emulator::exchange(emulator::Op::match, mask, emulator::widen(v), where));
}
#define MMFAST_EMULATE_REDUCE(name, type, expression)                          \
  inline type __reduce_##name##_sync(unsigned mask, type v, MMFAST_HERE) {     \
    auto combine = [](uint64_t p, uint64_t q) {                                \
      const type a = emulator::narrow<type>(p), b = emulator::narrow<type>(q); \
      return emulator::widen<type>(expression);                                \
    };                                                                         \
    return emulator::reduce(mask, v, combine, where);                          \
  }
MMFAST_EMULATE_REDUCE(add, unsigned, a + b)
MMFAST_EMULATE_REDUCE(add, int, int(unsigned(a) + unsigned(b)))
MMFAST_EMULATE_REDUCE(min, unsigned, a < b ? a : b)
MMFAST_EMULATE_REDUCE(min, int, a < b ? a : b)
MMFAST_EMULATE_REDUCE(max, unsigned, a > b ? a : b)
MMFAST_EMULATE_REDUCE(max, int, a > b ? a : b)
MMFAST_EMULATE_REDUCE(and, unsigned, a& b)
MMFAST_EMULATE_REDUCE(or, unsigned, a | b)
MMFAST_EMULATE_REDUCE(xor, unsigned, a ^ b)

// ---- atomics: real ones, so that the race detector knows them as such

template <class T, class U>
T atomicAdd(T* p, U v) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, T(v), __ATOMIC_RELAXED);
  } else {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    Word* word = reinterpret_cast<Word*>(p);
    Word seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &seen, emulator::bits<Word>(T(emulator::bits<T>(seen) + v)), false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
    return emulator::bits<T>(seen);
  }
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < v && !__atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < seen && !__atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v) {
  return __atomic_fetch_and(p, v, __ATOMIC_RELAXED);
}

// ---- arithmetic and cached loads

template <class T>
T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float __double2float_rn(double v) { return float(v); }
inline float __double2float_ru(double v) {
  const float f = float(v);
  return double(f) < v ? nextafterf(f, INFINITY) : f;
}
inline float __double2float_rd(double v) {
  const float f = float(v);
  return double(f) > v ? nextafterf(f, -INFINITY) : f;
}
inline unsigned __float_as_uint(float v) { return emulator::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulator::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulator::bits<float>(v); }
inline float __int_as_float(int v) { return emulator::bits<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}

// ---- the wrappers of csrc/common/cuda.cuh

#define MMFAST_SHARED(type, name)                                                 \
  auto& name = *static_cast<std::type_identity_t<type>*>(emulator::static_shared( \
      [] {                                                                        \
        static char tag;                                                          \
        return &tag;                                                              \
      }(),                                                                        \
      sizeof(std::type_identity_t<type>), alignof(std::type_identity_t<type>)))
#define MMFAST_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(emulator::dynamic_shared())

namespace mmfast {

template <class... Parameters, class... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/, Args&&... args) {
  return emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(args)...); });
}
inline int fill_zero(void* data, size_t bytes, void* /*stream*/) {
  if (bytes) memset(data, 0, bytes);
  return 0;
}
inline size_t shared_memory_limit() {  // of sm_90, or of a smaller device
  const char* given = getenv("MMFAST_EMULATE_SHARED");
  return given ? size_t(atoll(given)) : 227 * 1024;
}
inline int multiprocessor_count() { return 3; }  // few, so that small grids count as full and large ones as several waves

// Until the matching wait the destination holds NaN, and the source is read only then.
template <int Bytes>
void cp_async(void* shared, const void* global, int valid = Bytes, MMFAST_HERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (reinterpret_cast<uintptr_t>(shared) % Bytes || reinterpret_cast<uintptr_t>(global) % Bytes)
    emulator::fail("cp_async: an address is not aligned to the copy's size", where);
  if (valid < 0 || valid > Bytes) emulator::fail("cp_async: more valid bytes than the copy has", where);
  for (int i = 0; i < valid; ++i) (void)static_cast<const volatile char*>(global)[i];
  memset(shared, 0xff, Bytes);
  emulator::copy_issue({shared, global, Bytes, valid});
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int Pending>
void cp_async_wait() {
  for (emulator::Copy c; emulator::copy_next(Pending, c);) {
    memcpy(c.to, c.from, size_t(c.valid));
    memset(static_cast<char*>(c.to) + c.valid, 0, size_t(c.bytes - c.valid));
  }
}

template <int Count, bool Transpose = false>
void ldmatrix(uint32_t (&fragment)[Count], const void* row, MMFAST_HERE) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  emulator::Request r{
      .op = emulator::Op::ldmatrix, .mask = ~0u, .where = where, .fragment = fragment, .count = Count, .transpose = Transpose};
  if (emulator::now.lane < 8 * Count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: a row is not aligned to 16 bytes", where);
    memcpy(r.row, row, 16);
  }
  emulator::warp_collective(r);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MMFAST_HERE) {
  emulator::Request r{.op = emulator::Op::mma_f16, .mask = ~0u, .where = where, .c = c, .a = a, .b = b};
  emulator::warp_collective(r);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MMFAST_HERE) {
  emulator::Request r{.op = emulator::Op::mma_bf16, .mask = ~0u, .where = where, .c = c, .a = a, .b = b};
  emulator::warp_collective(r);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MMFAST_HERE) {
  emulator::Request r{.op = emulator::Op::mma_tf32, .mask = ~0u, .where = where, .c = c, .a = a, .b = b};
  emulator::warp_collective(r);
}

inline uint32_t pack_f16(float low, float high) { return float_to_f16(low) | uint32_t(float_to_f16(high)) << 16; }
inline uint32_t pack_bf16(float low, float high) { return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16; }
inline float widen_f16(uint16_t half) { return f16_to_float(half); }
inline float fast_exp2(float x) { return exp2f(x); }
template <class T>
const T& reread(const T& argument) {
  return argument;
}

}  // namespace mmfast
